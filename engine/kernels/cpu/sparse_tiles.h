// Exact products of int8 codes with panels of sparse weights (engine/kernels/matmul/sparse24.py), which keep two codes
// of each quad of an output.
//
// A unit of a panel is 16 input features, four quads: 32 bytes of places │ their codes, of eight bits 32 bytes a quad,
// of four 16: those of quad 2 i in the low nibbles of 32 bytes, those of quad 2 i + 1 in the high ones. Of each 32 bytes
// two belong to an output. The places have two bits for each quad, the first one's the lowest: which of its four
// elements a code is multiplied with.
//
// Few tokens are multiplied with the codes as they lie: for each its element is picked out of the quad that all outputs
// share. For many, panels are expanded to those of int8_tiles.h.

#ifndef SPARSE_TILES_H
#define SPARSE_TILES_H

#include "int8_tiles.h"

enum {
    SPARSE_UNIT = 4,         // quads
    KEPT = 2,                // codes of a quad
    PLACES = PANEL * KEPT,   // bytes of a unit's places
    SPARSE_AHEAD = 2048,     // bytes that are on their way while others are multiplied
    SPARSE_CENTRE = 8,       // what codes of four bits have too much
};

// Of whole units.
INLINE int64_t sparse_bytes(int bits, int64_t quads) { return quads * (PLACES * bits / 8 + PLACES / SPARSE_UNIT); }

INLINE const uint8_t *sparse_unit(const uint8_t *panel, int bits, int64_t quad) {
    return panel + sparse_bytes(bits, quad - quad % SPARSE_UNIT);
}

#if defined(__AVX2__)

// A quad's places: the lowest two bits of each byte, and the highest one zero, as a shuffle wants it.
INLINE __m256i load_places(const uint8_t *unit, int quad) {
    const __m256i places = _mm256_loadu_si256((const __m256i *)unit);
    return _mm256_and_si256(_mm256_srli_epi16(places, 2 * quad), _mm256_set1_epi8(0x7F));
}

// A quad's codes, of four bits 0 … 15.
INLINE __m256i load_kept(const uint8_t *unit, int bits, int quad) {
    const __m256i *codes = (const __m256i *)(unit + PLACES);
    if (bits == 8) return _mm256_loadu_si256(codes + quad);
    const __m256i both = _mm256_loadu_si256(codes + quad / 2);
    return _mm256_and_si256(quad % 2 ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(0x0F));
}

// What each output's two codes of eight bits add: at most 2 * 128 * 127, so that 16 bits hold it.
INLINE __m256i multiply_kept(__m256i codes, __m256i places, const int8_t *x) {
    const __m256i picked = _mm256_shuffle_epi8(spread_quad(x), places);
    return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(picked, codes));
}

// The same of four bits, less their centre.
INLINE __m256i multiply_centred(__m256i codes, __m256i places, const int8_t *x) {
    const __m256i picked = _mm256_shuffle_epi8(spread_quad(x), places);
    return _mm256_sub_epi16(_mm256_maddubs_epi16(codes, picked),
                            _mm256_maddubs_epi16(_mm256_set1_epi8(SPARSE_CENTRE), picked));
}

// A part of sixteen sums of 16 bits.
INLINE Ints widen_sums(__m256i sums, int part) {
#if LANES == 16
    (void)part;
    return (Ints)_mm512_cvtepi16_epi32(sums);
#else
    return (Ints)_mm256_cvtepi16_epi32(part ? _mm256_extracti128_si256(sums, 1) : _mm256_castsi256_si128(sums));
#endif
}

// Eight outputs' quads, four bytes each, from their codes and places: `zero` stands where none is.
INLINE __m256i spread_kept(__m128i kept, __m128i places, uint8_t zero) {
    const __m256i first = _mm256_setr_epi8(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6,  //
                                           8, 8, 8, 8, 10, 10, 10, 10, 12, 12, 12, 12, 14, 14, 14, 14);
    const __m256i elements = _mm256_set1_epi32(0x03020100);
    const __m256i codes = _mm256_broadcastsi128_si256(kept);
    const __m256i own = _mm256_and_si256(_mm256_broadcastsi128_si256(places), _mm256_set1_epi8(3));
    __m256i quads = _mm256_set1_epi8((char)zero);
    _Pragma("GCC unroll 2") for (int i = 0; i < KEPT; i++) {
        const __m256i slot = _mm256_add_epi8(first, _mm256_set1_epi8((char)i));
        const __m256i is_there = _mm256_cmpeq_epi8(_mm256_shuffle_epi8(own, slot), elements);
        quads = _mm256_blendv_epi8(quads, _mm256_shuffle_epi8(codes, slot), is_there);
    }
    return quads;
}

#endif

// A quad of a panel, 16 outputs × 4 bytes: unsigned, codes of eight bits plus 128.
INLINE void expand_quad(const uint8_t *unit, int bits, int quad, uint8_t *expanded) {
#if defined(__AVX2__)
    const __m256i places = load_places(unit, quad), loaded = load_kept(unit, bits, quad);
    const __m256i kept = bits == 8 ? _mm256_xor_si256(loaded, _mm256_set1_epi8((char)0x80)) : loaded;
    const uint8_t zero = bits == 8 ? 128 : SPARSE_CENTRE;
    __m256i *output = (__m256i *)expanded;
    _mm256_storeu_si256(output, spread_kept(_mm256_castsi256_si128(kept), _mm256_castsi256_si128(places), zero));
    _mm256_storeu_si256(output + 1,
                        spread_kept(_mm256_extracti128_si256(kept, 1), _mm256_extracti128_si256(places, 1), zero));
#else
    const uint8_t *codes = unit + PLACES + (bits == 8 ? quad : quad / 2) * PLACES;
    memset(expanded, bits == 8 ? 128 : SPARSE_CENTRE, QUAD_BYTES);
    for (int i = 0; i < PLACES; i++) {
        const uint8_t code = bits == 8 ? codes[i] ^ 128 : (codes[i] >> (4 * (quad % 2))) & 15;
        expanded[i / KEPT * QUAD + ((unit[i] >> (2 * quad)) & 3)] = code;
    }
#endif
}

// Some quads, of one panel or several that lie one behind the other.
INLINE void expand_sparse(const uint8_t *panels, int bits, int64_t quads, uint8_t *expanded) {
    for (int64_t unit = 0; unit < quads / SPARSE_UNIT; unit++)
        _Pragma("GCC unroll 4") for (int quad = 0; quad < SPARSE_UNIT; quad++)
            expand_quad(panels + unit * sparse_bytes(bits, SPARSE_UNIT), bits, quad,
                        expanded + (unit * SPARSE_UNIT + quad) * QUAD_BYTES);
}

// Adds a quad's products with a panel of eight bits to sums.
INLINE void add_sparse_quad(const uint8_t *panel, int64_t quad, const int8_t *x, Ints *sums) {
    const uint8_t *unit = sparse_unit(panel, 8, quad);
    const int own = (int)(quad % SPARSE_UNIT);
#if defined(__AVX2__)
    const __m256i products = multiply_kept(load_kept(unit, 8, own), load_places(unit, own), x);
    EACH(p, PARTS) sums[p] += widen_sums(products, p);
#else
    const int8_t *codes = (const int8_t *)unit + PLACES + own * PLACES;
    for (int i = 0; i < PLACES; i++) ((int32_t *)sums)[i / KEPT] += codes[i] * (int32_t)x[(unit[i] >> (2 * own)) & 3];
#endif
}

INLINE void store_sums(const Ints *sums, int32_t *output) {
    EACH(p, PARTS) store((float *)output + p * LANES, (Floats)sums[p]);
}

// The sums [PANEL] of a token's high terms.
INLINE void sum_sparse_quads(const uint8_t *panel, const Quad *quad, int64_t num_quads, int32_t *output) {
    Ints sums[PARTS] = {{0}};
    for (const Quad *end = quad + num_quads; quad < end; quad++) add_sparse_quad(panel, quad->index, quad->codes, sums);
    store_sums(sums, output);
}

// The sums [ROWS][PANEL] of some rows of x with a panel of eight bits.
#if defined(__AVX2__)
#define SPARSE_TILE(ROWS)                                                                                          \
    static void sparse_tile_##ROWS(const uint8_t *panel, const int8_t *x, int64_t stride, int64_t quads,           \
                                   int32_t *sums) {                                                                \
        const __m256i ones = _mm256_set1_epi16(1);                                                                 \
        __m256i low[ROWS], high[ROWS]; /* outputs 0 … 3 and 8 … 11; 4 … 7 and 12 … 15 */                           \
        _Pragma("GCC unroll 4") for (int m = 0; m < ROWS; m++) low[m] = high[m] = _mm256_setzero_si256();          \
        for (int64_t k = 0; k < quads; k += SPARSE_UNIT) {                                                         \
            const uint8_t *unit = panel + sparse_bytes(8, k);                                                      \
            for (int64_t i = 0; i < sparse_bytes(8, SPARSE_UNIT); i += 64)                                         \
                __builtin_prefetch(unit + i + SPARSE_AHEAD);                                                       \
            _Pragma("GCC unroll 2") for (int quad = 0; quad < SPARSE_UNIT; quad += 2) {                            \
                const __m256i first = load_kept(unit, 8, quad), second = load_kept(unit, 8, quad + 1);             \
                const __m256i first_places = load_places(unit, quad), second_places = load_places(unit, quad + 1); \
                _Pragma("GCC unroll 4") for (int m = 0; m < ROWS; m++) {                                           \
                    const int8_t *own = x + m * stride + (k + quad) * QUAD;                                        \
                    const __m256i a = multiply_kept(first, first_places, own);                                     \
                    const __m256i b = multiply_kept(second, second_places, own + QUAD);                            \
                    low[m] = _mm256_add_epi32(low[m], _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), ones));       \
                    high[m] = _mm256_add_epi32(high[m], _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), ones));     \
                }                                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
        for (int m = 0; m < ROWS; m++) {                                                                           \
            __m256i *output = (__m256i *)(sums + m * PANEL);                                                       \
            _mm256_storeu_si256(output, _mm256_permute2x128_si256(low[m], high[m], 0x20));                         \
            _mm256_storeu_si256(output + 1, _mm256_permute2x128_si256(low[m], high[m], 0x31));                     \
        }                                                                                                          \
    }
#else
#define SPARSE_TILE(ROWS)                                                                                          \
    static void sparse_tile_##ROWS(const uint8_t *panel, const int8_t *x, int64_t stride, int64_t quads,           \
                                   int32_t *sums) {                                                                \
        for (int m = 0; m < ROWS; m++) {                                                                           \
            Ints own[PARTS] = {{0}};                                                                               \
            for (int64_t k = 0; k < quads; k++) add_sparse_quad(panel, k, x + m * stride + k * QUAD, own);         \
            store_sums(own, sums + m * PANEL);                                                                     \
        }                                                                                                          \
    }
#endif

typedef void SparseTile(const uint8_t *, const int8_t *, int64_t, int64_t, int32_t *);

SPARSE_TILE(1)
SPARSE_TILE(2)
SPARSE_TILE(3)
SPARSE_TILE(4)

static SparseTile *const SPARSE_TILES[FEW_ROWS] __attribute__((unused)) = {
    sparse_tile_1, sparse_tile_2, sparse_tile_3, sparse_tile_4};

#endif
