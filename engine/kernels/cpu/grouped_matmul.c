// Products of int8 activations with integer weights, either of them or both in groups along the input features: each
// group has an exact sum and a scale of its own, and they are added in order (engine/kernels/matmul/cpu_grouped.py).

#include "group_tiles.h"

enum {
    CHUNK = 192,      // tokens in a task
    MOST_TASKS = 64,  // of a chunk: more would cut what a thread reads into short runs
    PREFETCHED = 2048,  // bytes of codes that are on their way while others are multiplied with a few tokens
};

// A number for each group of 16 outputs.
typedef struct {
    const Half *values;   // [panels, groups, 16], with steps [panels, blocks, 16]; null: there are none
    const int8_t *steps;  // [panels, groups, 16]: the group's number in steps of its block's value, or null
} Numbers;

// Some panels of weights.
typedef struct {
    const uint8_t *panels, *table;
    int64_t distance;  // bytes from a panel to the next one
    int32_t offset;
    Numbers scale, minimum;              // no scale: all of them one; no minimum: zero
    float centre;                        // not zero: a group's minimum is so many times its scale below zero
    int64_t quads, group_quads, groups;  // group_quads is a power of two
    int64_t blocks;
    int block_shift;  // a block has 2^block_shift groups
    // For many tokens: the numbers as floats, [groups, num_panels, PANEL]; no minimums: all of them zero.
    const float *scales, *minimums;
    int64_t num_panels;
} Weights;

// Some tokens' terms.
typedef struct {
    const int8_t *codes;
    int64_t stride;
    const int32_t *starts;  // [groups, CHUNK]: what takes the weights' offset back
    const float *sums;      // [groups, CHUNK] of the codes
    const float *scale;     // [rows, groups], or null: all of them one
} Terms;

// A quad of high terms of one of many tokens that are multiplied together.
typedef struct {
    int32_t token, quad;
    int8_t codes[QUAD];
} High;

// Those of many tokens, which are multiplied group by group while a group's codes are at hand.
typedef struct {
    const High *highs;  // by group, then by token
    const int32_t *ends;  // [groups]: where each group's end; null: there are none
    const int32_t *starts;
    const float *sums;  // as `Terms` has them
} HighTerms;

// A part's; `panel` counts from the weights' first.
INLINE Floats group_numbers(const Weights *weights, Numbers numbers, int64_t panel, int64_t group, int part) {
    const int64_t place = (panel * weights->groups + group) * PANEL + part * LANES;
    if (numbers.steps == NULL) return load_halves(numbers.values + place);
    const int64_t block = panel * weights->blocks + (group >> weights->block_shift);
    // Exact: 11 bits times 7.
    return to_floats(widen_bytes(numbers.steps + place)) * load_halves(numbers.values + block * PANEL + part * LANES);
}

// Of the first of some panels whose numbers are floats already.
INLINE Floats expanded_numbers(const Weights *weights, const float *numbers, int64_t panel, int64_t group, int part) {
    return load(numbers + (group * weights->num_panels + panel) * PANEL + part * LANES);
}

INLINE Floats group_scale(const Weights *weights, int64_t panel, int64_t group, int part) {
    if (weights->scales != NULL) return expanded_numbers(weights, weights->scales, panel, group, part);
    if (weights->scale.values == NULL) return fill(1.0f);
    return group_numbers(weights, weights->scale, panel, group, part);
}

INLINE int has_minimum(const Weights *weights) { return weights->minimum.values != NULL || weights->centre != 0; }

// scale: the group's.
INLINE Floats group_minimum(const Weights *weights, int64_t panel, int64_t group, int part, Floats scale) {
    if (weights->minimums != NULL) return expanded_numbers(weights, weights->minimums, panel, group, part);
    return weights->centre != 0 ? scale * -weights->centre : group_numbers(weights, weights->minimum, panel, group, part);
}

// What follows some bytes so far behind; beyond the last panel, nothing comes of it.
INLINE void prefetch(const uint8_t *codes, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes + i + PREFETCHED, 0, 3);
}

// Of few tokens, with a panel as it lies in memory.
#define FEW_TILE(KIND, ROWS)                                                                                       \
    static void KIND##_few_##ROWS(const Weights *weights, const Terms *terms, Floats *output) {                    \
        const int64_t groups = weights->groups, stride = terms->stride;                                            \
        const uint8_t *table = weights->table;                                                                     \
        Floats totals[ROWS][PARTS];                                                                                \
        EACH(m, ROWS) EACH(p, PARTS) totals[m][p] = (Floats){0};                                                   \
        for (int64_t g = 0; g < groups; g++) {                                                                     \
            Ints sums[ROWS][PARTS];                                                                                \
            EACH(m, ROWS) EACH(p, PARTS) sums[m][p] = fill_ints(terms->starts[g * CHUNK + m]);                     \
            const int64_t end = smaller((g + 1) * weights->group_quads, weights->quads);                           \
            const int64_t start = g * weights->group_quads;                                                        \
            prefetch(weights->panels + bytes_of(KIND, start), bytes_of(KIND, end - start));                        \
            for (int64_t k = start; k < end; k += unit_quads(KIND))                                                \
                EACH(u, unit_quads(KIND) / 2) EACH(p, PARTS) {                                                     \
                    const uint8_t *unit = weights->panels + bytes_of(KIND, k);                                     \
                    const PartCodes first = load_quad(KIND, table, unit, 2 * u, p);                                \
                    const PartCodes second = load_quad(KIND, table, unit, 2 * u + 1, p);                           \
                    EACH(m, ROWS) sums[m][p] = add_pair(KIND, sums[m][p], first, second,                           \
                                                        terms->codes + m * stride + k * QUAD + u * PAIR);          \
                }                                                                                                  \
            EACH(p, PARTS) {                                                                                       \
                const Floats scale = group_scale(weights, 0, g, p);                                                \
                EACH(m, ROWS) {                                                                                    \
                    const float own = terms->scale == NULL ? 1.0f : terms->scale[m * groups + g];                  \
                    totals[m][p] += to_floats(sums[m][p]) * own * scale;                                           \
                }                                                                                                  \
                if (!has_minimum(weights)) continue;                                                               \
                const Floats minimum = group_minimum(weights, 0, g, p, scale);                                     \
                EACH(m, ROWS) totals[m][p] += terms->sums[g * CHUNK + m] * minimum;                                \
            }                                                                                                      \
        }                                                                                                          \
        EACH(m, ROWS) EACH(p, PARTS) output[m * PARTS + p] = totals[m][p];                                         \
    }

typedef void GroupTile(const Weights *, const Terms *, Floats *);

#if defined(__AVX2__)

// Sums of sparse codes over 16 quads, of at most 32 * 8 * 127, fit into 16 bits: all 16 outputs' are in a register.
enum { SPARSE_QUADS = 16 };

#define SPARSE_FEW_TILE(ROWS)                                                                                      \
    static void SPARSE_few_##ROWS(const Weights *weights, const Terms *terms, Floats *output) {                    \
        const int64_t groups = weights->groups, stride = terms->stride;                                            \
        Floats totals[ROWS][PARTS];                                                                                \
        EACH(m, ROWS) EACH(p, PARTS) totals[m][p] = (Floats){0};                                                   \
        for (int64_t g = 0; g < groups; g++) {                                                                     \
            Ints products[ROWS][PARTS];                                                                            \
            EACH(m, ROWS) EACH(p, PARTS) products[m][p] =                                                          \
                fill_ints(SPARSE_CENTRE * (int32_t)terms->sums[g * CHUNK + m]);                                   \
            const int64_t end = smaller((g + 1) * weights->group_quads, weights->quads);                           \
            for (int64_t k = g * weights->group_quads, stop; k < end; k = stop) {                                  \
                __m256i sums[ROWS];                                                                                \
                EACH(m, ROWS) sums[m] = _mm256_setzero_si256();                                                    \
                stop = smaller(k + SPARSE_QUADS, end);                                                             \
                for (int64_t i = k; i < stop; i += SPARSE_UNIT) {                                                  \
                    const uint8_t *unit = weights->panels + bytes_of(SPARSE, i);                                   \
                    prefetch(unit, bytes_of(SPARSE, SPARSE_UNIT));                                                 \
                    EACH(quad, SPARSE_UNIT) {                                                                      \
                        const __m256i kept = load_kept(unit, 4, quad), places = load_places(unit, quad);           \
                        EACH(m, ROWS) {                                                                            \
                            const int8_t *x = terms->codes + m * stride + (i + quad) * QUAD;                       \
                            sums[m] = _mm256_add_epi16(sums[m], multiply_centred(kept, places, x));                \
                        }                                                                                          \
                    }                                                                                              \
                }                                                                                                  \
                EACH(m, ROWS) EACH(p, PARTS) products[m][p] += (Ints)widen_sums(sums[m], p);                       \
            }                                                                                                      \
            EACH(p, PARTS) {                                                                                       \
                const Floats scale = group_scale(weights, 0, g, p), minimum = scale * -weights->centre;            \
                EACH(m, ROWS) {                                                                                    \
                    totals[m][p] += __builtin_convertvector(products[m][p], Floats) * scale;                       \
                    totals[m][p] += terms->sums[g * CHUNK + m] * minimum;                                         \
                }                                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
        EACH(m, ROWS) EACH(p, PARTS) output[m * PARTS + p] = totals[m][p];                                         \
    }

SPARSE_FEW_TILE(1)
SPARSE_FEW_TILE(2)
SPARSE_FEW_TILE(3)
SPARSE_FEW_TILE(4)

#endif

#define FEW_TILES_OF(KIND) FEW_TILE(KIND, 1) FEW_TILE(KIND, 2) FEW_TILE(KIND, 3) FEW_TILE(KIND, 4)
#define FEW_OF(KIND) [KIND] = {KIND##_few_1, KIND##_few_2, KIND##_few_3, KIND##_few_4}

FEW_TILES_OF(BYTES)
FEW_TILES_OF(NIBBLES)
FEW_TILES_OF(TABLE)
FEW_TILES_OF(FIVES)
FEW_TILES_OF(SIXES)
#if !defined(__AVX2__)
FEW_TILES_OF(SPARSE)
#endif

static GroupTile *const FEW_TILES[][FEW_ROWS] = {
    FEW_OF(BYTES), FEW_OF(NIBBLES), FEW_OF(TABLE), FEW_OF(FIVES), FEW_OF(SIXES), FEW_OF(SPARSE),
};

// A group's products with the high terms that there are.
INLINE void add_high_group(int kind, int num_panels, const Weights *weights, const HighTerms *high, int64_t group,
                           Floats *totals) {
    const High *one = high->highs + (group == 0 ? 0 : high->ends[group - 1]), *end = high->highs + high->ends[group];
    while (one < end) {
        const int32_t token = one->token;
        Ints products[WIDE][PARTS];
        EACH(n, num_panels) EACH(p, PARTS) products[n][p] = fill_ints(high->starts[group * CHUNK + token]);
        do {
            const uint8_t *quad = weights->panels + one->quad * QUAD_BYTES;
            EACH(n, num_panels) EACH(p, PARTS) {
                const PartCodes codes = load_codes(quad + n * weights->distance + p * QUAD * LANES);
                products[n][p] = add_quad_of_part(kind, products[n][p], codes, one->codes);
            }
        } while (++one < end && one->token == token);
        EACH(n, num_panels) EACH(p, PARTS) {
            Floats *total = totals + (token * num_panels + n) * PARTS + p;
            const int64_t place = (group * num_panels + n) * PANEL + p * LANES;
            *total += to_floats(products[n][p]) * load(weights->scales + place);
            if (weights->minimums != NULL)
                *total += high->sums[group * CHUNK + token] * load(weights->minimums + place);
        }
    }
}

// Of many tokens, with panels of bytes and numbers that are floats: the registers are the sums', and totals lie in
// memory, as a group's products take longer than that.
#define MANY_TILE(KIND, ROWS, PANELS)                                                                              \
    static void KIND##_many_##ROWS##_##PANELS(const Weights *weights, const Terms *terms, const HighTerms *high,   \
                                              Floats *totals, Floats *high_totals) {                               \
        const int64_t groups = weights->groups, distance = weights->distance, stride = terms->stride;              \
        EACH(i, ROWS * PANELS * PARTS) totals[i] = high_totals[i] = (Floats){0};                                   \
        for (int64_t g = 0; g < groups; g++) {                                                                     \
            Ints sums[ROWS][PANELS][PARTS];                                                                        \
            EACH(m, ROWS) EACH(n, PANELS) EACH(p, PARTS) sums[m][n][p] = fill_ints(terms->starts[g * CHUNK + m]); \
            const int64_t end = smaller((g + 1) * weights->group_quads, weights->quads);                           \
            for (int64_t k = g * weights->group_quads; k < end; k += 2) {                                          \
                PartCodes first[PANELS][PARTS], second[PANELS][PARTS];                                             \
                EACH(n, PANELS) EACH(p, PARTS) {                                                                   \
                    const uint8_t *pair = weights->panels + n * distance + k * QUAD_BYTES + p * QUAD * LANES;      \
                    first[n][p] = load_codes(pair);                                                                \
                    second[n][p] = load_codes(pair + QUAD_BYTES);                                                  \
                }                                                                                                  \
                EACH(m, ROWS) EACH(n, PANELS) EACH(p, PARTS)                                                       \
                    sums[m][n][p] = add_pair(KIND, sums[m][n][p], first[n][p], second[n][p],                       \
                                             terms->codes + m * stride + k * QUAD);                                \
            }                                                                                                      \
            EACH(n, PANELS) EACH(p, PARTS) {                                                                       \
                const Floats scale = load(weights->scales + (g * PANELS + n) * PANEL + p * LANES);                 \
                Floats products[ROWS];                                                                             \
                EACH(m, ROWS) products[m] = to_floats(sums[m][n][p]);                                              \
                if (terms->scale != NULL) EACH(m, ROWS) products[m] *= terms->scale[m * groups + g];               \
                EACH(m, ROWS) products[m] = totals[(m * PANELS + n) * PARTS + p] + products[m] * scale;            \
                if (weights->minimums != NULL) {                                                                   \
                    const Floats minimum = load(weights->minimums + (g * PANELS + n) * PANEL + p * LANES);         \
                    EACH(m, ROWS) products[m] += terms->sums[g * CHUNK + m] * minimum;                            \
                }                                                                                                  \
                EACH(m, ROWS) totals[(m * PANELS + n) * PARTS + p] = products[m];                                  \
            }                                                                                                      \
            if (high->ends != NULL) add_high_group(KIND, PANELS, weights, high, g, high_totals);                   \
        }                                                                                                          \
    }

typedef void ManyTile(const Weights *, const Terms *, const HighTerms *, Floats *, Floats *);

#define MANY_TILES_OF(KIND, PANELS)                                                                                \
    MANY_TILE(KIND, 1, PANELS) MANY_TILE(KIND, 2, PANELS) MANY_TILE(KIND, 3, PANELS) MANY_TILE(KIND, 4, PANELS)
#define MANY_OF(KIND, PANELS)                                                                                      \
    KIND##_many_1_##PANELS, KIND##_many_2_##PANELS, KIND##_many_3_##PANELS, KIND##_many_4_##PANELS
#define MORE_TILES_OF(KIND, PANELS)                                                                                \
    MANY_TILE(KIND, 5, PANELS) MANY_TILE(KIND, 6, PANELS) MANY_TILE(KIND, 7, PANELS) MANY_TILE(KIND, 8, PANELS)    \
    MANY_TILE(KIND, 9, PANELS) MANY_TILE(KIND, 10, PANELS) MANY_TILE(KIND, 11, PANELS) MANY_TILE(KIND, 12, PANELS)
#define MORE_OF(KIND, PANELS)                                                                                      \
    KIND##_many_5_##PANELS, KIND##_many_6_##PANELS, KIND##_many_7_##PANELS, KIND##_many_8_##PANELS,                \
    KIND##_many_9_##PANELS, KIND##_many_10_##PANELS, KIND##_many_11_##PANELS, KIND##_many_12_##PANELS

#if LANES == 16

// One instruction multiplies whatever bytes there are.
MANY_TILES_OF(BYTES, 1)
MORE_TILES_OF(BYTES, 1)
MANY_TILES_OF(BYTES, 2)
MORE_TILES_OF(BYTES, 2)
static ManyTile *const MANY_TILES[PANELS_AT_ONCE][ROWS_AT_ONCE] = {
    {MANY_OF(BYTES, 1), MORE_OF(BYTES, 1)},
    {MANY_OF(BYTES, 2), MORE_OF(BYTES, 2)},
};
INLINE ManyTile *many_tile(int kind, int64_t rows, int num_panels) {
    (void)kind;
    return MANY_TILES[num_panels - 1][rows - 1];
}

#else

MANY_TILES_OF(BYTES, 1)
MANY_TILES_OF(SMALL, 1)
static ManyTile *const MANY_TILES[][ROWS_AT_ONCE] = {[BYTES] = {MANY_OF(BYTES, 1)}, [SMALL] = {MANY_OF(SMALL, 1)}};
INLINE ManyTile *many_tile(int kind, int64_t rows, int num_panels) {
    (void)num_panels;
    return MANY_TILES[kind][rows - 1];
}

#endif

// The high terms of one token, of which most are zero: only the groups with others have a share. starts, sums: of its
// high terms, [groups, CHUNK].
INLINE void add_high_terms(int kind, const Weights *weights, const int32_t *starts, const float *sums,
                           const Quad *quad, int64_t num_quads, Floats *totals) {
    const int shift = __builtin_ctzll((uint64_t)weights->group_quads);
    for (const Quad *end = quad + num_quads; quad < end;) {
        const int64_t group = quad->index >> shift;
        Ints products[PARTS];
        EACH(p, PARTS) products[p] = fill_ints(starts[group * CHUNK]);
        do {
            const int place = (int)(quad->index % unit_quads(kind));
            const uint8_t *unit = weights->panels + bytes_of(kind, quad->index - place);
            EACH(p, PARTS)
                products[p] = add_quad_of_part(kind, products[p], load_quad(kind, weights->table, unit, place, p),
                                               quad->codes);
        } while (++quad < end && quad->index >> shift == group);
        EACH(p, PARTS) {
            const Floats scale = group_scale(weights, 0, group, p);
            totals[p] += to_floats(products[p]) * scale;
            if (has_minimum(weights)) totals[p] += sums[group * CHUNK] * group_minimum(weights, 0, group, p, scale);
        }
    }
}

// How many of `left` tokens are multiplied together: tiles of about the same size.
INLINE int64_t next_rows(int64_t left, int is_many) {
    const int64_t most = is_many ? ROWS_AT_ONCE : FEW_ROWS, tiles = (left + most - 1) / most;
    return (left + tiles - 1) / tiles;
}

// What a thread has made of a chunk of tokens, as `Terms` has it, and for each tile of many tokens `HighTerms`: those of
// the tile that begins with token m are from `highs` + m * quads on, their ends from `ends` + m * groups on.
typedef struct {
    int32_t *low_starts, *high_starts, *ends;
    float *low_sums, *high_sums;
    High *highs;
} Chunk;

// Sorts the high terms of tokens m … m + size - 1 of a chunk that begins with token `from` by their groups.
INLINE void sort_highs(Codes codes, int64_t from, int64_t m, int64_t size, int shift, int64_t groups, Chunk *chunk) {
    const int64_t quads = codes.stride / QUAD;
    int32_t *ends = chunk->ends + m * groups;
    High *highs = chunk->highs + m * quads;
    memset(ends, 0, (size_t)groups * sizeof *ends);
    for (int64_t i = 0; i < size; i++) {
        const Quad *quad = codes.quads + (from + m + i) * quads;
        for (const Quad *end = quad + codes.tokens[from + m + i].num_quads; quad < end; quad++)
            ends[quad->index >> shift]++;
    }
    // Where each group's begin, and, as its terms go there, end.
    int32_t begin = 0;
    for (int64_t g = 0; g < groups; g++) {
        const int32_t number = ends[g];
        ends[g] = begin;
        begin += number;
    }
    for (int64_t i = 0; i < size; i++) {
        const Quad *quad = codes.quads + (from + m + i) * quads;
        for (const Quad *end = quad + codes.tokens[from + m + i].num_quads; quad < end; quad++) {
            High *high = highs + ends[quad->index >> shift]++;
            high->token = (int32_t)i;
            high->quad = quad->index;
            memcpy(high->codes, quad->codes, sizeof high->codes);
        }
    }
}

// Tokens from … to - 1; offset: the weights'.
INLINE Chunk prepare(Codes codes, int64_t from, int64_t to, int64_t group_quads, int64_t groups, int32_t offset,
                     int is_many) {
    static _Thread_local Room starts, sums, sorted;
    const int64_t quads = codes.stride / QUAD, rows = to - from, size = CHUNK * groups;
    const int shift = __builtin_ctzll((uint64_t)group_quads);
    Chunk chunk = {.low_starts = room(&starts, 3 * size * (int64_t)sizeof(int32_t)),
                   .low_sums = room(&sums, 2 * size * (int64_t)sizeof(float))};
    chunk.high_starts = chunk.low_starts + size;
    chunk.ends = chunk.high_starts + size;
    chunk.high_sums = chunk.low_sums + size;
    for (int64_t m = 0; m < rows; m++) {
        const int8_t *low = codes.low + (from + m) * codes.stride;
        const Quad *quad = codes.tokens == NULL ? NULL : codes.quads + (from + m) * quads;
        const Quad *last = codes.tokens == NULL ? NULL : quad + codes.tokens[from + m].num_quads;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t end = smaller((g + 1) * group_quads, quads) * QUAD, place = g * CHUNK + m;
            int32_t sum = 0, high_sum = 0;
            for (int64_t k = g * group_quads * QUAD; k < end; k++) sum += low[k];
            for (; quad < last && quad->index >> shift == g; quad++)
                for (int i = 0; i < QUAD; i++) high_sum += quad->codes[i];
            // Floats hold them: they are below 2^24.
            chunk.low_sums[place] = (float)sum;
            chunk.low_starts[place] = -offset * sum;
            chunk.high_sums[place] = (float)high_sum;
            chunk.high_starts[place] = -offset * high_sum;
        }
    }
    if (!is_many || codes.tokens == NULL) return chunk;
    chunk.highs = room(&sorted, CHUNK * quads * (int64_t)sizeof(High));
    for (int64_t m = 0, tile; m < rows; m += tile) {
        tile = next_rows(rows - m, 1);
        sort_highs(codes, from, m, tile, shift, groups, &chunk);
    }
    return chunk;
}

// What a task multiplies tokens with, and where the results go.
typedef struct {
    Weights weights;
    int kind;
    const float *token_scale;   // of groups, [M, groups], or null
    const float *scale, *bias;  // of the panels' outputs, or null
    int64_t features;           // outputs that there are from the first panel on
    float *output;              // of the first panel and token 0
    int64_t stride;
} Product;

// Tokens from … to - 1 with some panels; is_many: these are bytes, and their numbers floats.
INLINE void multiply(const Product *product, int num_panels, int is_many, Codes codes, const Chunk *chunk, int64_t from,
                     int64_t to) {
    const Weights *weights = &product->weights;
    const int64_t groups = weights->groups, quads = weights->quads;
    for (int64_t m = from, size; m < to; m += size) {
        size = next_rows(to - m, is_many);
        Floats totals[ROWS_AT_ONCE * WIDE * PARTS], highs[ROWS_AT_ONCE * WIDE * PARTS];
        const float *scales = product->token_scale == NULL ? NULL : product->token_scale + m * groups;
        const int64_t place = m - from;
        const int32_t *high_starts = chunk->high_starts + place;
        const float *high_sums = chunk->high_sums + place;
        const Terms low = {codes.low + m * codes.stride, codes.stride, chunk->low_starts + place,
                           chunk->low_sums + place, scales};
        if (is_many) {
            const HighTerms high = {chunk->highs + place * quads,
                                    codes.tokens == NULL ? NULL : chunk->ends + place * groups, high_starts, high_sums};
            many_tile(product->kind, size, num_panels)(weights, &low, &high, totals, highs);
        } else {
            FEW_TILES[product->kind][size - 1](weights, &low, totals);
        }
        for (int64_t i = 0; i < size; i++) {
            Floats *of_token = highs + i * num_panels * PARTS;
            if (codes.tokens != NULL && !is_many) {
                EACH(p, PARTS) of_token[p] = (Floats){0};
                const Quad *quad = codes.quads + (m + i) * quads;
#define CASE(KIND)                                                                                                 \
    case KIND:                                                                                                     \
        add_high_terms(KIND, weights, high_starts + i, high_sums + i, quad, codes.tokens[m + i].num_quads, of_token); \
        break;
                switch (product->kind) {
                    CASE(BYTES)
                    CASE(NIBBLES)
                    CASE(TABLE)
                    CASE(FIVES)
                    CASE(SIXES)
                    CASE(SPARSE)
                }
#undef CASE
            }
            EACH(p, num_panels * PARTS) {
                const int64_t n = p * LANES;
                Floats value = totals[i * num_panels * PARTS + p];
                if (codes.tokens != NULL) value = (of_token[p] * 128.0f + value) * codes.tokens[m + i].scale;
                if (product->scale != NULL) value *= load(product->scale + n);
                if (product->bias != NULL) value += load(product->bias + n);
                store_part(product->output + (m + i) * product->stride + n, value, product->features - n);
            }
        }
    }
}

// Panels of fewer bits as they would be with eight: TABLE becomes BYTES, others become SMALL.
INLINE const uint8_t *expand(int kind, const uint8_t *table, const uint8_t *panels, int64_t quads) {
    static _Thread_local Room expansion;
    uint8_t *expanded = room(&expansion, quads * QUAD_BYTES);
    if (kind == SPARSE) {
        expand_sparse(panels, 4, quads, expanded);
        return expanded;
    }
    for (int64_t k = 0; k < quads; k += unit_quads(kind))
        EACH(quad, unit_quads(kind)) EACH(p, PARTS) {
            const PartCodes codes = load_quad(kind, table, panels + bytes_of(kind, k), quad, p);
            memcpy(expanded + (k + quad) * QUAD_BYTES + p * QUAD * LANES, &codes, sizeof codes);
        }
    return expanded;
}

// The numbers of some panels as floats.
INLINE void expand_numbers(Weights *weights, int64_t num_panels) {
    static _Thread_local Room expansion;
    const int64_t size = weights->groups * num_panels * PANEL;
    float *scales = room(&expansion, 2 * size * (int64_t)sizeof(float)), *minimums = scales + size;
    for (int64_t g = 0; g < weights->groups; g++)
        for (int64_t n = 0; n < num_panels; n++)
            EACH(p, PARTS) {
                const int64_t place = (g * num_panels + n) * PANEL + p * LANES;
                const Floats scale = group_scale(weights, n, g, p);
                store(scales + place, scale);
                if (has_minimum(weights)) store(minimums + place, group_minimum(weights, n, g, p, scale));
            }
    weights->scales = scales;
    weights->minimums = has_minimum(weights) ? minimums : NULL;
    weights->num_panels = num_panels;
}

INLINE Numbers numbers_of(const Half *values, const int8_t *steps, int64_t panel, int64_t groups, int64_t blocks) {
    if (values == NULL) return (Numbers){NULL, NULL};
    if (steps == NULL) return (Numbers){values + panel * groups * PANEL, NULL};
    return (Numbers){values + panel * blocks * PANEL, steps + panel * groups * PANEL};
}

OPERATION(grouped_matmul) {
    const int64_t rows = count(args->num_rows), group_size = args->group_size, features = args->features;
    const int kind = (int)args->kind, is_many = rows > FEW_ROWS, expands = is_many && !is_bytes(kind);
    const Codes codes = args->codes;
    const float *scale = args->scale, *bias = args->bias;
    const int64_t quads = codes.stride / QUAD, groups = (args->size + group_size - 1) / group_size;
    const int64_t blocks = (args->size + args->block_size - 1) / args->block_size;
    const int64_t num_panels = (features + PANEL - 1) / PANEL;
    const int64_t panels_a_task = WIDE * larger(1, num_panels / (WIDE * MOST_TASKS));
    const int64_t tasks_a_chunk = (num_panels + panels_a_task - 1) / panels_a_task;
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK, panel_bytes = bytes_of(kind, quads);
    int64_t prepared = -1;
    Chunk of_tokens;
    FOR_TASKS(task, tasks_a_chunk * chunks) {
        const int64_t first = task % tasks_a_chunk * panels_a_task;
        const int64_t last = smaller(first + panels_a_task, num_panels);
        const int64_t chunk = task / tasks_a_chunk, from = chunk * CHUNK, to = smaller(from + CHUNK, rows);
        if (chunk != prepared)
            of_tokens = prepare(codes, from, to, group_size / QUAD, groups, (int32_t)args->offset, is_many);
        prepared = chunk;
        for (int64_t panel = first, step; panel < last; panel += step) {
            step = !is_many || last - panel < WIDE ? 1 : PANELS_AT_ONCE;
            const uint8_t *panels = args->weight + panel * panel_bytes;
            Product product = {
                .weights = {
                    .panels = expands ? expand(kind, args->table, panels, step * quads) : panels,
                    .table = args->table,
                    .distance = expands ? quads * QUAD_BYTES : panel_bytes,
                    .offset = (int32_t)args->offset,
                    .scale = numbers_of(args->group_scale, args->scale_steps, panel, groups, blocks),
                    .minimum = numbers_of(args->minimum, args->minimum_steps, panel, groups, blocks),
                    .centre = kind == SPARSE ? SPARSE_CENTRE : 0,
                    .quads = quads,
                    .group_quads = group_size / QUAD,
                    .groups = groups,
                    .blocks = blocks,
                    .block_shift = __builtin_ctzll((uint64_t)(args->block_size / group_size)),
                },
                .kind = !expands ? kind : kind == TABLE ? BYTES : SMALL,
                .token_scale = args->token_scale,
                .scale = scale == NULL ? NULL : scale + panel * PANEL,
                .bias = bias == NULL ? NULL : bias + panel * PANEL,
                .features = features - panel * PANEL,
                .output = args->output + panel * PANEL,
                .stride = args->output_stride,
            };
            if (is_many) expand_numbers(&product.weights, step);
            if (!is_many) multiply(&product, 1, 0, codes, &of_tokens, from, to);
            else if (step == 1) multiply(&product, 1, 1, codes, &of_tokens, from, to);
            else multiply(&product, WIDE, 1, codes, &of_tokens, from, to);
        }
    }
}

// A group's number of row `lane` of a panel, as `group_numbers` has those of all.
INLINE float group_number(const Half *values, const int8_t *steps, int64_t panel, int64_t lane, int64_t groups,
                          int64_t group, int64_t blocks, int64_t block) {
    if (steps == NULL) return from_half(values[(panel * groups + group) * PANEL + lane]);
    return (float)steps[(panel * groups + group) * PANEL + lane] * from_half(values[(panel * blocks + block) * PANEL + lane]);
}

OPERATION(weight_rows) {
    const int64_t rows = count(args->num_rows), size = args->size;
    const int64_t group_size = args->group_size, groups = (size + group_size - 1) / group_size;
    const int64_t block_size = args->block_size, blocks = (size + block_size - 1) / block_size;
    const int64_t quads = padded_columns(size) / QUAD;
    const int kind = (int)args->kind;
    const float factor = (float)args->factor;
    FOR_ROWS(m, rows) {
        const int64_t n = args->indices[m], panel = n / PANEL, lane = n % PANEL;
        const uint8_t *codes = args->weight + panel * bytes_of(kind, quads);
        float *y = args->output + m * size;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t end = smaller((g + 1) * group_size, size), block = g * group_size / block_size;
            const float scale =
                group_number(args->group_scale, args->scale_steps, panel, lane, groups, g, blocks, block);
            const float minimum = args->minimum == NULL ? 0.0f
                                                        : group_number(args->minimum, args->minimum_steps, panel, lane,
                                                                       groups, g, blocks, block);
            for (int64_t k = g * group_size; k < end; k += QUAD) {
                const int64_t quad = k / QUAD, place = quad % unit_quads(kind);
                const uint8_t *unit = codes + bytes_of(kind, quad - place);
                uint8_t four[QUAD];
                load_lane(kind, args->table, unit, (int)place, (int)lane, four);
                for (int64_t i = k; i < smaller(k + QUAD, end); i++) {
                    const float value = (float)(four[i - k] - (int32_t)args->offset) * scale;
                    // Without a minimum nothing is added: -0 would become 0.
                    y[i] = (args->minimum == NULL ? value : value + minimum) * factor;
                }
            }
        }
    }
}

// One term, as `reference` in engine/kernels/quantize.py makes it. What is not finite makes its group's scale NaN.
OPERATION(quantize_groups) {
    const int64_t rows = count(args->num_rows), size = args->size, group_size = args->group_size;
    const int64_t groups = (size + group_size - 1) / group_size;
    FOR_ROWS(m, rows) {
        const float *x = args->x + m * args->x_stride;
        int8_t *codes = args->codes + m * args->stride;
        memset(codes, 0, (size_t)args->stride);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = g * group_size, end = smaller(first + group_size, size);
            Ints bits = {0};  // a NaN's are above infinity's
            for (int64_t k = first; k < end; k += LANES)
                bits = larger_of(bits, (Ints)absolute(load_part(x + k, end - k)));
            const int is_finite = !any(bits >= 0x7F800000);
            float *scale = args->scale + m * groups + g;
            *scale = is_finite ? fmaxf(float_of_bits(largest_int(bits)) * (1.0f / 127), 1.17549435e-38f) : NAN;
            for (int64_t k = first; is_finite && k < end; k += LANES)
                store_bytes(codes + k, round_to_ints(load_part(x + k, end - k) / *scale));
        }
    }
}
