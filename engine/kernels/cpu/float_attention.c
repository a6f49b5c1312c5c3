// Attention to a segment of a cache of floats. A score is one chain of fused
// products over the head's dimensions, a weighted value one over the segment's keys.

#include "attention.h"

enum {
    STRIP = 4 * WIDTH,  // keys that lie together
    SLAB = 4 * WIDTH,   // dimensions that are multiplied together
    REGISTERS = LANES == 16 ? 4 : 2,  // of a strip or slab, whose sums with a few queries there is room for
};

// A register of dimensions of a cached vector as floats.
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
        uint8_t part[LANES * 4] = {0};  // reading a whole register would leave the cache
        const int64_t bytes = CACHE_BYTES[type];
        memcpy(part, (const uint8_t *)cache + (row * size + d) * bytes, (size_t)(larger(0, size - d) * bytes));
        store(x + d, load_cached(part, 0, type));
    }
}

INLINE void read_as(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last,
                    Segment *segment, int64_t type) {
    const int64_t base = first / SEGMENT * SEGMENT, size = in->size, padded = (size + WIDTH - 1) / WIDTH * WIDTH;
    for (int64_t strip = (first - base) / WIDTH * WIDTH; base + strip < last; strip += WIDTH) {
        for (int64_t i = 0; i < WIDTH; i++) {
            const int64_t position = base + strip + i;
            float *key = segment->floats.staging + i * padded, *value = segment->floats.values + (strip + i) * padded;
            if (position < first || position >= last) {  // nobody's, but its weight of 0 is multiplied with it
                memset(key, 0, (size_t)padded * sizeof *key);
                memset(value, 0, (size_t)padded * sizeof *value);
                continue;
            }
            const int64_t row = row_of(in, table, head, position);
            if (position + WIDTH < last)
                prefetch_rows(in, row_of(in, table, head, position + WIDTH), 1);
            read_vector(in->keys, row, key, size, padded, type);
            read_vector(in->values, row, value, size, padded, type);
        }
        float *columns = segment->floats.keys + strip / STRIP * STRIP * padded + strip % STRIP;
        for (int64_t d = 0; d < padded; d += WIDTH)
            transpose(segment->floats.staging + d, padded, 0, columns + d * STRIP, STRIP);
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
        for (int64_t k = 0; k < STRIP; k += REGISTERS * LANES) {                                                   \
            Floats sums[ROWS][REGISTERS];                                                                          \
            EACH(m, ROWS) EACH(n, REGISTERS) sums[m][n] = (Floats){0};                                             \
            for (int64_t d = 0; d < size; d++) {                                                                   \
                Floats key[REGISTERS];                                                                             \
                EACH(n, REGISTERS) key[n] = load(keys + d * STRIP + k + n * LANES);                                \
                EACH(m, ROWS) {                                                                                    \
                    const Floats query = fill(queries[m][d]);                                                      \
                    EACH(n, REGISTERS) sums[m][n] = multiply_add(query, key[n], sums[m][n]);                       \
                }                                                                                                  \
            }                                                                                                      \
            EACH(m, ROWS) EACH(n, REGISTERS) store(scores + m * SEGMENT + k + n * LANES, sums[m][n] * scale);      \
        }                                                                                                          \
    }

// A slab of the values of keys first … last - 1, weighted.
#define VALUES(ROWS)                                                                                               \
    static void values_##ROWS(const float *weights, const float *values, int64_t stride, int64_t first,            \
                              int64_t last, float *output) {                                                       \
        for (int64_t d = 0; d < SLAB; d += REGISTERS * LANES) {                                                    \
            Floats sums[ROWS][REGISTERS];                                                                          \
            EACH(m, ROWS) EACH(n, REGISTERS) sums[m][n] = (Floats){0};                                             \
            for (int64_t key = first; key < last; key++) {                                                         \
                Floats value[REGISTERS];                                                                           \
                EACH(n, REGISTERS) value[n] = load(values + key * stride + d + n * LANES);                         \
                EACH(m, ROWS) {                                                                                    \
                    const Floats weight = fill(weights[m * SEGMENT + key]);                                        \
                    EACH(n, REGISTERS) sums[m][n] = multiply_add(weight, value[n], sums[m][n]);                    \
                }                                                                                                  \
            }                                                                                                      \
            EACH(m, ROWS) EACH(n, REGISTERS) store(output + m * MAX_DIM + d + n * LANES, sums[m][n]);              \
        }                                                                                                          \
    }

#define BY_ROWS(name) {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}
SCORES(1) SCORES(2) SCORES(3) SCORES(4) SCORES(5) SCORES(6)
VALUES(1) VALUES(2) VALUES(3) VALUES(4) VALUES(5) VALUES(6)

// Scores [SEGMENT] to weights in place, zeros for keys that the row does not see.
INLINE void soften(Rows *rows, int64_t row, float *scores, int64_t begin, int64_t end) {
    Floats largest[PARTS], sum[PARTS] = {{0}};
    EACH(p, PARTS) largest[p] = fill(-INFINITY);
    for (int64_t k = begin; k < end; k += WIDTH)
        EACH(p, PARTS) {
            const int64_t key = k + p * LANES;
            const Floats score = choose(seen_by(rows, row, key), load(scores + key), fill(-INFINITY));
            largest[p] = maximum(largest[p], score);
        }
    const float top = largest_lane(largest);
    for (int64_t k = begin; k < end; k += WIDTH)
        EACH(p, PARTS) {
            const int64_t key = k + p * LANES;
            const Floats weight = exp_negative(load(scores + key) - top);
            store(scores + key, choose(seen_by(rows, row, key), weight, (Floats){0}));
            sum[p] += load(scores + key);
        }
    rows->largest[row] = top;
    rows->sum[row] = sum_lanes(sum);
}

INLINE int is_finite(const float *x, int64_t size) {
    int is_finite = 1;
    for (int64_t d = 0; d < size; d++) is_finite &= x[d] - x[d] == 0.0f;
    return is_finite;
}

void attend_to_floats(const Inputs *in, const Segment *segment, Rows *rows) {
    typedef void Scores(const float *const *, const float *, int64_t, float, float *);
    typedef void Values(const float *, const float *, int64_t, int64_t, int64_t, float *);
    static Scores *const scores_of[] = BY_ROWS(scores);
    static Values *const values_of[] = BY_ROWS(values);
    const int64_t padded = (in->size + WIDTH - 1) / WIDTH * WIDTH;
    float scores[FLOAT_QUERIES * SEGMENT];
    int64_t first, last;
    seen_by_any(rows, &first, &last);
    for (int64_t strip = first / STRIP * STRIP; strip < last; strip += STRIP)
        scores_of[rows->size - 1](rows->queries, segment->floats.keys + strip * padded, in->size, in->scale, scores + strip);
    for (int64_t row = 0; row < rows->size; row++)
        soften(rows, row, scores + row * SEGMENT, first / WIDTH * WIDTH, last);
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

