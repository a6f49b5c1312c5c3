// What attention over a cache of floats and over one of integer codes share: a segment of keys, and the queries that
// attend to it.

#ifndef ATTENTION_H
#define ATTENTION_H

#include "kernels.h"

enum {
    SEGMENT = 256,
    MAX_DIM = 256,
    FLOAT_QUERIES = 6,  // that attend together
#if defined(__AMX_INT8__) || defined(EMULATE_TILES)
    INT8_QUERIES = 16,
#elif defined(__AVX512VNNI__)
    INT8_QUERIES = 6,
#else
    INT8_QUERIES = 12,
#endif
    MAX_QUERIES = 16,
};

// What all tasks of an operation read.
typedef struct {
    const float *queries;
    int64_t query_stride;
    const void *keys, *values;
    const void *key_scales, *value_scales;
    int64_t type, kv_heads, group, size, block_shift;
    float scale;
    int64_t window;
} Inputs;

// A segment of one head. As floats: keys in strips (see float_attention.c), values [SEGMENT][size padded to 16]. As
// int8 codes: keys in panels of 16 keys, values in panels of 16 dimensions (see int8_tiles.h), and their scales.
typedef union {
    struct {
        float keys[SEGMENT * MAX_DIM], values[SEGMENT * MAX_DIM], staging[WIDTH * MAX_DIM];
    } floats;
    struct {
        uint8_t keys[SEGMENT * MAX_DIM], values[SEGMENT * MAX_DIM];
        float key_scales[SEGMENT], value_scales[SEGMENT];
    } codes;
} Segment;

// A few queries, which keys of the segment each sees (the others: first = last), and what their softmax comes to:
// values weighted relative to the largest score, not divided by the weights' sum.
typedef struct {
    int64_t size;
    const float *queries[MAX_QUERIES];
    int64_t first[MAX_QUERIES], last[MAX_QUERIES];
    float largest[MAX_QUERIES], sum[MAX_QUERIES];
    float values[MAX_QUERIES][MAX_DIM];
} Rows;

// Keys first … last - 1, all in one segment; then queries attend to what was read.
void read_floats(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last, Segment *segment);
void attend_to_floats(const Inputs *in, const Segment *segment, Rows *rows);
void read_int8(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last, Segment *segment);
void read_int4(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last, Segment *segment);
void attend_to_codes(const Inputs *in, const Segment *segment, Rows *rows);

INLINE int64_t row_of(const Inputs *in, const int32_t *table, int64_t head, int64_t position) {
    const int64_t block = table[position >> in->block_shift];
    return ((block << in->block_shift) + (position & ((1 << in->block_shift) - 1))) * in->kv_heads + head;
}

// Asks for the vectors at some positions of a block: heads lie apart, which the processor's own prefetching does not
// see.
INLINE void prefetch_rows(const Inputs *in, int64_t row, int64_t positions) {
    const int64_t bytes = in->type == INT4 ? in->size / 2 : in->size * CACHE_BYTES[in->type];
    const uint8_t *keys = (const uint8_t *)in->keys + row * bytes, *values = (const uint8_t *)in->values + row * bytes;
    for (int64_t i = 0; i < positions; i++)
        for (int64_t line = 0; line < bytes; line += 64) {
            __builtin_prefetch(keys + i * in->kv_heads * bytes + line);
            __builtin_prefetch(values + i * in->kv_heads * bytes + line);
        }
}

// The segment's keys that any of the rows sees.
INLINE void seen_by_any(const Rows *rows, int64_t *first, int64_t *last) {
    *first = SEGMENT, *last = 0;
    for (int64_t row = 0; row < rows->size; row++) {
        if (rows->first[row] >= rows->last[row]) continue;
        *first = smaller(*first, rows->first[row]);
        *last = larger(*last, rows->last[row]);
    }
}

// Which of a register's keys, from k on, a row sees.
INLINE Ints seen_by(const Rows *rows, int64_t row, int64_t k) {
    const Ints lane = lane_numbers();
    return (lane >= (int32_t)(rows->first[row] - k)) & (lane < (int32_t)(rows->last[row] - k));
}

// Sixteen rows of sixteen words to columns, some bits of each word flipped.
INLINE void transpose(const float *rows, int64_t row_stride, int32_t flipped, float *columns, int64_t column_stride) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_xor_ps(_mm512_loadu_ps(rows + i * row_stride), _mm512_castsi512_ps(_mm512_set1_epi32(flipped)));
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
#elif defined(__AVX2__)
    for (int part = 0; part < 4; part++) {
        const int row = part / 2 * 8, column = part % 2 * 8;
        const __m256 flips = _mm256_castsi256_ps(_mm256_set1_epi32(flipped));
        __m256 a[8], b[8];
        for (int i = 0; i < 8; i++)
            a[i] = _mm256_xor_ps(_mm256_loadu_ps(rows + (row + i) * row_stride + column), flips);
        for (int i = 0; i < 4; i++) {
            b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
        }
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++) {
                a[4 * i + 2 * j] = _mm256_shuffle_ps(b[4 * i + j], b[4 * i + 2 + j], 0x44);
                a[4 * i + 2 * j + 1] = _mm256_shuffle_ps(b[4 * i + j], b[4 * i + 2 + j], 0xEE);
            }
        for (int i = 0; i < 4; i++) {
            float *first = columns + (column + i) * column_stride + row;
            _mm256_storeu_ps(first, _mm256_permute2f128_ps(a[i], a[4 + i], 0x20));
            _mm256_storeu_ps(first + 4 * column_stride, _mm256_permute2f128_ps(a[i], a[4 + i], 0x31));
        }
    }
#else
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < WIDTH; j++)
            ((int32_t *)columns)[j * column_stride + i] = ((const int32_t *)rows)[i * row_stride + j] ^ flipped;
#endif
}

#endif
