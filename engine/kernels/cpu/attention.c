// Causal attention over the paged cache. Keys are taken in segments of SEGMENT positions counted from 0; each has
// a softmax of its own, and segments are merged in order. A score is one chain of fused products over the head's
// dimensions, a weighted value one over the segment's keys: what a token gets depends on its position alone, not
// on the queries that are computed beside it.

#include "kernels.h"

enum {
    SEGMENT = 256,
    STRIP = 4 * LANES,  // keys whose scores with a few queries fit into the registers
    SLAB = 4 * LANES,   // dimensions whose sums do
    MAX_ROWS = 6,
    QUERY_TILE = 64,    // queries in a task of a chunk
    MAX_DIM = 256,
};

// What all tasks of an operation read; see below.
typedef struct {
    const float *queries;
    int64_t query_stride;
    const void *keys, *values;
    const float *key_scales, *value_scales;
    int64_t type, kv_heads, group, size, block_shift;
    float scale;
    int64_t window;
} Inputs;

// Sixteen dimensions of a cached vector as floats.
INLINE Floats load_cached(const void *cache, int64_t offset, int64_t type) {
    if (type == FLOAT32) return load((const float *)cache + offset);
    if (type == BFLOAT16) return (Floats)(widen_halves((const uint16_t *)cache + offset) << 16);
    if (type == INT8) return __builtin_convertvector(widen_bytes((const int8_t *)cache + offset), Floats);
    if (type == FLOAT16) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)cache + offset)));
#else
        Floats v;
        for (int i = 0; i < LANES; i++) v[i] = from_half(((const Half *)cache)[offset + i]);
        return v;
#endif
    }
    const Ints code = widen_bytes((const int8_t *)cache + offset);
    // Exponent and fraction where float32 has them, then the exponents' bias; exact, subnormals too.
    const Floats size = (Floats)((code & 0x7F) << 20) * 0x1p120f;
    return (Floats)(((Ints)size) | ((code & 0x80) << 24));
}

INLINE void transpose(const float *rows, int64_t row_stride, float *columns, int64_t column_stride) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(rows + i * row_stride);
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            const __m512d x = _mm512_castps_pd(b[4 * i + j]), y = _mm512_castps_pd(b[4 * i + 2 + j]);
            a[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            a[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
        b[4 + i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xDD);
        b[8 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
        b[12 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_ps(columns + i * column_stride, _mm512_shuffle_f32x4(b[i], b[8 + i], 0x88));
        _mm512_storeu_ps(columns + (4 + i) * column_stride, _mm512_shuffle_f32x4(b[4 + i], b[12 + i], 0x88));
        _mm512_storeu_ps(columns + (8 + i) * column_stride, _mm512_shuffle_f32x4(b[i], b[8 + i], 0xDD));
        _mm512_storeu_ps(columns + (12 + i) * column_stride, _mm512_shuffle_f32x4(b[4 + i], b[12 + i], 0xDD));
    }
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) columns[j * column_stride + i] = rows[i * row_stride + j];
#endif
}

// The segment's keys and values as floats: keys [strips][size][STRIP], values [SEGMENT][size padded to 16].
typedef struct {
    float keys[SEGMENT * MAX_DIM], values[SEGMENT * MAX_DIM];
    float staging[LANES * MAX_DIM];
} Segment;

INLINE int64_t row_of(const Inputs *in, const int32_t *table, int64_t head, int64_t position) {
    const int64_t block = table[position >> in->block_shift];
    return ((block << in->block_shift) + (position & ((1 << in->block_shift) - 1))) * in->kv_heads + head;
}

// One vector of the cache, `padded` floats.
INLINE void read_vector(const void *cache, const float *scales, int64_t row, float *x, int64_t size, int64_t padded,
                        int64_t type) {
    for (int64_t d = 0; d < padded; d += LANES) {
        Floats v;
        if (size - d >= LANES) v = load_cached(cache, row * size + d, type);
        else {  // reading sixteen would leave the cache
            uint8_t part[LANES * 4] = {0};
            memcpy(part, (const uint8_t *)cache + (row * size + d) * CACHE_BYTES[type], (size_t)((size - d) * CACHE_BYTES[type]));
            v = load_cached(part, 0, type);
        }
        store(x + d, type == INT8 ? v * scales[row] : v);
    }
}

INLINE void read_segment_of(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last,
                            Segment *segment, int64_t type) {
    const int64_t base = first / SEGMENT * SEGMENT, size = in->size, padded = (size + LANES - 1) / LANES * LANES;
    for (int64_t strip = (first - base) / LANES * LANES; base + strip < last; strip += LANES) {
        for (int64_t i = 0; i < LANES; i++) {
            const int64_t position = base + strip + i;
            float *key = segment->staging + i * padded, *value = segment->values + (strip + i) * padded;
            if (position < first || position >= last) {  // nobody's, but its weight of 0 is multiplied with it
                memset(key, 0, (size_t)padded * sizeof *key);
                memset(value, 0, (size_t)padded * sizeof *value);
                continue;
            }
            const int64_t row = row_of(in, table, head, position);
            // Heads lie apart, which the processor's own prefetching does not see.
            if (position + LANES < last) {
                const int64_t ahead = row_of(in, table, head, position + LANES) * size * CACHE_BYTES[type];
                for (int64_t line = 0; line < size * CACHE_BYTES[type]; line += 64) {
                    __builtin_prefetch((const uint8_t *)in->keys + ahead + line);
                    __builtin_prefetch((const uint8_t *)in->values + ahead + line);
                }
            }
            read_vector(in->keys, in->key_scales, row, key, size, padded, type);
            read_vector(in->values, in->value_scales, row, value, size, padded, type);
        }
        float *columns = segment->keys + strip / STRIP * STRIP * padded + strip % STRIP;
        for (int64_t d = 0; d < padded; d += LANES)
            transpose(segment->staging + d, padded, columns + d * STRIP, STRIP);
    }
}

// Keys first … last - 1, all in one segment.
static void read_segment(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last,
                         Segment *segment) {
    switch (in->type) {
        case FLOAT32: read_segment_of(in, table, head, first, last, segment, FLOAT32); break;
        case BFLOAT16: read_segment_of(in, table, head, first, last, segment, BFLOAT16); break;
        case FLOAT16: read_segment_of(in, table, head, first, last, segment, FLOAT16); break;
        case INT8: read_segment_of(in, table, head, first, last, segment, INT8); break;
        default: read_segment_of(in, table, head, first, last, segment, FP8);
    }
}

// The softmax of what was seen so far: values weighted relative to the largest score, not divided by their sum.
typedef struct {
    float *values;  // [size]
    float largest, sum;
} State;

INLINE void merge(State *total, const float *values, float largest, float sum, int64_t size) {
    const float top = fmaxf(total->largest, largest);
    const float kept = exp_negative_scalar(total->largest - top), added = exp_negative_scalar(largest - top);
    for (int64_t d = 0; d < size; d += LANES) {
        const Floats old = load_part(total->values + d, size - d) * kept;
        store_part(total->values + d, old + load_part(values + d, size - d) * added, size - d);
    }
    total->sum = total->sum * kept + sum * added;
    total->largest = top;
}

// Scores of ROWS queries with a strip of keys.
#define SCORES(ROWS)                                                                                               \
    static void scores_##ROWS(const float *const *queries, const float *keys, int64_t size, float scale,           \
                              float *scores) {                                                                     \
        Floats sums[ROWS][STRIP / LANES];                                                                          \
        _Pragma("GCC unroll 8") for (int m = 0; m < ROWS; m++)                                                     \
            _Pragma("GCC unroll 8") for (int n = 0; n < STRIP / LANES; n++) sums[m][n] = (Floats){0};              \
        for (int64_t d = 0; d < size; d++) {                                                                       \
            Floats key[STRIP / LANES];                                                                             \
            _Pragma("GCC unroll 8") for (int n = 0; n < STRIP / LANES; n++)                                        \
                key[n] = load(keys + d * STRIP + n * LANES);                                                       \
            _Pragma("GCC unroll 8") for (int m = 0; m < ROWS; m++) {                                               \
                const Floats query = fill(queries[m][d]);                                                          \
                _Pragma("GCC unroll 8") for (int n = 0; n < STRIP / LANES; n++)                                    \
                    sums[m][n] = multiply_add(query, key[n], sums[m][n]);                                          \
            }                                                                                                      \
        }                                                                                                          \
        _Pragma("GCC unroll 8") for (int m = 0; m < ROWS; m++)                                                     \
            _Pragma("GCC unroll 8") for (int n = 0; n < STRIP / LANES; n++)                                        \
                store(scores + m * SEGMENT + n * LANES, sums[m][n] * scale);                                       \
    }

// A slab of the values of keys first … last - 1, weighted.
#define VALUES(ROWS)                                                                                               \
    static void values_##ROWS(const float *weights, const float *values, int64_t stride, int64_t first,            \
                              int64_t last, float *output) {                                                       \
        Floats sums[ROWS][SLAB / LANES];                                                                           \
        _Pragma("GCC unroll 8") for (int m = 0; m < ROWS; m++)                                                     \
            _Pragma("GCC unroll 8") for (int n = 0; n < SLAB / LANES; n++) sums[m][n] = (Floats){0};               \
        for (int64_t key = first; key < last; key++) {                                                             \
            Floats value[SLAB / LANES];                                                                            \
            _Pragma("GCC unroll 8") for (int n = 0; n < SLAB / LANES; n++)                                         \
                value[n] = load(values + key * stride + n * LANES);                                                \
            _Pragma("GCC unroll 8") for (int m = 0; m < ROWS; m++) {                                               \
                const Floats weight = fill(weights[m * SEGMENT + key]);                                            \
                _Pragma("GCC unroll 8") for (int n = 0; n < SLAB / LANES; n++)                                     \
                    sums[m][n] = multiply_add(weight, value[n], sums[m][n]);                                       \
            }                                                                                                      \
        }                                                                                                          \
        _Pragma("GCC unroll 8") for (int m = 0; m < ROWS; m++)                                                     \
            _Pragma("GCC unroll 8") for (int n = 0; n < SLAB / LANES; n++)                                         \
                store(output + m * MAX_DIM + n * LANES, sums[m][n]);                                               \
    }

#define BY_ROWS(name) {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}
SCORES(1) SCORES(2) SCORES(3) SCORES(4) SCORES(5) SCORES(6)
VALUES(1) VALUES(2) VALUES(3) VALUES(4) VALUES(5) VALUES(6)

// A few queries, which keys of the segment each sees (the others: first = last), and what their softmax comes to.
typedef struct {
    int64_t rows;
    const float *queries[MAX_ROWS];
    int64_t first[MAX_ROWS], last[MAX_ROWS];
    float largest[MAX_ROWS], sum[MAX_ROWS];
    float values[MAX_ROWS][MAX_DIM];
} Rows;

// Scores [SEGMENT] to weights in place, zeros for keys that the row does not see.
INLINE void soften(Rows *rows, int64_t row, float *scores, int64_t begin, int64_t end) {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int32_t first = (int32_t)rows->first[row], last = (int32_t)rows->last[row];
    Floats largest = fill(-INFINITY), sum = {0};
    for (int64_t k = begin; k < end; k += LANES) {
        const Ints seen = (lane >= first - (int32_t)k) & (lane < last - (int32_t)k);
        largest = maximum(largest, choose(seen, load(scores + k), fill(-INFINITY)));
    }
    const float top = largest_lane(largest);
    for (int64_t k = begin; k < end; k += LANES) {
        const Ints seen = (lane >= first - (int32_t)k) & (lane < last - (int32_t)k);
        const Floats weight = choose(seen, exp_negative(load(scores + k) - top), (Floats){0});
        store(scores + k, weight);
        sum += weight;
    }
    rows->largest[row] = top;
    rows->sum[row] = sum_lanes(sum);
}

INLINE int is_finite(const float *x, int64_t size) {
    Floats sum = {0};
    for (int64_t d = 0; d < size; d += LANES) {
        const Floats v = load_part(x + d, size - d);
        sum += v - v;
    }
    return sum_lanes(sum) == 0.0f;
}

static void attend(const Inputs *in, const Segment *segment, Rows *rows) {
    typedef void Scores(const float *const *, const float *, int64_t, float, float *);
    typedef void Values(const float *, const float *, int64_t, int64_t, int64_t, float *);
    static Scores *const scores_of[] = BY_ROWS(scores);
    static Values *const values_of[] = BY_ROWS(values);
    const int64_t padded = (in->size + LANES - 1) / LANES * LANES;
    float scores[MAX_ROWS * SEGMENT];
    int64_t first = SEGMENT, last = 0;
    for (int64_t row = 0; row < rows->rows; row++) {
        if (rows->first[row] >= rows->last[row]) continue;
        first = rows->first[row] < first ? rows->first[row] : first;
        last = rows->last[row] > last ? rows->last[row] : last;
    }
    for (int64_t strip = first / STRIP * STRIP; strip < last; strip += STRIP)
        scores_of[rows->rows - 1](rows->queries, segment->keys + strip * padded, in->size, in->scale, scores + strip);
    for (int64_t row = 0; row < rows->rows; row++)
        soften(rows, row, scores + row * SEGMENT, first / LANES * LANES, last);
    for (int64_t d = 0; d < in->size; d += SLAB)
        values_of[rows->rows - 1](scores, segment->values + d, padded, first, last, rows->values[0] + d);
    // A key that a row does not see weighs 0, which is not enough where its value is NaN or infinite.
    for (int64_t row = 0; row < rows->rows; row++) {
        const int sees_all = rows->first[row] == first && rows->last[row] == last;
        if (sees_all || rows->first[row] >= rows->last[row] || is_finite(rows->values[row], in->size)) continue;
        for (int64_t d = 0; d < in->size; d += SLAB)
            values_1(scores + row * SEGMENT, segment->values + d, padded, rows->first[row], rows->last[row],
                     rows->values[row] + d);
    }
}

// The first key that a query sees.
INLINE int64_t oldest(const Inputs *in, int64_t position) {
    return in->window == 0 ? 0 : larger(0, position - in->window + 1);
}

// One query's heads that share a key head, over one segment: weighted values, then largest and sum, a row each.
static void attend_decode(const Inputs *in, const float *queries, const int32_t *table, int64_t position,
                          int64_t head, int64_t index, Segment *segment, float *partial) {
    const int64_t base = index * SEGMENT, first = larger(oldest(in, position), base);
    const int64_t last = smaller(position + 1, base + SEGMENT);
    read_segment(in, table, head, first, last, segment);
    for (int64_t g = 0; g < in->group; g += MAX_ROWS) {
        Rows rows = {.rows = smaller(MAX_ROWS, in->group - g)};
        for (int64_t i = 0; i < rows.rows; i++) {
            rows.queries[i] = queries + (head * in->group + g + i) * in->size;
            rows.first[i] = first - base;
            rows.last[i] = last - base;
        }
        attend(in, segment, &rows);
        for (int64_t i = 0; i < rows.rows; i++) {
            float *row = partial + (g + i) * (in->size + 2);
            memcpy(row, rows.values[i], (size_t)in->size * sizeof *row);
            row[in->size] = rows.largest[i];
            row[in->size + 1] = rows.sum[i];
        }
    }
}

// Queries `from` … `to` - 1 of a chunk, the heads that share a key head, over all that they see.
static void attend_chunk(const Inputs *in, const float *queries, const int32_t *table, int64_t start, int64_t from,
                         int64_t to, int64_t head, Segment *segment, float *output) {
    const int64_t num_rows = (to - from) * in->group, width = in->kv_heads * in->group * in->size;
    State states[num_rows];
    for (int64_t row = 0; row < num_rows; row++) {
        float *values = output + (from + row / in->group) * width + (head * in->group + row % in->group) * in->size;
        states[row] = (State){values, -INFINITY, 0.0f};
        memset(values, 0, (size_t)in->size * sizeof *values);
    }
    const int64_t end = start + to;
    for (int64_t base = oldest(in, start + from) / SEGMENT * SEGMENT; base < end; base += SEGMENT) {
        read_segment(in, table, head, larger(oldest(in, start + from), base), smaller(end, base + SEGMENT), segment);
        for (int64_t row = 0; row < num_rows; row += MAX_ROWS) {
            Rows rows = {.rows = smaller(MAX_ROWS, num_rows - row)};
            int any = 0;
            for (int64_t i = 0; i < rows.rows; i++) {
                const int64_t query = from + (row + i) / in->group, position = start + query;
                rows.queries[i] =
                    queries + query * in->query_stride + (head * in->group + (row + i) % in->group) * in->size;
                rows.first[i] = larger(oldest(in, position) - base, 0);
                rows.last[i] = smaller(position + 1 - base, SEGMENT);
                any |= rows.first[i] < rows.last[i];
            }
            if (!any) continue;
            attend(in, segment, &rows);
            for (int64_t i = 0; i < rows.rows; i++)
                if (rows.first[i] < rows.last[i])
                    merge(&states[row + i], rows.values[i], rows.largest[i], rows.sum[i], in->size);
        }
    }
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t d = 0; d < in->size; d++) states[row].values[d] /= states[row].sum;
}

// Tasks of a sequence for each key head.
INLINE int64_t num_parts(const Inputs *in, int64_t num_queries, int64_t start) {
    if (num_queries == 1) return start / SEGMENT - oldest(in, start) / SEGMENT + 1;
    return (num_queries + QUERY_TILE - 1) / QUERY_TILE;
}

// sequences, queries [T, stride] float, stride, query_starts [S + 1] int32, starts [S] int32, table_rows [S] int32,
// tables [rows, width] int32, width, keys and values [slots, G, D], key and value scales [slots, G] float or null,
// the cache's type, G, H / G, D, block size, scale, window or 0, output [T, H, D] float,
// partial_starts [S] int32, partials [.., G, H / G, D + 2] float
//
// A sequence with one query has a task for each segment, whose results `merge_segments` merges.
OPERATION(paged_attention) {
    static _Thread_local Segment segment;
    const Inputs in = {
        .queries = w[1].p, .query_stride = w[2].i, .keys = w[8].p, .values = w[9].p, .key_scales = w[10].p,
        .value_scales = w[11].p, .type = w[12].i, .kv_heads = w[13].i, .group = w[14].i, .size = w[15].i,
        .block_shift = __builtin_ctzll((uint64_t)w[16].i), .scale = (float)w[17].f, .window = w[18].i,
    };
    const int32_t *query_starts = w[3].p, *starts = w[4].p, *table_rows = w[5].p, *tables = w[6].p;
    const int32_t *partial_starts = w[20].p;
    const int64_t sequences = count(w[0]), head_row = in.group * (in.size + 2);
    float *output = w[19].p, *partials = w[21].p;
    int64_t total = 0;
    for (int64_t s = 0; s < sequences; s++)
        total += num_parts(&in, query_starts[s + 1] - query_starts[s], starts[s]) * in.kv_heads;
    int64_t s = 0, before = 0;
    FOR_TASKS(task, total) {
        // A thread's tasks only grow: it goes on from the sequence of the last one.
        int64_t num_queries, parts;
        for (;; s++) {
            num_queries = query_starts[s + 1] - query_starts[s];
            parts = num_parts(&in, num_queries, starts[s]);
            if (task < before + parts * in.kv_heads) break;
            before += parts * in.kv_heads;
        }
        const int64_t part = parts - 1 - (task - before) / in.kv_heads, head = (task - before) % in.kv_heads;
        const int32_t *table = tables + table_rows[s] * w[7].i;
        const float *queries = in.queries + query_starts[s] * in.query_stride;
        if (num_queries == 1)
            attend_decode(&in, queries, table, starts[s], head, oldest(&in, starts[s]) / SEGMENT + part, &segment,
                          partials + ((partial_starts[s] + part) * in.kv_heads + head) * head_row);
        else
            attend_chunk(&in, queries, table, starts[s], part * QUERY_TILE,
                         smaller(num_queries, (part + 1) * QUERY_TILE), head, &segment,
                         output + query_starts[s] * in.kv_heads * in.group * in.size);
    }
}

// sequences, query_starts [S + 1] int32, starts [S] int32, G, H / G, D, window or 0, output [T, H, D] float,
// partial_starts [S] int32, partials [.., G, H / G, D + 2] float
OPERATION(merge_segments) {
    const Inputs in = {.kv_heads = w[3].i, .group = w[4].i, .size = w[5].i, .window = w[6].i};
    const int64_t sequences = count(w[0]), heads = in.kv_heads * in.group;
    const int32_t *query_starts = w[1].p, *starts = w[2].p, *partial_starts = w[8].p;
    FOR_ROWS(s, sequences) {
        if (query_starts[s + 1] - query_starts[s] != 1) continue;
        const int64_t parts = starts[s] / SEGMENT - oldest(&in, starts[s]) / SEGMENT + 1;
        for (int64_t head = 0; head < heads; head++) {
            State state = {(float *)w[7].p + (query_starts[s] * heads + head) * in.size, -INFINITY, 0.0f};
            memset(state.values, 0, (size_t)in.size * sizeof(float));
            for (int64_t part = 0; part < parts; part++) {
                const float *row = (const float *)w[9].p +
                                   ((partial_starts[s] + part) * heads + head) * (in.size + 2);
                merge(&state, row, row[in.size], row[in.size + 1], in.size);
            }
            for (int64_t d = 0; d < in.size; d++) state.values[d] /= state.sum;
        }
    }
}
