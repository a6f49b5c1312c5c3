// Products of int8 activations (see kernels.h) with int8 weights in panels (see int8_tiles.h).
//
// Sparse weights are multiplied with few tokens as they lie, see sparse_tiles.h. Codebooks' weights lie in memory as
// nibbles and are expanded to such panels where they are used: 4 bits a weight and a table of codebooks to read instead
// of 8, 4.25 with a factor a block.

#include "term_sums.h"
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum {
    BLOCK_QUADS = 16,  // of a codebook's weight: 64 input features
    BLOCK_BYTES = BLOCK_QUADS * QUAD_BYTES / 2,
    VALUES = 16,  // in a codebook
    TABLES_BYTES = PANEL * VALUES,
    FACTORS_BYTES = PANEL * (int)sizeof(int16_t),
    LINE = 64,
};

// Codebooks are tables of sixteen bytes, one an output, looked up by a shuffle of 16 bytes. Of the four vectors that a
// panel's tables are, or its codes of 16 input features, the i-th has outputs i, 4 + i, 8 + i and 12 + i.

#if defined(__AVX512BW__)

enum { OUTPUTS = 4 };  // in a register
typedef __m512i Vector;
#define VECTOR(operation) _mm512_##operation
#define VECTOR_BITS(operation) _mm512_##operation##_si512

INLINE Vector spread_values(const int16_t *values) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)values));
}

// Each output's factor for the eight words that its part of a register has.
INLINE Vector spread_factors(const int16_t *factors, int first) {
    const int64_t four = 0x0004000400040004;
    const __m512i quarters = _mm512_set_epi64(3 * four, 3 * four, 2 * four, 2 * four, four, four, 0, 0);
    const __m512i outputs = _mm512_add_epi16(quarters, _mm512_set1_epi16((int16_t)first));
    return _mm512_permutexvar_epi16(outputs, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)factors)));
}

#elif defined(__SSSE3__)

enum { OUTPUTS = 1 };
typedef __m128i Vector;
#define VECTOR(operation) _mm_##operation
#define VECTOR_BITS(operation) _mm_##operation##_si128

INLINE Vector spread_values(const int16_t *values) { return _mm_loadu_si128((const __m128i *)values); }

INLINE Vector spread_factors(const int16_t *factors, int first) { return _mm_set1_epi16(factors[first]); }

#endif

// The tables of one block: (values * factor / 2^15) / 256 + 128, rounded both times.
INLINE void make_tables(const int16_t *values, const int16_t *factors, uint8_t *tables) {
#if defined(__SSSE3__)
    const Vector low = spread_values(values), high = spread_values(values + VALUES / 2);
    const Vector step = VECTOR(set1_epi16)(1 << 7), signs = VECTOR(set1_epi8)((char)0x80);
    for (int i = 0; i < QUAD; i++)
        for (int part = 0; part < PANEL / QUAD; part += OUTPUTS) {
            const Vector factor = spread_factors(factors, QUAD * part + i);
            const Vector bytes = VECTOR(packs_epi16)(VECTOR(mulhrs_epi16)(VECTOR(mulhrs_epi16)(low, factor), step),
                                                     VECTOR(mulhrs_epi16)(VECTOR(mulhrs_epi16)(high, factor), step));
            VECTOR_BITS(storeu)((void *)(tables + (PANEL / QUAD * i + part) * VALUES), VECTOR_BITS(xor)(bytes, signs));
        }
#else
    for (int n = 0; n < PANEL; n++)
        for (int i = 0; i < VALUES; i++) {
            const int32_t value = (values[i] * factors[n] + (1 << 14)) >> 15;
            tables[(n % QUAD * (PANEL / QUAD) + n / QUAD) * VALUES + i] = (uint8_t)(((value + 128) >> 8) + 128);
        }
#endif
}

// 64 input features in a panel.
INLINE void expand_block(const uint8_t *tables, const uint8_t *block, uint8_t *panel) {
    for (int quarter = 0; quarter < 4; quarter++) {
        const uint8_t *codes = block + quarter / 2 * (BLOCK_BYTES / 2);
        const int shift = quarter % 2 * 4;
        uint8_t *output = panel + quarter * QUAD * QUAD_BYTES;
#if defined(__SSSE3__)
        for (int part = 0; part < PANEL / QUAD; part += OUTPUTS) {
            Vector v[QUAD];
            for (int i = 0; i < QUAD; i++) {
                const int place = (PANEL / QUAD * i + part) * VALUES;
                const Vector both = VECTOR_BITS(loadu)((const void *)(codes + place));
                const Vector own = VECTOR_BITS(and)(VECTOR(srli_epi16)(both, shift), VECTOR(set1_epi8)(15));
                v[i] = VECTOR(shuffle_epi8)(VECTOR_BITS(loadu)((const void *)(tables + place)), own);
            }
            // Four quads of each of four outputs into four outputs of each of four quads.
            const Vector a = VECTOR(unpacklo_epi32)(v[0], v[1]), b = VECTOR(unpacklo_epi32)(v[2], v[3]);
            const Vector c = VECTOR(unpackhi_epi32)(v[0], v[1]), d = VECTOR(unpackhi_epi32)(v[2], v[3]);
            const Vector quads[QUAD] = {VECTOR(unpacklo_epi64)(a, b), VECTOR(unpackhi_epi64)(a, b),
                                        VECTOR(unpacklo_epi64)(c, d), VECTOR(unpackhi_epi64)(c, d)};
            for (int i = 0; i < QUAD; i++)
                VECTOR_BITS(storeu)((void *)(output + i * QUAD_BYTES + part * VALUES), quads[i]);
        }
#else
        for (int n = 0; n < PANEL; n++)
            for (int k = 0; k < VALUES; k++) {
                const int place = (n % QUAD * (PANEL / QUAD) + n / QUAD) * VALUES;
                output[k / QUAD * QUAD_BYTES + n * QUAD + k % QUAD] = tables[place + ((codes[place + k] >> shift) & 15)];
            }
#endif
    }
}

// Linux gives a process the tile registers when it asks; 0 if it does, or there is nothing to ask for.
int enable_tiles(void) {
#ifdef __AMX_INT8__
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
#else
    return 0;
#endif
}

// What a codebook's panel starts with: the tables; or the values of all of them, and each block's factors.
INLINE int64_t header_bytes(int64_t kind, int64_t blocks) {
    return kind == WEIGHT_CODEBOOK ? TABLES_BYTES : LINE + (blocks * FACTORS_BYTES + LINE - 1) / LINE * LINE;
}

INLINE void expand_blocks(const uint8_t *weight, int64_t kind, int64_t blocks, uint8_t *panel) {
    const int64_t header = header_bytes(kind, blocks), all = header + blocks * BLOCK_BYTES;
    uint8_t own_tables[TABLES_BYTES] __attribute__((aligned(64)));
    for (int line = 0; line < header; line += LINE) __builtin_prefetch(weight + all + line, 0, 2);
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *tables = weight, *block = weight + header + b * BLOCK_BYTES;
        for (int line = 0; line < BLOCK_BYTES; line += LINE) __builtin_prefetch(block + all + line, 0, 2);
        if (kind == WEIGHT_SCALED_CODEBOOK) {
            const uint8_t *factors = weight + LINE + b * FACTORS_BYTES;
            make_tables((const int16_t *)weight, (const int16_t *)factors, own_tables);
            tables = own_tables;
        }
        expand_block(tables, block, panel + b * BLOCK_QUADS * QUAD_BYTES);
    }
}

// Panels that are ready for products.
INLINE const uint8_t *panels_at(const uint8_t *weight, int64_t kind, int64_t panel, int64_t panels, int64_t quads) {
    static _Thread_local Room expansion;
    if (kind == WEIGHT_INT8) return weight + panel * quads * QUAD_BYTES;
    if (kind == WEIGHT_SPARSE) return expanded_panels(weight + panel * sparse_bytes(8, quads), panels, quads);
    uint8_t *expanded = room(&expansion, WIDE * quads * QUAD_BYTES);
    const int64_t blocks = quads / BLOCK_QUADS, bytes = header_bytes(kind, blocks) + blocks * BLOCK_BYTES;
    for (int64_t p = 0; p < panels; p++)
        expand_blocks(weight + (panel + p) * bytes, kind, blocks, expanded + p * quads * QUAD_BYTES);
    return expanded;
}

// What a task multiplies activations with, and where the results go.
typedef struct {
    const uint8_t *panels;
    int64_t distance;
    const float *scale, *bias;  // of the panels' outputs; bias may be null
    int64_t features;           // outputs that there are from the first panel on
    float *output;              // of the first panel and token 0
    int64_t stride;
    int is_sparse;  // the panel, one, lies as it is stored
} Product;

// Tokens from … to - 1 with one panel or two; dense: their high terms with all zeros, or null.
INLINE void multiply(const Product *product, int num_panels, Codes codes, int64_t from, int64_t to,
                     const int8_t *dense) {
    _Alignas(64) int32_t low[MOST_ROWS * WIDE * PANEL], high[MOST_ROWS * WIDE * PANEL];
    for (int64_t m = from, size; m < to; m += size) {
        const int8_t *high_terms = dense == NULL ? NULL : dense + (m - from) * codes.stride;
        if (product->is_sparse) size = sum_sparse_terms(product->panels, num_panels, codes, m, to, low, high);
        else size = sum_terms(product->panels, product->distance, num_panels, codes, m, to, high_terms, low, high);
        for (int64_t i = 0; i < size; i++) {
            const float token_scale = codes.tokens[m + i].scale;
            float *y = product->output + (m + i) * product->stride;
            EACH(part, num_panels * PARTS) {
                const int64_t n = part * LANES, place = i * num_panels * PANEL + n;
                const Floats low_sum = to_floats((Ints)load((const float *)low + place));
                const Floats high_sum = to_floats((Ints)load((const float *)high + place));
                Floats value = (high_sum * 128.0f + low_sum) * token_scale * load(product->scale + n);
                if (product->bias != NULL) value += load(product->bias + n);
                store_part(y + n, value, product->features - n);
            }
        }
    }
}

OPERATION(int8_matmul) {
    const int64_t rows = count(args->num_rows), kind = args->weight_kind, features = args->features;
    const Codes codes = args->codes;
    const float *scale = args->scale, *bias = args->bias;
    const int64_t quads = codes.stride / QUAD, num_panels = (features + PANEL - 1) / PANEL;
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK, tasks_a_chunk = (num_panels + WIDE - 1) / WIDE;
    int64_t chunk_of_high __attribute__((unused)) = -1;
    const int8_t *high = NULL;
    begin_tiles();
    FOR_TASKS(task, tasks_a_chunk * chunks) {
        const int64_t first = task % tasks_a_chunk * WIDE, last = smaller(first + WIDE, num_panels);
        const int64_t chunk = task / tasks_a_chunk, from = chunk * CHUNK, to = smaller(from + CHUNK, rows);
#if HAS_TILES
        if (chunk != chunk_of_high) high = to - from >= UNIT_ROWS ? dense_high_terms(codes, from, to) : NULL;
        chunk_of_high = chunk;
#endif
        const int64_t step = rows <= FEW_ROWS || last - first < WIDE ? 1 : WIDE;
        const int is_sparse = kind == WEIGHT_SPARSE && rows <= FEW_ROWS;
        for (int64_t panel = first; panel < last; panel += step) {
            const Product product = {
                .panels = is_sparse ? args->weight + panel * sparse_bytes(8, quads)
                                    : panels_at(args->weight, kind, panel, step, quads),
                .distance = quads * QUAD_BYTES,
                .scale = scale + panel * PANEL,
                .bias = bias == NULL ? NULL : bias + panel * PANEL,
                .features = features - panel * PANEL,
                .output = args->output + panel * PANEL,
                .stride = features,
                .is_sparse = is_sparse,
            };
            if (step == 1) multiply(&product, 1, codes, from, to, high);
            else multiply(&product, WIDE, codes, from, to, high);
        }
    }
    end_tiles();
}

// Float products: panels of 16 output features │ input features │ 16 floats. Each output is one chain of fused
// products over the input features in their order.
#define FLOAT_TILE(ROWS, PANELS)                                                                                   \
    static void float_tile_##ROWS##_##PANELS(const float *weight, int64_t distance, const float *x, int64_t stride, \
                                             int64_t size, float *total) {                                         \
        /* As many panels at a time as there are registers for. */                                                 \
        enum { SOME = LANES == 16 ? PANELS : 1 };                                                                  \
        for (int panel = 0; panel < PANELS; panel += SOME) {                                                       \
            Floats sums[ROWS][SOME][PARTS];                                                                        \
            EACH(m, ROWS) EACH(n, SOME) EACH(p, PARTS) sums[m][n][p] = (Floats){0};                                \
            for (int64_t k = 0; k < size; k++) {                                                                   \
                Floats w[SOME][PARTS];                                                                             \
                EACH(n, SOME) EACH(p, PARTS) w[n][p] = load(weight + (panel + n) * distance + k * PANEL + p * LANES); \
                EACH(m, ROWS) {                                                                                    \
                    const Floats v = fill(x[m * stride + k]);                                                      \
                    EACH(n, SOME) EACH(p, PARTS) sums[m][n][p] = multiply_add(w[n][p], v, sums[m][n][p]);          \
                }                                                                                                  \
            }                                                                                                      \
            EACH(m, ROWS) EACH(n, SOME) EACH(p, PARTS)                                                             \
                store(total + (m * PANELS + panel + n) * PANEL + p * LANES, sums[m][n][p]);                        \
        }                                                                                                          \
    }

typedef void FloatTile(const float *, int64_t, const float *, int64_t, int64_t, float *);

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

OPERATION(float_matmul) {
    const int64_t rows = count(args->num_rows), size = args->size, features = args->features, distance = size * PANEL;
    const int64_t num_panels = (features + PANEL - 1) / PANEL;
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK, tasks = (num_panels + FLOAT_WIDE - 1) / FLOAT_WIDE * chunks;
    FOR_TASKS(task, tasks) {
        const int64_t first = task / chunks * FLOAT_WIDE, last = first + FLOAT_WIDE < num_panels ? first + FLOAT_WIDE : num_panels;
        const int64_t from = task % chunks * CHUNK, to = from + CHUNK < rows ? from + CHUNK : rows;
        const int64_t step = last - first < FLOAT_WIDE ? 1 : FLOAT_WIDE;
        for (int64_t panel = first; panel < last; panel += step) {
            for (int64_t m = from; m < to;) {
                const int64_t most = to - m < FLOAT_ROWS ? to - m : FLOAT_ROWS;
                float sums[FLOAT_ROWS * FLOAT_WIDE * PANEL];
                FLOAT_TILES[step == FLOAT_WIDE][most - 1](args->weight + panel * distance, distance,
                                                          args->x + m * size, size, size, sums);
                for (int64_t i = 0; i < most; i++)
                    for (int64_t k = 0; k < step * PANEL; k += LANES) {
                        const int64_t n = panel * PANEL + k;
                        Floats value = load(sums + i * step * PANEL + k);
                        if (args->bias != NULL) value += load(args->bias + n);
                        store_part(args->output + (m + i) * features + n, value, features - n);
                    }
                m += most;
            }
        }
    }
}

OPERATION(float_rows) {
    const int64_t rows = count(args->num_rows), size = args->size;
    const float factor = (float)args->factor;
    FOR_ROWS(m, rows) {
        const int64_t n = args->indices[m];
        const float *weight = args->weight + n / PANEL * size * PANEL + n % PANEL;
        float *y = args->output + m * size;
        for (int64_t k = 0; k < size; k++) y[k] = weight[k * PANEL] * factor;
    }
}
