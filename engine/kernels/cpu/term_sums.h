// Exact sums of both terms of int8 activations (see kernels.h) with panels of int8 weights (see int8_tiles.h): a product
// makes floats of them at once, and ranks that share a product's input features add theirs first.

#ifndef TERM_SUMS_H
#define TERM_SUMS_H

#include "sparse_tiles.h"

enum { CHUNK = 192 };  // tokens in a task

// What weights may be. Those of codebooks: a `CodebookGrid` of engine/kernels/matmul/cpu_int8.py, without factors and
// with.
enum { WEIGHT_INT8, WEIGHT_CODEBOOK, WEIGHT_SCALED_CODEBOOK, WEIGHT_SPARSE };

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

// Products of a token's high quads with one panel or two, less the 128 of the panels' codes: `sums` has more to start
// with.
INLINE void add_high_terms(const uint8_t *panels, int64_t distance, int num_panels, const Quad *quad, const Quad *end,
                           int32_t high_sum, int32_t *sums) {
    Ints total[WIDE][PARTS];
    EACH(n, num_panels) EACH(p, PARTS)
        total[n][p] = (Ints)load((const float *)sums + n * PANEL + p * LANES) - 128 * high_sum;
    for (; quad < end; quad++) {
        const uint8_t *panel = panels + quad->index * QUAD_BYTES;
#if defined(__AVX512VNNI__)
        EACH(n, num_panels) total[n][0] = add_quad(total[n][0], panel + n * distance, quad->codes);
#elif defined(__AVX2__)
        const __m256i codes = spread_quad(quad->codes), even = even_bytes(codes), odd = odd_bytes(codes);
        EACH(n, num_panels) EACH(p, PARTS) {
            const __m256i bytes = _mm256_loadu_si256((const __m256i *)(panel + n * distance) + p);
            total[n][p] += (Ints)multiply_half(even_weights(bytes), odd_weights(bytes), even, odd);
        }
#else
        EACH(n, num_panels) multiply_quad(panel + n * distance, quad->codes, (int32_t *)total[n]);
#endif
    }
    EACH(n, num_panels) EACH(p, PARTS) store((float *)sums + n * PANEL + p * LANES, (Floats)total[n][p]);
}

// The sums [token][panel][PANEL] of the next tokens from m, before `to`, with some sparse panels; how many tokens.
INLINE int64_t sum_sparse_terms(const uint8_t *panels, int64_t num_panels, Codes codes, int64_t m, int64_t to,
                                int32_t *low, int32_t *high) {
    const int64_t quads = codes.stride / QUAD, size = smaller(to - m, FEW_ROWS);
    for (int64_t n = 0; n < num_panels; n++) {
        const uint8_t *panel = panels + n * sparse_bytes(8, quads);
        _Alignas(64) int32_t sums[FEW_ROWS * PANEL];
        SPARSE_TILES[size - 1](panel, codes.low + m * codes.stride, codes.stride, quads, sums);
        for (int64_t i = 0; i < size; i++) {
            const int64_t place = (i * num_panels + n) * PANEL;
            const Quad *quad = codes.quads + (m + i) * quads;
            memcpy(low + place, sums + i * PANEL, PANEL * sizeof *low);
            sum_sparse_quads(panel, quad, codes.tokens[m + i].num_quads, high + place);
        }
    }
    return size;
}

// Some sparse panels as `sum_terms` takes them.
INLINE const uint8_t *expanded_panels(const uint8_t *panels, int64_t num_panels, int64_t quads) {
    static _Thread_local Room expansion;
    uint8_t *expanded = room(&expansion, num_panels * quads * QUAD_BYTES);
    expand_sparse(panels, 8, num_panels * quads, expanded);
    return expanded;
}

// The sums [token][panel][PANEL] of the next tokens from m, before `to`, with one panel or two; how many tokens. dense:
// their high terms with all zeros, or null.
INLINE int64_t sum_terms(const uint8_t *panels, int64_t distance, int num_panels, Codes codes, int64_t m, int64_t to,
                         const int8_t *dense, int32_t *low, int32_t *high) {
    const int64_t quads = codes.stride / QUAD, row = num_panels * PANEL;
    int64_t size;
    Tile *tile = next_tile(to - m, num_panels, &size);
    tile(panels, distance, codes.low + m * codes.stride, codes.stride, quads, low);
    const int is_dense = dense != NULL && size >= UNIT_ROWS;
    if (is_dense) tile(panels, distance, dense, codes.stride, quads, high);
    else memset(high, 0, (size_t)(size * row) * sizeof *high);
    for (int64_t i = 0; i < size; i++) {
        const Token token = codes.tokens[m + i];
        const Quad *quad = codes.quads + (m + i) * quads, *end = quad + (is_dense ? 0 : token.num_quads);
        for (int64_t n = 0; n < row; n++) low[i * row + n] -= 128 * token.low_sum;
        add_high_terms(panels, distance, num_panels, quad, end, token.high_sum, high + i * row);
    }
    return size;
}

#endif
