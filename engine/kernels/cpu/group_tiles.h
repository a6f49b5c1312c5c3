// Exact products of int8 codes with panels (see int8_tiles.h) whose sums are wanted group by group along the input
// features, and what codes such a panel may hold.
//
// Two quads of a panel, a pair, are 8 input features: 128 bytes of codes of eight bits, one quad behind the other, or
// 64 bytes of codes of four, the first quad in the low nibbles. Of eight quads of codes of five bits, five lie in the
// low bits of five times 64 bytes, and the others in the bits that are left; so do one of four of six bits in three.
// Sparse codes of four bits lie as sparse_tiles.h says.

#ifndef GROUP_TILES_H
#define GROUP_TILES_H

#include "sparse_tiles.h"

// What codes stand for: themselves (SMALL: 0 … 64; NIBBLES: 0 … 15; FIVES: 0 … 31, in groups of 32 or more; SIXES:
// 0 … 63; SPARSE: 0 … 15, 8 where none is kept), or one of sixteen bytes. Whatever they have been stored with too much,
// 128 for one, sums take back: `offset`. See `CpuGroupedMatmul`.
enum { BYTES, SMALL, NIBBLES, TABLE, FIVES, SIXES, SPARSE };

// A register holds some of a panel's 16 outputs: a part.
enum {
    PAIR = 2 * QUAD,         // elements
    ROWS_AT_ONCE = PARTS == 1 ? SOME_ROWS : 4,  // whose sums with so many panels fit into the registers
    PANELS_AT_ONCE = PARTS == 1 ? WIDE : 1,
};

typedef uint8_t PartCodes __attribute__((vector_size(64 / PARTS)));

INLINE Ints fill_ints(int32_t x) { return x - (Ints){0}; }

INLINE int is_bytes(int kind) { return kind == BYTES || kind == SMALL; }

// A unit is what tiles take at a time: so many quads that lie together, of which panels have a whole number.
INLINE int64_t unit_quads(int kind) { return kind == FIVES ? 8 : 4; }

// Of some units.
INLINE int64_t bytes_of(int kind, int64_t quads) {
    if (kind == SPARSE) return sparse_bytes(4, quads);
    const int64_t bits = is_bytes(kind) ? 8 : kind == SIXES ? 6 : kind == FIVES ? 5 : 4;
    return quads * (bits * QUAD_BYTES / 8);
}

INLINE PartCodes load_codes(const uint8_t *codes) {
    PartCodes v;
    memcpy(&v, codes, sizeof v);
    return v;
}

INLINE PartCodes look_up(const uint8_t *table, PartCodes indices) {
#if defined(__AVX512VNNI__)
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return (PartCodes)_mm512_shuffle_epi8(bytes, (__m512i)indices);
#elif defined(__AVX2__)
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (PartCodes)_mm256_shuffle_epi8(bytes, (__m256i)indices);
#else
    for (int i = 0; i < QUAD * LANES; i++) indices[i] = table[indices[i]];
    return indices;
#endif
}

INLINE Ints load_line(const uint8_t *unit, int line) { return (Ints)load_codes(unit + line * QUAD_BYTES); }

// What `pack_fives` and `pack_sixes` in pack.c put together.
INLINE Ints load_five(const uint8_t *unit, int quad) {
    switch (quad) {
    case 5: return (load_line(unit, 0) >> 5 & 0x07070707) | (load_line(unit, 1) >> 3 & 0x18181818);
    case 6: return (load_line(unit, 2) >> 5 & 0x07070707) | (load_line(unit, 3) >> 3 & 0x18181818);
    case 7:
        return (load_line(unit, 4) >> 5 & 0x07070707) | (load_line(unit, 1) >> 2 & 0x08080808) |
               (load_line(unit, 3) >> 1 & 0x10101010);
    default: return load_line(unit, quad) & 0x1F1F1F1F;
    }
}

INLINE Ints load_six(const uint8_t *unit, int quad) {
    if (quad < 3) return load_line(unit, quad) & 0x3F3F3F3F;
    return (load_line(unit, 0) >> 6 & 0x03030303) | (load_line(unit, 1) >> 4 & 0x0C0C0C0C) |
           (load_line(unit, 2) >> 2 & 0x30303030);
}

// A unit's quad for a part.
INLINE PartCodes load_quad(int kind, const uint8_t *table, const uint8_t *unit, int quad, int part) {
    if (kind == SPARSE) {
        uint8_t expanded[QUAD_BYTES];
        expand_quad(unit, 4, quad, expanded);
        return load_codes(expanded + part * QUAD * LANES);
    }
    unit += part * QUAD * LANES;
    if (is_bytes(kind)) return load_codes(unit + quad * QUAD_BYTES);
    if (kind == FIVES) return (PartCodes)load_five(unit, quad);
    if (kind == SIXES) return (PartCodes)load_six(unit, quad);
    const PartCodes nibbles = (PartCodes)(load_line(unit, quad / 2) >> (4 * (quad % 2)) & 0x0F0F0F0F);
    return kind == TABLE ? look_up(table, nibbles) : nibbles;
}

// A unit's quad of one output.
INLINE void load_lane(int kind, const uint8_t *table, const uint8_t *unit, int quad, int lane, uint8_t *four) {
    const PartCodes codes = load_quad(kind, table, unit, quad, lane / LANES);
    memcpy(four, (const uint8_t *)&codes + lane % LANES * QUAD, QUAD);
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

// A quad's sums of products in 16 bits, of bytes at even places and at odd ones: they cannot saturate.
INLINE __m256i multiply_bytes(PartCodes panel, __m256i codes) {
    return multiply_half(even_weights((__m256i)panel), odd_weights((__m256i)panel), even_bytes(codes), odd_bytes(codes));
}

#endif

#if !defined(__AVX2__)

// Not inlined: all the tiles would take a compiler half a minute.
static __attribute__((noinline)) Ints add_products(Ints sums, PartCodes panel, const int8_t *codes) {
    for (int output = 0; output < LANES; output++)
        for (int k = 0; k < QUAD; k++) sums[output] += (int32_t)panel[output * QUAD + k] * codes[k];
    return sums;
}

#endif

INLINE Ints add_quad_of_part(int kind, Ints sums, PartCodes panel, const int8_t *codes) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)panel, broadcast(codes));
#elif defined(__AVX2__)
    const __m256i x = spread_quad(codes);
    if (kind == BYTES || kind == TABLE) return sums + (Ints)multiply_bytes(panel, x);
    // At most 2 * 64 * 127 in 16 bits.
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)panel, x);
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    return add_products(sums, panel, codes);
#endif
}

// The same of two quads, with 8 codes.
INLINE Ints add_pair(int kind, Ints sums, PartCodes first, PartCodes second, const int8_t *codes) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    const __m256i x = spread_quad(codes), y = spread_quad(codes + QUAD);
    if (kind == BYTES || kind == TABLE)
        return sums + (Ints)_mm256_add_epi32(multiply_bytes(first, x), multiply_bytes(second, y));
    // At most 4 * 64 * 127 in 16 bits.
    const __m256i pairs =
        _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)first, x), _mm256_maddubs_epi16((__m256i)second, y));
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    return add_quad_of_part(kind, add_quad_of_part(kind, sums, first, codes), second, codes + QUAD);
#endif
}

#endif
