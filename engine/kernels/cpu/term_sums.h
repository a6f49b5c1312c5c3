// Exact sums of both terms of int8 activations (see kernels.h) with panels of int8 weights (see int8_tiles.h): a product
// makes floats of them at once, and ranks that share a product's input features add theirs first.

#ifndef TERM_SUMS_H
#define TERM_SUMS_H

#include "int8_tiles.h"

enum { CHUNK = 192 };  // tokens in a task

#if HAS_TILES

// High terms of tokens from … to - 1 with all the zeros between them, as the tile unit takes them: it is faster with
// the zeros than a few products at a time are without.
INLINE const int8_t *dense_high_terms(Codes codes, int64_t from, int64_t to) {
    static _Thread_local Room dense;
    int8_t *high = room(&dense, CHUNK * codes.stride);
    memset(high, 0, (size_t)((to - from) * codes.stride));
    for (int64_t m = from; m < to; m++) {
        const Quad *quads = codes.quads + m * (codes.stride / QUAD);
        for (int64_t i = 0; i < codes.tokens[m].num_quads; i++)
            memcpy(high + (m - from) * codes.stride + quads[i].index * QUAD, quads[i].codes, QUAD);
    }
    return high;
}

#endif

// Products of a token's high quads with one panel or two, added to sums.
INLINE void add_high_terms(const uint8_t *panels, int64_t distance, int64_t num_panels, const Quad *quad,
                           const Quad *end, Ints *sums) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    __m256i total[WIDE][2];
    memcpy(total, sums, sizeof total);
    for (; quad < end; quad++) {
        const __m256i codes = spread_quad(quad->codes), even = even_bytes(codes), odd = odd_bytes(codes);
        _Pragma("GCC unroll 2") for (int n = 0; n < num_panels; n++)
            _Pragma("GCC unroll 2") for (int half = 0; half < 2; half++) {
                const __m256i *address = (const __m256i *)(panels + n * distance + quad->index * QUAD_BYTES) + half;
                const __m256i bytes = _mm256_loadu_si256(address);
                const __m256i products = multiply_half(even_weights(bytes), odd_weights(bytes), even, odd);
                total[n][half] = _mm256_add_epi32(total[n][half], products);
            }
    }
    memcpy(sums, total, sizeof total);
#else
    for (; quad < end; quad++)
        for (int64_t n = 0; n < num_panels; n++)
            sums[n] = add_quad(sums[n], panels + n * distance + quad->index * QUAD_BYTES, quad->codes);
#endif
}

// The sums [token][panel] of the next tokens from m, before `to`, with one panel or two; how many tokens. dense: their
// high terms with all zeros, or null.
INLINE int64_t sum_terms(const uint8_t *panels, int64_t distance, int64_t num_panels, Codes codes, int64_t m, int64_t to,
                         const int8_t *dense, Ints *low, Ints *high) {
    const int64_t quads = codes.stride / QUAD;
    int64_t size;
    Tile *tile = next_tile(to - m, num_panels, &size);
    tile(panels, distance, codes.low + m * codes.stride, codes.stride, quads, (int32_t *)low);
    const int is_dense = dense != NULL && size >= UNIT_ROWS;
    if (is_dense) tile(panels, distance, dense, codes.stride, quads, (int32_t *)high);
    for (int64_t i = 0; i < size; i++) {
        const Token token = codes.tokens[m + i];
        const Quad *quad = codes.quads + (m + i) * quads, *end = quad + (is_dense ? 0 : token.num_quads);
        Ints *lows = low + i * num_panels, *highs = high + i * num_panels, sums[WIDE] = {{0}};
        if (is_dense) memcpy(sums, highs, (size_t)num_panels * sizeof *sums);
        if (num_panels == WIDE) add_high_terms(panels, distance, WIDE, quad, end, sums);
        else add_high_terms(panels, distance, 1, quad, end, sums);
        // Take back the 128 of the panels' codes.
        for (int64_t n = 0; n < num_panels; n++) {
            lows[n] -= 128 * token.low_sum;
            highs[n] = sums[n] - 128 * token.high_sum;
        }
    }
    return size;
}

#endif
