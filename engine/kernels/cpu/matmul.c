// Products of int8 activations (see kernels.h) with int8 weights, packed for dot products of four bytes:
//
//   panel of 16 output features │ quad of 4 input features │ 16 rows × 4 bytes, each the weight plus 128
//
// Weights are the unsigned operand, so that activations, the signed one, can be broadcast. Int4 weights lie in
// memory as nibbles and are expanded to such panels where they are used: 5 bits a weight instead of 8 to read.
//
// Sums are int32 and exact, whatever instruction makes them: no saturating one does.

#include <stdlib.h>

#include "kernels.h"

enum {
    PANEL = 16,        // output features
    QUAD = 4,          // input features
    QUAD_BYTES = PANEL * QUAD,
    WIDE = 2,          // panels that go through many tokens together
    MAX_ROWS = 12,     // tokens whose sums with those fit into the registers
    FEW_TOKENS = 4,    // up to here a panel by itself is as fast, and needs less memory at a time
    CHUNK = 192,       // tokens in a task
    NARROW_TASK = 2,   // panels in a task of few tokens
    GROUP_QUADS = 8,   // of an int4 group: 32 input features
    GROUP_BYTES = 2 * PANEL * (int)sizeof(int16_t) + GROUP_QUADS * QUAD_BYTES / 2,
};

enum { WEIGHT_INT8, WEIGHT_INT4 };

// sums[row][panel][feature] over `quads` quads of `rows` tokens, for panels `distance` bytes apart.
typedef void Tile(const uint8_t *weight, int64_t distance, const int8_t *x, int64_t stride, int64_t quads,
                  int32_t *sums);

#if defined(__AVX512VNNI__)

INLINE __m512i broadcast(const int8_t *codes) {
    int32_t quad;
    memcpy(&quad, codes, sizeof quad);
    return _mm512_set1_epi32(quad);
}

#define TILE(ROWS, PANELS, UNROLL)                                                                                 \
    static void tile_##ROWS##_##PANELS(const uint8_t *weight, int64_t distance, const int8_t *x, int64_t stride,   \
                                       int64_t quads, int32_t *sums) {                                             \
        __m512i total[UNROLL][ROWS][PANELS];                                                                       \
        _Pragma("GCC unroll 16") for (int u = 0; u < UNROLL; u++)                                                   \
            _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++)                                                 \
                _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                           \
                    total[u][m][n] = _mm512_setzero_si512();                                                       \
        for (int64_t k = 0; k < quads; k += UNROLL) {                                                              \
            _Pragma("GCC unroll 16") for (int u = 0; u < UNROLL; u++) {                                             \
                __m512i w[PANELS];                                                                                 \
                _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                           \
                    w[n] = _mm512_loadu_si512(weight + n * distance + (k + u) * QUAD_BYTES);                       \
                _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++) {                                           \
                    const __m512i codes = broadcast(x + m * stride + (k + u) * QUAD);                              \
                    _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                       \
                        total[u][m][n] = _mm512_dpbusd_epi32(total[u][m][n], w[n], codes);                         \
                }                                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
        _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++)                                                     \
            _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++) {                                             \
            _Pragma("GCC unroll 16") for (int u = 1; u < UNROLL; u++)                                               \
                total[0][m][n] = _mm512_add_epi32(total[0][m][n], total[u][m][n]);                                 \
            _mm512_storeu_si512(sums + (m * PANELS + n) * PANEL, total[0][m][n]);                                  \
        }                                                                                                          \
    }

// The sums of a token's sparse terms.
INLINE void sum_quads(const uint8_t *weight, int64_t distance, const Quad *quads, int64_t size, int64_t panels,
                      int32_t *sums) {
    __m512i total[WIDE] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t i = 0; i < size; i++) {
        const __m512i codes = broadcast(quads[i].codes);
        const uint8_t *w = weight + quads[i].index * QUAD_BYTES;
        for (int64_t n = 0; n < panels; n++)
            total[n] = _mm512_dpbusd_epi32(total[n], _mm512_loadu_si512(w + n * distance), codes);
    }
    for (int64_t n = 0; n < panels; n++) _mm512_storeu_si512(sums + n * PANEL, total[n]);
}

// (code * factor + offset) / 256 + 128 of 32 input features in a panel; see engine/quant/int4.py.
INLINE void expand_group(const uint8_t *group, uint8_t *panel) {
    const __m512i low_halves = _mm512_set1_epi32(0x000F000F), high_bytes = _mm512_set1_epi16((int16_t)0xFF00);
    const __m512i factors = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)group));
    const __m512i offsets = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(group + 32)));
    const __m512i factor = _mm512_or_si512(factors, _mm512_slli_epi32(factors, 16));
    const __m512i offset = _mm512_or_si512(offsets, _mm512_slli_epi32(offsets, 16));
    for (int pair = 0; pair < GROUP_QUADS / 2; pair++) {
        const __m512i codes = _mm512_loadu_si512(group + 64 + pair * QUAD_BYTES);
        for (int half = 0; half < 2; half++) {
            // Codes 0 and 2 of each row in one, 1 and 3 in the other, in words of 16 bits.
            const __m512i even = _mm512_and_si512(_mm512_srli_epi16(codes, 4 * half), low_halves);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(codes, 8 + 4 * half), low_halves);
            const __m512i low = _mm512_add_epi16(_mm512_mullo_epi16(even, factor), offset);
            const __m512i high = _mm512_add_epi16(_mm512_mullo_epi16(odd, factor), offset);
            const __m512i bytes =
                _mm512_or_si512(_mm512_srli_epi16(low, 8), _mm512_and_si512(high, high_bytes));
            _mm512_storeu_si512(panel + (2 * pair + half) * QUAD_BYTES, bytes);
        }
    }
}

#else

// 16 rows × 4 bytes of weights times one quad of codes, added to sums.
INLINE void multiply_quad(const uint8_t *w, const int8_t *codes, int32_t *sums) {
#if defined(__AVX2__)
    int32_t quad;
    memcpy(&quad, codes, sizeof quad);
    const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(quad)));
    for (int part = 0; part < 2; part++) {
        const __m128i *rows = (const __m128i *)w + 2 * part;
        // Two sums of pairs a row, of 16-bit factors: they cannot saturate.
        const __m256i first = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(rows)), x);
        const __m256i second = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(rows + 1)), x);
        const __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xD8);
        __m256i *total = (__m256i *)(sums + 8 * part);
        _mm256_storeu_si256(total, _mm256_add_epi32(_mm256_loadu_si256(total), pairs));
    }
#else
    for (int row = 0; row < PANEL; row++)
        for (int k = 0; k < QUAD; k++) sums[row] += (int32_t)w[row * QUAD + k] * codes[k];
#endif
}

#define TILE(ROWS, PANELS, UNROLL)                                                                                 \
    static void tile_##ROWS##_##PANELS(const uint8_t *weight, int64_t distance, const int8_t *x, int64_t stride,   \
                                       int64_t quads, int32_t *sums) {                                             \
        memset(sums, 0, ROWS * PANELS * PANEL * sizeof *sums);                                                     \
        for (int m = 0; m < ROWS; m++)                                                                             \
            for (int n = 0; n < PANELS; n++)                                                                       \
                for (int64_t k = 0; k < quads; k++)                                                                \
                    multiply_quad(weight + n * distance + k * QUAD_BYTES, x + m * stride + k * QUAD,               \
                                  sums + (m * PANELS + n) * PANEL);                                                \
    }

INLINE void sum_quads(const uint8_t *weight, int64_t distance, const Quad *quads, int64_t size, int64_t panels,
                      int32_t *sums) {
    memset(sums, 0, (size_t)panels * PANEL * sizeof *sums);
    for (int64_t i = 0; i < size; i++)
        for (int64_t n = 0; n < panels; n++)
            multiply_quad(weight + n * distance + quads[i].index * QUAD_BYTES, quads[i].codes, sums + n * PANEL);
}

INLINE void expand_group(const uint8_t *group, uint8_t *panel) {
    const uint16_t *factors = (const uint16_t *)group, *offsets = factors + PANEL;
    for (int pair = 0; pair < GROUP_QUADS / 2; pair++)
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < QUAD_BYTES; i++) {
                const uint32_t code = (group[64 + pair * QUAD_BYTES + i] >> (4 * half)) & 15;
                const uint32_t value = code * factors[i / QUAD] + offsets[i / QUAD];
                panel[(2 * pair + half) * QUAD_BYTES + i] = (uint8_t)(value >> 8);
            }
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
static Tile *const WIDE_TILES[] = {tile_1_2, tile_2_2, tile_3_2, tile_4_2, tile_5_2, tile_6_2, tile_7_2, tile_8_2, tile_9_2, tile_10_2, tile_11_2, tile_12_2};

// 16 tokens × 16 output features × 64 input features an instruction.
enum { TILE_TOKENS = 16, TILE_FEATURES = 64 };

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
#define tile_store(c, address)                                                                                     \
    for (int row_ = 0; row_ < 16; row_++) memcpy((address) + row_ * 16, unit.sums[c][row_], 64)
#define tile_multiply(c, a, b)                                                                                     \
    for (int m_ = 0; m_ < 16; m_++)                                                                                \
        for (int n_ = 0; n_ < 16; n_++)                                                                            \
            for (int k_ = 0; k_ < 64; k_++)                                                                        \
                unit.sums[c][m_][n_] +=                                                                            \
                    unit.bytes[a][m_][k_] * (int32_t)(uint8_t)unit.bytes[b][k_ / 4][n_ * 4 + k_ % 4]
INLINE void begin_tiles(void) {}
INLINE void end_tiles(void) {}
int enable_tiles(void) { return 0; }

#elif defined(__AMX_INT8__)

#include <sys/syscall.h>
#include <unistd.h>

#define HAS_TILES 1
#define tile_zero(c) _tile_zero(c)
#define tile_load(t, address, stride) _tile_loadd(t, address, stride)
#define tile_store(c, address) _tile_stored(c, address, 64)
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

// Linux gives a process the tile registers when it asks; 0 if it does.
int enable_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

#else

#define HAS_TILES 0
int enable_tiles(void) { return 0; }

#endif

// y[features] of token m, from the sums of its low terms.
INLINE void finish(const int32_t *sums, Codes codes, int64_t m, const uint8_t *weight, int64_t distance,
                   int64_t panels, const float *scale, const float *bias, int64_t features, float *y) {
    const Token token = codes.tokens[m];
    int32_t high_sums[WIDE * PANEL];
    if (token.num_quads != 0)
        sum_quads(weight, distance, codes.quads + m * (codes.stride / QUAD), token.num_quads, panels, high_sums);
    for (int64_t n = 0; n < panels * PANEL && n < features; n += LANES) {
        const Ints low = *(const Ints *)(sums + n) - 128 * token.low_sum;
        Floats value = __builtin_convertvector(low, Floats);
        if (token.num_quads != 0) {
            Ints high;
            memcpy(&high, high_sums + n, sizeof high);
            value = __builtin_convertvector(high - 128 * token.high_sum, Floats) * 128.0f + value;
        }
        value = value * token.scale * load(scale + n);
        if (bias != NULL) value += load(bias + n);
        store_part(y + n, value, features - n);
    }
}

// Room for expanded panels, one a thread, as large as any product has asked for.
static uint8_t *panel_room(int64_t size) {
    static _Thread_local uint8_t *room;
    static _Thread_local int64_t capacity;
    if (capacity < size) {
        free(room);
        room = aligned_alloc(64, (size_t)size);
        capacity = size;
    }
    return room;
}

INLINE const uint8_t *panels_at(const uint8_t *weight, int64_t kind, int64_t panel, int64_t panels, int64_t quads) {
    if (kind == WEIGHT_INT8) return weight + panel * quads * QUAD_BYTES;
    uint8_t *expanded = panel_room(WIDE * quads * QUAD_BYTES);
    const int64_t groups = quads / GROUP_QUADS;
    const uint8_t *group = weight + panel * groups * GROUP_BYTES;
    for (int64_t g = 0; g < panels * groups; g++, group += GROUP_BYTES) {
        // What the next panel starts with is on its way while this one is multiplied.
        for (int line = 0; line < GROUP_BYTES; line += 64)
            __builtin_prefetch(group + panels * groups * GROUP_BYTES + line, 0, 2);
        expand_group(group, expanded + g * GROUP_QUADS * QUAD_BYTES);
    }
    return expanded;
}

// rows, codes (4 words), weight, its kind, scale [N padded to 16] float, bias likewise or null, N,
// output [M, N] float
OPERATION(int8_matmul) {
    const int64_t rows = count(w[0]), kind = w[6].i, features = w[9].i;
    const Codes codes = {w[1].p, w[2].p, w[3].p, w[4].i};
    const uint8_t *weight = w[5].p;
    const float *scale = w[7].p, *bias = w[8].p;
    float *output = w[10].p;
    const int64_t quads = codes.stride / QUAD, distance = quads * QUAD_BYTES;
    const int64_t num_panels = (features + PANEL - 1) / PANEL;
    const int is_narrow = rows <= FEW_TOKENS;
    const int64_t width = is_narrow ? NARROW_TASK : WIDE;
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK, tasks = (num_panels + width - 1) / width * chunks;
#if HAS_TILES
    if (rows >= TILE_TOKENS) begin_tiles();
#endif
    FOR_TASKS(task, tasks) {
        const int64_t first = task / chunks * width, last = first + width < num_panels ? first + width : num_panels;
        const int64_t from = task % chunks * CHUNK, to = from + CHUNK < rows ? from + CHUNK : rows;
        const int64_t step = is_narrow || last - first < WIDE ? 1 : WIDE;
        for (int64_t panel = first; panel < last; panel += step) {
            const uint8_t *w = panels_at(weight, kind, panel, step, quads);
            _Alignas(64) int32_t sums[32 * 2 * PANEL];
            const float *b = bias == NULL ? NULL : bias + panel * PANEL;
            const float *s = scale + panel * PANEL;
            float *y = output + panel * PANEL;
            const int64_t left = features - panel * PANEL;
            int64_t m = from;
#if HAS_TILES
            for (; m + TILE_TOKENS <= to; m += TILE_TOKENS) {
                // One or two tiles of tokens against two of output features, so that loads serve two products.
                const int is_pair = m + 2 * TILE_TOKENS <= to;
                for (int64_t n = 0; n < step; n += 2) {
                    const int has_second = n + 1 < step;
                    const uint8_t *left_panel = w + n * distance, *right_panel = left_panel + distance;
                    const int8_t *x = codes.low + m * codes.stride, *x_below = x + TILE_TOKENS * codes.stride;
                    tile_zero(0);
                    tile_zero(1);
                    tile_zero(2);
                    tile_zero(3);
                    for (int64_t k = 0; k < codes.stride; k += TILE_FEATURES) {
                        tile_load(4, x + k, codes.stride);
                        tile_load(6, left_panel + k * PANEL, QUAD_BYTES);
                        tile_multiply(0, 4, 6);
                        if (has_second) {
                            tile_load(7, right_panel + k * PANEL, QUAD_BYTES);
                            tile_multiply(1, 4, 7);
                        }
                        if (is_pair) {
                            tile_load(5, x_below + k, codes.stride);
                            tile_multiply(2, 5, 6);
                            if (has_second) tile_multiply(3, 5, 7);
                        }
                    }
                    tile_store(0, sums);
                    tile_store(1, sums + 256);
                    tile_store(2, sums + 512);
                    tile_store(3, sums + 768);
                    for (int64_t i = 0; i < (is_pair ? 2 : 1) * TILE_TOKENS; i++)
                        for (int64_t j = 0; j <= has_second; j++)
                            finish(sums + (i / TILE_TOKENS * 2 + j) * 256 + i % TILE_TOKENS * PANEL, codes, m + i,
                                   w + (n + j) * distance, distance, 1, s + (n + j) * PANEL,
                                   b == NULL ? NULL : b + (n + j) * PANEL, left - (n + j) * PANEL,
                                   y + (m + i) * features + (n + j) * PANEL);
                }
                if (is_pair) m += TILE_TOKENS;
            }
#endif
            const int64_t most = step == 1 ? FEW_TOKENS : MAX_ROWS;
            while (m < to) {
                // Tiles of about the same size.
                const int64_t size = (to - m + (to - m + most - 1) / most - 1) / ((to - m + most - 1) / most);
                Tile *tile = (step == 1 ? NARROW_TILES : WIDE_TILES)[size - 1];
                tile(w, distance, codes.low + m * codes.stride, codes.stride, quads, sums);
                for (int64_t i = 0; i < size; i++)
                    finish(sums + i * step * PANEL, codes, m + i, w, distance, step, s, b, left,
                           y + (m + i) * features);
                m += size;
            }
        }
    }
#if HAS_TILES
    if (rows >= TILE_TOKENS) end_tiles();
#endif
}

// Float products: panels of 16 output features │ input features │ 16 floats. Each output is one chain of fused
// products over the input features in their order.
#define FLOAT_TILE(ROWS, PANELS)                                                                                   \
    static void float_tile_##ROWS##_##PANELS(const float *weight, int64_t distance, const float *x, int64_t stride, \
                                             int64_t size, Floats *total) {                                        \
        Floats sums[ROWS][PANELS];                                                                                 \
        _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++)                                                     \
            _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++) sums[m][n] = (Floats){0};                     \
        for (int64_t k = 0; k < size; k++) {                                                                       \
            Floats w[PANELS];                                                                                      \
            _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                               \
                w[n] = load(weight + n * distance + k * PANEL);                                                    \
            _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++) {                                               \
                const Floats v = fill(x[m * stride + k]);                                                          \
                _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                           \
                    sums[m][n] = multiply_add(w[n], v, sums[m][n]);                                                \
            }                                                                                                      \
        }                                                                                                          \
        _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++)                                                     \
            _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++) total[m * PANELS + n] = sums[m][n];           \
    }

typedef void FloatTile(const float *, int64_t, const float *, int64_t, int64_t, Floats *);

FLOAT_TILE(1, 1)
FLOAT_TILE(2, 1)
FLOAT_TILE(3, 1)
FLOAT_TILE(4, 1)
FLOAT_TILE(5, 1)
FLOAT_TILE(6, 1)
FLOAT_TILE(1, 4)
FLOAT_TILE(2, 4)
FLOAT_TILE(3, 4)
FLOAT_TILE(4, 4)
FLOAT_TILE(5, 4)
FLOAT_TILE(6, 4)

enum { FLOAT_WIDE = 4, FLOAT_ROWS = 6 };  // as above

static FloatTile *const FLOAT_TILES[2][FLOAT_ROWS] = {
    {float_tile_1_1, float_tile_2_1, float_tile_3_1, float_tile_4_1, float_tile_5_1, float_tile_6_1},
    {float_tile_1_4, float_tile_2_4, float_tile_3_4, float_tile_4_4, float_tile_5_4, float_tile_6_4},
};

// rows, x [M, K] float, K, weight packed, bias [N padded to 16] float or null, N, output [M, N] float
OPERATION(float_matmul) {
    const int64_t rows = count(w[0]), size = w[2].i, features = w[5].i, distance = size * PANEL;
    const int64_t num_panels = (features + PANEL - 1) / PANEL;
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK, tasks = (num_panels + FLOAT_WIDE - 1) / FLOAT_WIDE * chunks;
    FOR_TASKS(task, tasks) {
        const int64_t first = task / chunks * FLOAT_WIDE, last = first + FLOAT_WIDE < num_panels ? first + FLOAT_WIDE : num_panels;
        const int64_t from = task % chunks * CHUNK, to = from + CHUNK < rows ? from + CHUNK : rows;
        const int64_t step = last - first < FLOAT_WIDE ? 1 : FLOAT_WIDE;
        for (int64_t panel = first; panel < last; panel += step) {
            for (int64_t m = from; m < to;) {
                const int64_t most = to - m < FLOAT_ROWS ? to - m : FLOAT_ROWS;
                Floats sums[FLOAT_ROWS * FLOAT_WIDE];
                FLOAT_TILES[step == FLOAT_WIDE][most - 1]((const float *)w[3].p + panel * distance, distance,
                                                    (const float *)w[1].p + m * size, size, size, sums);
                for (int64_t i = 0; i < most * step; i++) {
                    const int64_t n = (panel + i % step) * PANEL;
                    const Floats value = w[4].p == NULL ? sums[i] : sums[i] + load((const float *)w[4].p + n);
                    if (n < features) store_part((float *)w[6].p + (m + i / step) * features + n, value, features - n);
                }
                m += most;
            }
        }
    }
}
