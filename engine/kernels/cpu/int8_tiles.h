// Exact products of int8 codes with panels: 16 outputs │ quad of 4 elements │ 16 × 4 bytes, each a code plus 128.
//
// The panels' operand is unsigned, so that the other one, signed, can be broadcast. Sums are int32 and exact,
// whatever instruction makes them: no saturating one does.

#ifndef INT8_TILES_H
#define INT8_TILES_H

#include "kernels.h"

enum {
    PANEL = 16,        // outputs
    QUAD = 4,          // elements
    QUAD_BYTES = PANEL * QUAD,
    WIDE = 2,          // panels that go through many rows together
    FEW_ROWS = 4,      // up to here a panel by itself is as fast, and needs less memory at a time
    SOME_ROWS = 12,    // whose sums with two panels fit into the registers
    UNIT_ROWS = 16,    // of a tile of AMX: 16 rows × 16 outputs × 64 elements an instruction
    UNIT_ELEMENTS = 64,
    MOST_ROWS = 2 * UNIT_ROWS,
};

// sums[row][panel][output] over `quads` quads of some rows of x, for panels `distance` bytes apart.
typedef void Tile(const uint8_t *panels, int64_t distance, const int8_t *x, int64_t stride, int64_t quads,
                  int32_t *sums);

#if defined(__AVX2__)

INLINE __m256i spread_quad(const int8_t *codes) {
    int32_t quad;
    memcpy(&quad, codes, sizeof quad);
    return _mm256_set1_epi32(quad);
}

#endif

#if defined(__AVX512VNNI__)

INLINE __m512i broadcast(const int8_t *codes) {
    int32_t quad;
    memcpy(&quad, codes, sizeof quad);
    return _mm512_set1_epi32(quad);
}

// Adds a quad's products with a panel to sums.
INLINE Ints add_quad(Ints sums, const uint8_t *panel, const int8_t *codes) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, _mm512_loadu_si512(panel), broadcast(codes));
}

#define TILE(ROWS, PANELS, UNROLL)                                                                                 \
    static void tile_##ROWS##_##PANELS(const uint8_t *panels, int64_t distance, const int8_t *x, int64_t stride,   \
                                       int64_t quads, int32_t *sums) {                                             \
        __m512i total[UNROLL][ROWS][PANELS];                                                                       \
        _Pragma("GCC unroll 16") for (int u = 0; u < UNROLL; u++)                                                  \
            _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++)                                                \
                _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                          \
                    total[u][m][n] = _mm512_setzero_si512();                                                       \
        for (int64_t k = 0; k < quads; k += UNROLL) {                                                              \
            _Pragma("GCC unroll 16") for (int u = 0; u < UNROLL; u++) {                                            \
                __m512i w[PANELS];                                                                                 \
                _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                          \
                    w[n] = _mm512_loadu_si512(panels + n * distance + (k + u) * QUAD_BYTES);                       \
                _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++) {                                          \
                    const __m512i codes = broadcast(x + m * stride + (k + u) * QUAD);                              \
                    _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                      \
                        total[u][m][n] = _mm512_dpbusd_epi32(total[u][m][n], w[n], codes);                         \
                }                                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
        _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++)                                                    \
            _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++) {                                            \
            _Pragma("GCC unroll 16") for (int u = 1; u < UNROLL; u++)                                              \
                total[0][m][n] = _mm512_add_epi32(total[0][m][n], total[u][m][n]);                                 \
            _mm512_storeu_si512(sums + (m * PANELS + n) * PANEL, total[0][m][n]);                                  \
        }                                                                                                          \
    }

#elif defined(__AVX2__)

enum {
    TOGETHER = 4,       // rows whose sums with a panel fit into the registers
    CHUNK_QUADS = 128,  // of codes that are widened at a time
};

INLINE __m256i even_bytes(__m256i codes) { return _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8); }
INLINE __m256i odd_bytes(__m256i codes) { return _mm256_srai_epi16(codes, 8); }

// Codes in sixteen bits, so that sums of two products cannot saturate: those of a quad in the order 0, 2, 1, 3.
INLINE void widen_codes(const int8_t *codes, int64_t quads, int16_t *wide) {
    for (int64_t k = 0; k < quads; k += 8) {
        __m256i bytes = _mm256_setzero_si256();
        if (k + 8 <= quads) bytes = _mm256_loadu_si256((const __m256i *)(codes + k * QUAD));
        else memcpy(&bytes, codes + k * QUAD, (size_t)(quads - k) * QUAD);
        const __m256i even = even_bytes(bytes), odd = odd_bytes(bytes);
        const __m256i first = _mm256_unpacklo_epi32(even, odd), second = _mm256_unpackhi_epi32(even, odd);
        _mm256_storeu_si256((__m256i *)(wide + k * QUAD), _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_storeu_si256((__m256i *)(wide + k * QUAD) + 1, _mm256_permute2x128_si256(first, second, 0x31));
    }
}

// Products of 32 bytes of a panel, eight outputs, with a quad.
INLINE __m256i multiply_half(__m256i even, __m256i odd, __m256i even_codes, __m256i odd_codes) {
    return _mm256_add_epi32(_mm256_madd_epi16(even, even_codes), _mm256_madd_epi16(odd, odd_codes));
}

INLINE __m256i even_weights(__m256i half) { return _mm256_and_si256(half, _mm256_set1_epi16(255)); }
INLINE __m256i odd_weights(__m256i half) { return _mm256_srli_epi16(half, 8); }

INLINE __m256i spread_pair(const int16_t *codes) {
    int32_t pair;
    memcpy(&pair, codes, sizeof pair);
    return _mm256_set1_epi32(pair);
}

// Adds the products of a panel with some rows' wide codes to their sums, which lie `distance` apart.
INLINE void add_wide(const uint8_t *panel, const int16_t *codes, int64_t stride, int rows, int64_t quads, int32_t *sums,
                     int64_t distance) {
    enum { AHEAD = 2048 };  // bytes
    __m256i total[TOGETHER][2];
    EACH(m, rows) EACH(half, 2) total[m][half] = _mm256_loadu_si256((const __m256i *)(sums + m * distance) + half);
    for (int64_t k = 0; k < quads; k++) {
        __builtin_prefetch(panel + k * QUAD_BYTES + AHEAD);
        __m256i even[2], odd[2];
        EACH(half, 2) {
            const __m256i bytes = _mm256_loadu_si256((const __m256i *)(panel + k * QUAD_BYTES) + half);
            even[half] = even_weights(bytes);
            odd[half] = odd_weights(bytes);
        }
        EACH(m, rows) {
            const int16_t *quad = codes + m * stride + k * QUAD;
            const __m256i even_codes = spread_pair(quad), odd_codes = spread_pair(quad + 2);
            EACH(half, 2)
                total[m][half] =
                    _mm256_add_epi32(total[m][half], multiply_half(even[half], odd[half], even_codes, odd_codes));
        }
    }
    EACH(m, rows) EACH(half, 2) _mm256_storeu_si256((__m256i *)(sums + m * distance) + half, total[m][half]);
}

// UNROLL is for registers of sixteen sums.
#define TILE(ROWS, PANELS, UNROLL)                                                                                 \
    static void tile_##ROWS##_##PANELS(const uint8_t *panels, int64_t distance, const int8_t *x, int64_t stride,   \
                                       int64_t quads, int32_t *sums) {                                             \
        enum { PASSES = (ROWS + TOGETHER - 1) / TOGETHER, MOST = (ROWS + PASSES - 1) / PASSES };                   \
        enum { REST = ROWS % MOST, ROW = PANELS * PANEL, CODES = CHUNK_QUADS * QUAD };                             \
        int16_t wide[ROWS][CODES];                                                                                 \
        memset(sums, 0, ROWS * ROW * sizeof *sums);                                                                \
        for (int64_t k = 0; k < quads; k += CHUNK_QUADS) {                                                         \
            const int64_t some = smaller(CHUNK_QUADS, quads - k);                                                  \
            for (int m = 0; m < ROWS; m++) widen_codes(x + m * stride + k * QUAD, some, wide[m]);                  \
            for (int n = 0; n < PANELS; n++) {                                                                     \
                const uint8_t *part = panels + n * distance + k * QUAD_BYTES;                                      \
                int32_t *own = sums + n * PANEL;                                                                   \
                for (int m = 0; m + MOST <= ROWS; m += MOST)                                                       \
                    add_wide(part, wide[m], CODES, MOST, some, own + m * ROW, ROW);                                \
                if (REST > 0)                                                                                      \
                    add_wide(part, wide[ROWS - REST], CODES, REST, some, own + (ROWS - REST) * ROW, ROW);          \
            }                                                                                                      \
        }                                                                                                          \
    }

#else

// A quad of a panel times one of codes, added to sums.
INLINE void multiply_quad(const uint8_t *panel, const int8_t *codes, int32_t *sums) {
    for (int output = 0; output < PANEL; output++)
        for (int k = 0; k < QUAD; k++) sums[output] += (int32_t)panel[output * QUAD + k] * codes[k];
}

INLINE Ints add_quad(Ints sums, const uint8_t *panel, const int8_t *codes) {
    multiply_quad(panel, codes, (int32_t *)&sums);
    return sums;
}

#define TILE(ROWS, PANELS, UNROLL)                                                                                 \
    static void tile_##ROWS##_##PANELS(const uint8_t *panels, int64_t distance, const int8_t *x, int64_t stride,   \
                                       int64_t quads, int32_t *sums) {                                             \
        memset(sums, 0, ROWS * PANELS * PANEL * sizeof *sums);                                                     \
        for (int m = 0; m < ROWS; m++)                                                                             \
            for (int n = 0; n < PANELS; n++)                                                                       \
                for (int64_t k = 0; k < quads; k++)                                                                \
                    multiply_quad(panels + n * distance + k * QUAD_BYTES, x + m * stride + k * QUAD,               \
                                  sums + (m * PANELS + n) * PANEL);                                                \
    }

#endif

TILE(1, 1, 4)
TILE(2, 1, 4)
TILE(3, 1, 2)
TILE(4, 1, 2)
TILE(1, 2, 1)
TILE(2, 2, 1)
TILE(3, 2, 1)
TILE(4, 2, 1)
TILE(5, 2, 1)
TILE(6, 2, 1)
TILE(7, 2, 1)
TILE(8, 2, 1)
TILE(9, 2, 1)
TILE(10, 2, 1)
TILE(11, 2, 1)
TILE(12, 2, 1)

static Tile *const NARROW_TILES[] = {tile_1_1, tile_2_1, tile_3_1, tile_4_1};
static Tile *const WIDE_TILES[] = {
    tile_1_2, tile_2_2, tile_3_2, tile_4_2, tile_5_2, tile_6_2,
    tile_7_2, tile_8_2, tile_9_2, tile_10_2, tile_11_2, tile_12_2,
};

#if defined(EMULATE_TILES)

// The tile unit in plain C, to test what is written for it on machines without one.
static _Thread_local struct {
    int32_t sums[4][16][16];
    int8_t bytes[8][16][64];
} unit;

#define HAS_TILES 1
#define tile_zero(c) memset(unit.sums[c], 0, sizeof unit.sums[c])
#define tile_load(t, address, stride)                                                                              \
    for (int row_ = 0; row_ < 16; row_++)                                                                          \
        memcpy(unit.bytes[t][row_], (const int8_t *)(address) + row_ * (stride), 64)
#define tile_store(c, address, stride)                                                                             \
    for (int row_ = 0; row_ < 16; row_++) memcpy((int8_t *)(address) + row_ * (stride), unit.sums[c][row_], 64)
#define tile_multiply(c, a, b)                                                                                     \
    for (int m_ = 0; m_ < 16; m_++)                                                                                \
        for (int n_ = 0; n_ < 16; n_++)                                                                            \
            for (int k_ = 0; k_ < 64; k_++)                                                                        \
                unit.sums[c][m_][n_] +=                                                                            \
                    unit.bytes[a][m_][k_] * (int32_t)(uint8_t)unit.bytes[b][k_ / 4][n_ * 4 + k_ % 4]
INLINE void begin_tiles(void) {}
INLINE void end_tiles(void) {}

#elif defined(__AMX_INT8__)

#define HAS_TILES 1
#define tile_zero(c) _tile_zero(c)
#define tile_load(t, address, stride) _tile_loadd(t, address, stride)
#define tile_store(c, address, stride) _tile_stored(c, address, stride)
#define tile_multiply(c, a, b) _tile_dpbsud(c, a, b)

INLINE void begin_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_a_row[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) config.bytes_a_row[t] = 64, config.rows[t] = 16;
    // GCC 12 believes that the next instruction reads eight bytes, and would drop the other stores.
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}
INLINE void end_tiles(void) { _tile_release(); }

#else

#define HAS_TILES 0
INLINE void begin_tiles(void) {}
INLINE void end_tiles(void) {}

#endif

#if HAS_TILES

// One or two tiles of rows against two panels, so that loads serve two products. Reads whole UNIT_ELEMENTS.
INLINE void multiply_units(const uint8_t *panels, int64_t distance, const int8_t *x, int64_t stride, int64_t quads,
                           int32_t *sums, int is_pair) {
    const uint8_t *other = panels + distance;
    const int8_t *below = x + UNIT_ROWS * stride;
    enum { ROW_BYTES = WIDE * PANEL * (int)sizeof(int32_t) };
    tile_zero(0);
    tile_zero(1);
    if (is_pair) {
        tile_zero(2);
        tile_zero(3);
    }
    for (int64_t k = 0; k < quads * QUAD; k += UNIT_ELEMENTS) {
        tile_load(4, x + k, stride);
        tile_load(6, panels + k * PANEL, QUAD_BYTES);
        tile_multiply(0, 4, 6);
        tile_load(7, other + k * PANEL, QUAD_BYTES);
        tile_multiply(1, 4, 7);
        if (is_pair) {
            tile_load(5, below + k, stride);
            tile_multiply(2, 5, 6);
            tile_multiply(3, 5, 7);
        }
    }
    tile_store(0, sums, ROW_BYTES);
    tile_store(1, sums + PANEL, ROW_BYTES);
    if (is_pair) {
        tile_store(2, sums + UNIT_ROWS * WIDE * PANEL, ROW_BYTES);
        tile_store(3, sums + UNIT_ROWS * WIDE * PANEL + PANEL, ROW_BYTES);
    }
}

static void tile_16_2(const uint8_t *panels, int64_t distance, const int8_t *x, int64_t stride, int64_t quads,
                      int32_t *sums) {
    multiply_units(panels, distance, x, stride, quads, sums, 0);
}

static void tile_32_2(const uint8_t *panels, int64_t distance, const int8_t *x, int64_t stride, int64_t quads,
                      int32_t *sums) {
    multiply_units(panels, distance, x, stride, quads, sums, 1);
}

#endif

// The tile for the next of `left` rows, and how many it takes.
INLINE Tile *next_tile(int64_t left, int64_t num_panels, int64_t *rows) {
#if HAS_TILES
    if (num_panels == WIDE && left >= UNIT_ROWS) {
        *rows = left >= 2 * UNIT_ROWS ? 2 * UNIT_ROWS : UNIT_ROWS;
        return left >= 2 * UNIT_ROWS ? tile_32_2 : tile_16_2;
    }
#endif
    const int64_t most = num_panels == WIDE ? SOME_ROWS : FEW_ROWS, tiles = (left + most - 1) / most;
    *rows = (left + tiles - 1) / tiles;  // tiles of about the same size
    return (num_panels == WIDE ? WIDE_TILES : NARROW_TILES)[*rows - 1];
}

#endif
