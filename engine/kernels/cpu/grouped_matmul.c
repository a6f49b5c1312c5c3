// Products of int8 activations with int8 weights, either of them or both in groups along the input features: each
// group has an exact sum and a scale of its own, and they are added in order (engine/kernels/matmul/cpu_grouped.py).

#include "int8_tiles.h"

enum {
    CHUNK = 192,      // tokens in a task
    GROUP_ROWS = 6,   // whose sums and totals with two panels fit into the registers
    UNROLL = 4,       // quads, of which every group has a multiple
    DENSE_SHARE = 4,  // high terms are multiplied with the zeros between them from every fourth quad on
};

// Some panels of weights.
typedef struct {
    const uint8_t *panels;
    const Half *scale;  // [panels, groups, 16], or null: all of them one
    int64_t quads, group_quads, groups;  // group_quads is a power of two
} Weights;

// Some tokens' terms.
typedef struct {
    const int8_t *codes;
    int64_t stride;
    const int32_t *starts;  // [rows, groups]: what sums start with, to take back the 128 of the panels' codes
    const float *scale;     // [rows, groups], or null: all of them one
} Terms;

INLINE Ints fill_ints(int32_t x) { return x - (Ints){0}; }

// Of 16 outputs; `panel` counts from the weights' first.
INLINE Floats group_scale(const Weights *weights, int64_t panel, int64_t group) {
    if (weights->scale == NULL) return fill(1.0f);
    return load_halves(weights->scale + (panel * weights->groups + group) * PANEL);
}

#define GROUP_TILE(ROWS, PANELS)                                                                                   \
    static void group_tile_##ROWS##_##PANELS(const Weights *weights, const Terms *terms, Floats *output) {         \
        const int64_t groups = weights->groups, distance = weights->quads * QUAD_BYTES, stride = terms->stride;    \
        const uint8_t *panels = weights->panels;                                                                   \
        const int8_t *codes = terms->codes;                                                                        \
        Floats totals[ROWS][PANELS];                                                                               \
        _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++)                                                    \
            _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++) totals[m][n] = (Floats){0};                  \
        for (int64_t g = 0; g < groups; g++) {                                                                     \
            Ints sums[ROWS][PANELS];                                                                               \
            _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++)                                                \
                _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                          \
                    sums[m][n] = fill_ints(terms->starts[m * groups + g]);                                         \
            const int64_t end = smaller((g + 1) * weights->group_quads, weights->quads);                           \
            for (int64_t k = g * weights->group_quads; k < end; k += UNROLL)                                       \
                _Pragma("GCC unroll 16") for (int u = 0; u < UNROLL; u++)                                          \
                    _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++)                                        \
                        _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                  \
                            sums[m][n] = add_quad(sums[m][n], panels + n * distance + (k + u) * QUAD_BYTES,        \
                                                  codes + m * stride + (k + u) * QUAD);                            \
            Floats scales[PANELS];                                                                                 \
            _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++) scales[n] = group_scale(weights, n, g);      \
            _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++) {                                              \
                const Floats scale = fill(terms->scale == NULL ? 1.0f : terms->scale[m * groups + g]);             \
                _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++)                                          \
                    totals[m][n] += __builtin_convertvector(sums[m][n], Floats) * scale * scales[n];               \
            }                                                                                                      \
        }                                                                                                          \
        _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++)                                                    \
            _Pragma("GCC unroll 16") for (int n = 0; n < PANELS; n++) output[m * PANELS + n] = totals[m][n];       \
    }

typedef void GroupTile(const Weights *, const Terms *, Floats *);

GROUP_TILE(1, 1)
GROUP_TILE(2, 1)
GROUP_TILE(3, 1)
GROUP_TILE(4, 1)
GROUP_TILE(1, 2)
GROUP_TILE(2, 2)
GROUP_TILE(3, 2)
GROUP_TILE(4, 2)
GROUP_TILE(5, 2)
GROUP_TILE(6, 2)

static GroupTile *const NARROW_GROUP_TILES[] = {group_tile_1_1, group_tile_2_1, group_tile_3_1, group_tile_4_1};
static GroupTile *const WIDE_GROUP_TILES[] = {
    group_tile_1_2, group_tile_2_2, group_tile_3_2, group_tile_4_2, group_tile_5_2, group_tile_6_2,
};

// The high terms of one token, of which most are zero: only the groups with others have a share.
INLINE void add_high_terms(const Weights *weights, int64_t num_panels, const int32_t *starts, const Quad *quad,
                           int64_t num_quads, Floats *totals) {
    if (num_quads == 0) return;
    const int shift = __builtin_ctzll((uint64_t)weights->group_quads);
    int64_t group = quad->index >> shift;
    Ints sums[WIDE];
    for (int64_t n = 0; n < num_panels; n++) sums[n] = fill_ints(starts[group]);
    for (const Quad *end = quad + num_quads; quad < end; quad++) {
        const int64_t next = quad + 1 < end ? quad[1].index >> shift : group;
        // Few quads are in a group, and how many cannot be predicted: masks are faster than jumps.
        const Ints is_last = fill_ints(-(next != group || quad + 1 == end)), start = fill_ints(starts[next]);
        for (int64_t n = 0; n < num_panels; n++) {
            const uint8_t *weight = weights->panels + (n * weights->quads + quad->index) * QUAD_BYTES;
            sums[n] = add_quad(sums[n], weight, quad->codes);
            const Floats share = __builtin_convertvector(sums[n], Floats) * group_scale(weights, n, group);
            totals[n] += (Floats)(is_last & (Ints)share);
            sums[n] = (is_last & start) | (~is_last & sums[n]);
        }
        group = next;
    }
}

// What a thread has made of a chunk of tokens.
typedef struct {
    int32_t *low_starts, *high_starts;  // [rows, groups]
    int8_t *high;                       // [rows, stride], or null where most of it would be zeros
} Chunk;

// Tokens from … to - 1.
INLINE Chunk prepare(Codes codes, int64_t from, int64_t to, int64_t group_quads, int64_t groups) {
    static _Thread_local Room starts, dense;
    const int64_t quads = codes.stride / QUAD, rows = to - from;
    const int shift = __builtin_ctzll((uint64_t)group_quads);
    Chunk chunk = {room(&starts, 2 * CHUNK * groups * (int64_t)sizeof(int32_t)), NULL, NULL};
    chunk.high_starts = chunk.low_starts + CHUNK * groups;
    int64_t num_quads = 0;
    for (int64_t m = 0; m < rows; m++) {
        const int8_t *low = codes.low + (from + m) * codes.stride;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t end = smaller((g + 1) * group_quads, quads) * QUAD;
            int32_t sum = 0;
            for (int64_t k = g * group_quads * QUAD; k < end; k++) sum += low[k];
            chunk.low_starts[m * groups + g] = -128 * sum;
        }
        if (codes.tokens == NULL) continue;
        int32_t *highs = chunk.high_starts + m * groups;
        const Quad *quad = codes.quads + (from + m) * quads, *end = quad + codes.tokens[from + m].num_quads;
        num_quads += end - quad;
        memset(highs, 0, (size_t)groups * sizeof *highs);
        for (; quad < end; quad++)
            for (int i = 0; i < QUAD; i++) highs[quad->index >> shift] -= 128 * quad->codes[i];
    }
    if (num_quads * DENSE_SHARE < rows * quads) return chunk;
    chunk.high = room(&dense, CHUNK * codes.stride);
    memset(chunk.high, 0, (size_t)(rows * codes.stride));
    for (int64_t m = 0; m < rows; m++) {
        const Quad *of_token = codes.quads + (from + m) * quads;
        for (int64_t i = 0; i < codes.tokens[from + m].num_quads; i++)
            memcpy(chunk.high + m * codes.stride + of_token[i].index * QUAD, of_token[i].codes, QUAD);
    }
    return chunk;
}

// What a task multiplies tokens with, and where the results go.
typedef struct {
    Weights weights;
    const float *token_scale;   // of groups, [M, groups], or null
    const float *scale, *bias;  // of the panels' outputs, or null
    int64_t features;           // outputs that there are from the first panel on
    float *output;              // of the first panel and token 0
    int64_t stride;
} Product;

// Tokens from … to - 1 with one panel or two.
INLINE void multiply(const Product *product, int64_t num_panels, Codes codes, const Chunk *chunk, int64_t from,
                     int64_t to) {
    const Weights *weights = &product->weights;
    const int64_t groups = weights->groups, quads = weights->quads;
    const int64_t most = num_panels == WIDE ? GROUP_ROWS : FEW_ROWS;
    for (int64_t m = from, size; m < to; m += size) {
        const int64_t tiles = (to - m + most - 1) / most;
        size = (to - m + tiles - 1) / tiles;  // tiles of about the same size
        GroupTile *tile = (num_panels == WIDE ? WIDE_GROUP_TILES : NARROW_GROUP_TILES)[size - 1];
        Floats totals[GROUP_ROWS * WIDE], highs[GROUP_ROWS * WIDE] = {{0}};
        const float *scales = product->token_scale == NULL ? NULL : product->token_scale + m * groups;
        const int32_t *high_starts = chunk->high_starts + (m - from) * groups;
        tile(weights,
             &(Terms){codes.low + m * codes.stride, codes.stride, chunk->low_starts + (m - from) * groups, scales},
             totals);
        if (chunk->high != NULL)
            tile(weights, &(Terms){chunk->high + (m - from) * codes.stride, codes.stride, high_starts, NULL}, highs);
        for (int64_t i = 0; i < size; i++) {
            Floats *of_token = highs + i * num_panels;
            if (codes.tokens != NULL && chunk->high == NULL)
                add_high_terms(weights, num_panels, high_starts + i * groups, codes.quads + (m + i) * quads,
                               codes.tokens[m + i].num_quads, of_token);
            for (int64_t n = 0; n < num_panels; n++) {
                Floats value = totals[i * num_panels + n];
                if (codes.tokens != NULL) value = (of_token[n] * 128.0f + value) * codes.tokens[m + i].scale;
                if (product->scale != NULL) value *= load(product->scale + n * PANEL);
                if (product->bias != NULL) value += load(product->bias + n * PANEL);
                const int64_t left = product->features - n * PANEL;
                if (left > 0) store_part(product->output + (m + i) * product->stride + n * PANEL, value, left);
            }
        }
    }
}

OPERATION(grouped_matmul) {
    const int64_t rows = count(args->num_rows), group_size = args->group_size, features = args->features;
    const Codes codes = args->codes;
    const Half *group_scales = args->group_scale;
    const float *scale = args->scale, *bias = args->bias;
    const int64_t quads = codes.stride / QUAD, groups = (args->size + group_size - 1) / group_size;
    const int64_t num_panels = (features + PANEL - 1) / PANEL, tasks_a_chunk = (num_panels + WIDE - 1) / WIDE;
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    int64_t prepared = -1;
    Chunk of_tokens;
    FOR_TASKS(task, tasks_a_chunk * chunks) {
        const int64_t first = task % tasks_a_chunk * WIDE, last = smaller(first + WIDE, num_panels);
        const int64_t chunk = task / tasks_a_chunk, from = chunk * CHUNK, to = smaller(from + CHUNK, rows);
        if (chunk != prepared) of_tokens = prepare(codes, from, to, group_size / QUAD, groups);
        prepared = chunk;
        const int64_t step = rows <= FEW_ROWS || last - first < WIDE ? 1 : WIDE;
        for (int64_t panel = first; panel < last; panel += step) {
            const Product product = {
                .weights = {
                    .panels = args->weight + panel * quads * QUAD_BYTES,
                    .scale = group_scales == NULL ? NULL : group_scales + panel * groups * PANEL,
                    .quads = quads,
                    .group_quads = group_size / QUAD,
                    .groups = groups,
                },
                .token_scale = args->token_scale,
                .scale = scale == NULL ? NULL : scale + panel * PANEL,
                .bias = bias == NULL ? NULL : bias + panel * PANEL,
                .features = features - panel * PANEL,
                .output = args->output + panel * PANEL,
                .stride = features,
            };
            if (step == 1) multiply(&product, 1, codes, &of_tokens, from, to);
            else multiply(&product, WIDE, codes, &of_tokens, from, to);
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
            *scale = is_finite ? fmaxf(largest_lane((Floats)bits) * (1.0f / 127), 1.17549435e-38f) : NAN;
            for (int64_t k = first; is_finite && k < end; k += LANES) {
                const Bytes bytes = narrow(round_to_ints(load_part(x + k, end - k) / *scale));
                memcpy(codes + k, &bytes, LANES);
            }
        }
    }
}
