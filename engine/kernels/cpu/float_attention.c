// Attention to a segment of a cache of floats. A score is one chain of fused
// products over the head's dimensions, a weighted value one over the segment's keys.

#include "attention.h"

enum {
    STRIP = 4 * LANES,  // keys whose scores with a few queries fit into the registers
    SLAB = 4 * LANES,   // dimensions whose sums do
};

// Sixteen dimensions of a cached vector as floats.
INLINE Floats load_cached(const void *cache, int64_t offset, int64_t type) {
    if (type == FLOAT32) return load((const float *)cache + offset);
    if (type == BFLOAT16) return (Floats)(widen_halves((const uint16_t *)cache + offset) << 16);
    if (type == FLOAT16) return load_halves((const Half *)cache + offset);
    const Ints code = widen_bytes((const int8_t *)cache + offset);
    // Exponent and fraction where float32 has them, then the exponents' bias; exact, subnormals too.
    const Floats size = (Floats)((code & 0x7F) << 20) * 0x1p120f;
    return (Floats)(((Ints)size) | ((code & 0x80) << 24));
}

// One vector of the cache, `padded` floats.
INLINE void read_vector(const void *cache, int64_t row, float *x, int64_t size, int64_t padded, int64_t type) {
    for (int64_t d = 0; d < padded; d += LANES) {
        if (size - d >= LANES) {
            store(x + d, load_cached(cache, row * size + d, type));
            continue;
        }
        uint8_t part[LANES * 4] = {0};  // reading sixteen would leave the cache
        const int64_t bytes = CACHE_BYTES[type];
        memcpy(part, (const uint8_t *)cache + (row * size + d) * bytes, (size_t)((size - d) * bytes));
        store(x + d, load_cached(part, 0, type));
    }
}

INLINE void read_as(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last,
                    Segment *segment, int64_t type) {
    const int64_t base = first / SEGMENT * SEGMENT, size = in->size, padded = (size + LANES - 1) / LANES * LANES;
    for (int64_t strip = (first - base) / LANES * LANES; base + strip < last; strip += LANES) {
        for (int64_t i = 0; i < LANES; i++) {
            const int64_t position = base + strip + i;
            float *key = segment->floats.staging + i * padded, *value = segment->floats.values + (strip + i) * padded;
            if (position < first || position >= last) {  // nobody's, but its weight of 0 is multiplied with it
                memset(key, 0, (size_t)padded * sizeof *key);
                memset(value, 0, (size_t)padded * sizeof *value);
                continue;
            }
            const int64_t row = row_of(in, table, head, position);
            if (position + LANES < last)
                prefetch_rows(in, row_of(in, table, head, position + LANES), 1);
            read_vector(in->keys, row, key, size, padded, type);
            read_vector(in->values, row, value, size, padded, type);
        }
        float *columns = segment->floats.keys + strip / STRIP * STRIP * padded + strip % STRIP;
        for (int64_t d = 0; d < padded; d += LANES)
            transpose(segment->floats.staging + d, padded, (Ints){0}, columns + d * STRIP, STRIP);
    }
}

void read_floats(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last, Segment *segment) {
    switch (in->type) {
        case FLOAT32: read_as(in, table, head, first, last, segment, FLOAT32); break;
        case BFLOAT16: read_as(in, table, head, first, last, segment, BFLOAT16); break;
        case FLOAT16: read_as(in, table, head, first, last, segment, FLOAT16); break;
        default: read_as(in, table, head, first, last, segment, FP8);
    }
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

// Scores [SEGMENT] to weights in place, zeros for keys that the row does not see.
INLINE void soften(Rows *rows, int64_t row, float *scores, int64_t begin, int64_t end) {
    Floats largest = fill(-INFINITY), sum = {0};
    for (int64_t k = begin; k < end; k += LANES)
        largest = maximum(largest, choose(seen_by(rows, row, k), load(scores + k), fill(-INFINITY)));
    const float top = largest_lane(largest);
    for (int64_t k = begin; k < end; k += LANES) {
        const Floats weight = choose(seen_by(rows, row, k), exp_negative(load(scores + k) - top), (Floats){0});
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

void attend_to_floats(const Inputs *in, const Segment *segment, Rows *rows) {
    typedef void Scores(const float *const *, const float *, int64_t, float, float *);
    typedef void Values(const float *, const float *, int64_t, int64_t, int64_t, float *);
    static Scores *const scores_of[] = BY_ROWS(scores);
    static Values *const values_of[] = BY_ROWS(values);
    const int64_t padded = (in->size + LANES - 1) / LANES * LANES;
    float scores[FLOAT_QUERIES * SEGMENT];
    int64_t first, last;
    seen_by_any(rows, &first, &last);
    for (int64_t strip = first / STRIP * STRIP; strip < last; strip += STRIP)
        scores_of[rows->size - 1](rows->queries, segment->floats.keys + strip * padded, in->size, in->scale, scores + strip);
    for (int64_t row = 0; row < rows->size; row++)
        soften(rows, row, scores + row * SEGMENT, first / LANES * LANES, last);
    for (int64_t d = 0; d < in->size; d += SLAB)
        values_of[rows->size - 1](scores, segment->floats.values + d, padded, first, last, rows->values[0] + d);
    // A key that a row does not see weighs 0, which is not enough where its value is NaN or infinite.
    for (int64_t row = 0; row < rows->size; row++) {
        const int sees_all = rows->first[row] == first && rows->last[row] == last;
        if (sees_all || rows->first[row] >= rows->last[row] || is_finite(rows->values[row], in->size)) continue;
        for (int64_t d = 0; d < in->size; d += SLAB)
            values_1(scores + row * SEGMENT, segment->floats.values + d, padded, rows->first[row], rows->last[row],
                     rows->values[row] + d);
    }
}

