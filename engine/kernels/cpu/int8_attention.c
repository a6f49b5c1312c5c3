// Attention to a segment of an int8 or int4 cache, in exact integer products.
//
// A query becomes two int8 terms with one step, 128 * high + low, fifteen bits in all; so do a segment's weights,
// once the steps of the values are in them, fourteen bits of the largest. Both products are then int32 sums over the
// codes that the cache holds, which no instruction set and no company can change.
//
// Four bits are expanded to int8 codes with one step a vector, in integers again: (code * factor + offset) / 256.

#include "attention.h"
#include "int8_tiles.h"

enum {
    // Keys come in whole steps of what the products take.
    KEY_STEP = HAS_TILES ? UNIT_ELEMENTS : LANES,
    TERMS = 2,
    LARGEST_QUERY = 127 * 128,   // and up to 63 above: low terms are -64 … 63
    LARGEST_WEIGHT = 127 * 128 + 127,
};

// A head's dimensions as keys are packed: whole steps of the tile unit, zeros in the queries' codes behind `size`.
INLINE int64_t padded(int64_t size) { return (size + UNIT_ELEMENTS - 1) / UNIT_ELEMENTS * UNIT_ELEMENTS; }

// Four rows of 64 codes, `stride` bytes apart, to four panels `distance` bytes apart: 16 columns × 4 bytes each.
INLINE void interleave(const int8_t *rows, int64_t stride, uint8_t *panels, int64_t distance) {
#if defined(__AVX512BW__)
    __m512i a[4], b[4];
    for (int i = 0; i < 4; i++)
        a[i] = _mm512_xor_si512(_mm512_loadu_si512(rows + i * stride), _mm512_set1_epi8((char)0x80));
    b[0] = _mm512_unpacklo_epi8(a[0], a[1]);
    b[1] = _mm512_unpackhi_epi8(a[0], a[1]);
    b[2] = _mm512_unpacklo_epi8(a[2], a[3]);
    b[3] = _mm512_unpackhi_epi8(a[2], a[3]);
    // Of each sixteen columns: 0 … 3, 4 … 7, 8 … 11, 12 … 15.
    a[0] = _mm512_unpacklo_epi16(b[0], b[2]);
    a[1] = _mm512_unpackhi_epi16(b[0], b[2]);
    a[2] = _mm512_unpacklo_epi16(b[1], b[3]);
    a[3] = _mm512_unpackhi_epi16(b[1], b[3]);
    b[0] = _mm512_shuffle_i32x4(a[0], a[1], 0x44);
    b[1] = _mm512_shuffle_i32x4(a[0], a[1], 0xEE);
    b[2] = _mm512_shuffle_i32x4(a[2], a[3], 0x44);
    b[3] = _mm512_shuffle_i32x4(a[2], a[3], 0xEE);
    _mm512_storeu_si512(panels, _mm512_shuffle_i32x4(b[0], b[2], 0x88));
    _mm512_storeu_si512(panels + distance, _mm512_shuffle_i32x4(b[0], b[2], 0xDD));
    _mm512_storeu_si512(panels + 2 * distance, _mm512_shuffle_i32x4(b[1], b[3], 0x88));
    _mm512_storeu_si512(panels + 3 * distance, _mm512_shuffle_i32x4(b[1], b[3], 0xDD));
#elif defined(__AVX2__)
    for (int part = 0; part < 2; part++, rows += 32, panels += 2 * distance) {
        __m256i a[4], b[4];
        for (int i = 0; i < 4; i++)
            a[i] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(rows + i * stride)),
                                    _mm256_set1_epi8((char)0x80));
        b[0] = _mm256_unpacklo_epi8(a[0], a[1]);
        b[1] = _mm256_unpackhi_epi8(a[0], a[1]);
        b[2] = _mm256_unpacklo_epi8(a[2], a[3]);
        b[3] = _mm256_unpackhi_epi8(a[2], a[3]);
        // Of each sixteen columns: 0 … 3, 4 … 7, 8 … 11, 12 … 15.
        a[0] = _mm256_unpacklo_epi16(b[0], b[2]);
        a[1] = _mm256_unpackhi_epi16(b[0], b[2]);
        a[2] = _mm256_unpacklo_epi16(b[1], b[3]);
        a[3] = _mm256_unpackhi_epi16(b[1], b[3]);
        for (int i = 0; i < 2; i++) {
            __m256i *first = (__m256i *)panels + i, *second = (__m256i *)(panels + distance) + i;
            _mm256_storeu_si256(first, _mm256_permute2x128_si256(a[2 * i], a[2 * i + 1], 0x20));
            _mm256_storeu_si256(second, _mm256_permute2x128_si256(a[2 * i], a[2 * i + 1], 0x31));
        }
    }
#else
    for (int column = 0; column < 64; column++)
        for (int row = 0; row < 4; row++)
            panels[column / PANEL * distance + column % PANEL * QUAD + row] =
                (uint8_t)(rows[row * stride + column] + 128);
#endif
}

// Sixteen keys and values, from `strip` of the segment on.
typedef struct {
    const int8_t *keys, *values;
    int64_t stride;
    const float *key_scales, *value_scales;
    int64_t scale_stride;
} Vectors;

INLINE void pack(Vectors from, int64_t size, int64_t strip, Segment *segment) {
    enum { DISTANCE = SEGMENT * PANEL };
    for (int64_t d = 0; d < size; d += 64) {
        transpose((const float *)(from.keys + d), from.stride / 4, (Ints){0} + (int32_t)0x80808080,
                  (float *)(segment->codes.keys + strip * padded(size) + d * PANEL), LANES);
        for (int i = 0; i < LANES; i += QUAD)
            interleave(from.values + i * from.stride + d, from.stride,
                       segment->codes.values + d / PANEL * DISTANCE + (strip + i) * PANEL, DISTANCE);
    }
    for (int i = 0; i < LANES; i++) {
        segment->codes.key_scales[strip + i] = from.key_scales[i * from.scale_stride];
        segment->codes.value_scales[strip + i] = from.value_scales[i * from.scale_stride];
    }
}

void read_int8(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last, Segment *segment) {
    enum { AHEAD = 64 };
    const int64_t base = first / SEGMENT * SEGMENT, size = in->size;
    const int8_t *keys = in->keys, *values = in->values;
    const float *all_key_scales = in->key_scales, *all_value_scales = in->value_scales;
    // Sixteen keys of a block lie one stride from each other.
    const int is_regular = in->block_shift >= 4 && size % 64 == 0;
    for (int64_t position = first; position < smaller(first + AHEAD, last); position++)
        prefetch_rows(in, row_of(in, table, head, position), 1);
    for (int64_t strip = (first - base) / LANES * LANES; base + strip < last; strip += LANES) {
        const int64_t begin = base + strip;
        if (is_regular && begin >= first && begin + LANES <= last) {
            if (begin + AHEAD < last) prefetch_rows(in, row_of(in, table, head, begin + AHEAD), LANES);
            const int64_t row = row_of(in, table, head, begin), apart = in->kv_heads;
            pack((Vectors){keys + row * size, values + row * size, apart * size, all_key_scales + row,
                           all_value_scales + row, apart},
                 size, strip, segment);
            continue;
        }
        int8_t copied_keys[LANES][MAX_DIM] = {0}, copied_values[LANES][MAX_DIM] = {0};
        float key_scales[LANES] = {0}, value_scales[LANES] = {0};
        for (int64_t i = larger(0, first - begin); i < smaller(LANES, last - begin); i++) {
            const int64_t row = row_of(in, table, head, begin + i);
            memcpy(copied_keys[i], keys + row * size, (size_t)size);
            memcpy(copied_values[i], values + row * size, (size_t)size);
            key_scales[i] = all_key_scales[row];
            value_scales[i] = all_value_scales[row];
        }
        pack((Vectors){copied_keys[0], copied_values[0], MAX_DIM, key_scales, value_scales, 1}, size, strip, segment);
    }
}

// Sixteen vectors in four bits: their codes, and their groups' scales and minimums in turn.
typedef struct {
    const uint8_t *codes[LANES];
    const Half *scales[LANES];
} Nibbles;

// Pairs of a group, up to sixteen, as int8 codes. In sixteen bits, of which the upper eight are the code: none leaves
// the grid.
INLINE void expand_pairs(const uint8_t *pairs, int64_t count, int32_t factor, int32_t offset, int8_t *codes) {
    const uint16_t f = (uint16_t)factor, o = (uint16_t)offset;
    for (int64_t i = 0; i < count; i++) {
        const uint16_t even = (uint16_t)((pairs[i] & 15) * f + o), odd = (uint16_t)((pairs[i] >> 4) * f + o);
        const uint16_t both = (uint16_t)((even >> 8) | (odd & 0xFF00));
        memcpy(codes + 2 * i, &both, sizeof both);
    }
}

// Their int8 codes and steps: the largest that a vector's groups can stand for is 127 steps.
INLINE void expand(const Nibbles *from, int64_t size, int8_t (*expanded)[MAX_DIM], float *steps) {
    enum { FRACTION = 256, MAX_GROUPS = MAX_DIM / INT4_GROUP, PAIRS = INT4_GROUP / 2 };
    const int64_t groups = (size + INT4_GROUP - 1) / INT4_GROUP;
    Floats scale[MAX_GROUPS], minimum[MAX_GROUPS];
    Ints bits = {0};
    for (int64_t g = 0; g < groups; g++) {
        Half scales[LANES], minimums[LANES];
        for (int i = 0; i < LANES; i++) {
            scales[i] = from->scales[i][2 * g];
            minimums[i] = from->scales[i][2 * g + 1];
        }
        scale[g] = load_halves(scales);
        minimum[g] = load_halves(minimums);
        bits = larger_of(bits, (Ints)absolute(minimum[g]));
        bits = larger_of(bits, (Ints)absolute(15.0f * scale[g] + minimum[g]));
    }
    const Ints is_finite = bits < 0x7F800000;  // a NaN's are above infinity's
    const Floats step = choose(bits > 0, (Floats)bits / 127.0f, fill(1.0f)), per_step = (float)FRACTION / step;
    store(steps, choose(is_finite, step, fill(NAN)));
    int32_t factors[MAX_GROUPS][LANES], offsets[MAX_GROUPS][LANES];
    for (int64_t g = 0; g < groups; g++) {
        const Ints factor = round_to_ints(choose(is_finite, scale[g] * per_step, (Floats){0}));
        // Half a step more: the quotient is rounded down.
        const Ints offset = round_to_ints(choose(is_finite, minimum[g] * per_step, (Floats){0})) + FRACTION / 2;
        memcpy(factors[g], &factor, sizeof factor);
        memcpy(offsets[g], &offset, sizeof offset);
    }
    for (int i = 0; i < LANES; i++) {
        int64_t g = 0;
        for (; g < size / INT4_GROUP; g++)
            expand_pairs(from->codes[i] + g * PAIRS, PAIRS, factors[g][i], offsets[g][i], expanded[i] + g * INT4_GROUP);
        if (g < groups)
            expand_pairs(from->codes[i] + g * PAIRS, size / 2 - g * PAIRS, factors[g][i], offsets[g][i],
                         expanded[i] + g * INT4_GROUP);
    }
}

void read_int4(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last, Segment *segment) {
    enum { AHEAD = 64 };
    static const Half nothing[MAX_DIM] = {0};
    const int64_t base = first / SEGMENT * SEGMENT, size = in->size, bytes = size / 2;
    const int64_t pairs = 2 * ((size + INT4_GROUP - 1) / INT4_GROUP);
    _Alignas(64) int8_t expanded_keys[LANES][MAX_DIM] = {0}, expanded_values[LANES][MAX_DIM] = {0};
    float key_steps[LANES], value_steps[LANES];
    for (int64_t position = first; position < smaller(first + AHEAD, last); position++)
        prefetch_rows(in, row_of(in, table, head, position), 1);
    for (int64_t strip = (first - base) / LANES * LANES; base + strip < last; strip += LANES) {
        Nibbles keys, values;
        for (int64_t i = 0; i < LANES; i++) {
            const int64_t position = base + strip + i;
            keys.codes[i] = values.codes[i] = (const uint8_t *)nothing;
            keys.scales[i] = values.scales[i] = nothing;
            if (position < first || position >= last) continue;
            if (position + AHEAD < last) prefetch_rows(in, row_of(in, table, head, position + AHEAD), 1);
            const int64_t row = row_of(in, table, head, position);
            keys.codes[i] = (const uint8_t *)in->keys + row * bytes;
            values.codes[i] = (const uint8_t *)in->values + row * bytes;
            keys.scales[i] = (const Half *)in->key_scales + row * pairs;
            values.scales[i] = (const Half *)in->value_scales + row * pairs;
        }
        expand(&keys, size, expanded_keys, key_steps);
        expand(&values, size, expanded_values, value_steps);
        pack((Vectors){expanded_keys[0], expanded_values[0], MAX_DIM, key_steps, value_steps, 1}, size, strip, segment);
    }
}

// 128 * sum of the high terms' row + sum of the low terms' row, less what the panels' 128 added.
INLINE Floats combine(const int32_t *high, const int32_t *low, int32_t sum) {
    const Ints h = *(const Ints *)high, l = *(const Ints *)low;
    return to_floats((h << 7) + l - 128 * sum);
}

// Codes of a query [size], zeros behind them; their sum and step.
INLINE void quantize_query(const float *x, int64_t size, int8_t *high, int8_t *low, int32_t *sum, float *step) {
    Ints largest = {0};
    for (int64_t d = 0; d < size; d += LANES)
        largest = larger_of(largest, (Ints)absolute(load_part(x + d, size - d)));  // NaN's bits are above all
    const int is_finite = !any(largest >= 0x7F800000);
    const float absmax = is_finite ? fmaxf(largest_lane((Floats)largest), 0x1p-100f) : INFINITY;
    const float steps = LARGEST_QUERY / absmax;
    Ints sums = {0};
    for (int64_t d = 0; d < padded(size); d += LANES) {
        const int is_there = is_finite && d < size;
        const Ints code = is_there ? round_to_ints(load_part(x + d, size - d) * steps) : (Ints){0};
        const Ints upper = (code + 64) >> 7;
        const Bytes highs = narrow(upper), lows = narrow(code - (upper << 7));
        memcpy(high + d, &highs, LANES);
        memcpy(low + d, &lows, LANES);
        sums += code;
    }
    *sum = sum_ints(sums);
    *step = is_finite ? absmax / LARGEST_QUERY : NAN;
}

// Scores [SEGMENT] of a row to codes of the weights times the values' steps; their sum and step.
INLINE void quantize_weights(Rows *rows, int64_t row, float *scores, const float *value_scales, int64_t begin,
                             int64_t end, int8_t *high, int8_t *low, int32_t *code_sum, float *step) {
    Floats largest = fill(-INFINITY), sum = {0}, largest_weighted = {0}, sum_weighted = {0};
    for (int64_t k = begin; k < end; k += LANES) {
        Floats score = load(scores + k);
        if (k < rows->first[row] || k + LANES > rows->last[row]) {
            score = choose(seen_by(rows, row, k), score, fill(-INFINITY));
            store(scores + k, score);
        }
        largest = maximum(largest, score);
    }
    const float top = largest_lane(largest);
    for (int64_t k = begin; k < end; k += LANES) {
        const Floats weight = exp_or_zero(load(scores + k) - top);
        Floats weighted = weight * load(value_scales + k);
        // An unseen key weighs 0, which is not enough where its scale is not a number.
        if (k < rows->first[row] || k + LANES > rows->last[row])
            weighted = choose(seen_by(rows, row, k), weighted, (Floats){0});
        sum += weight;
        largest_weighted = maximum(largest_weighted, weighted);
        sum_weighted += weighted;
        store(scores + k, weighted);
    }
    rows->largest[row] = top;
    rows->sum[row] = sum_lanes(sum);
    const float most = fmaxf(largest_lane(largest_weighted), 0x1p-100f), total = sum_lanes(sum_weighted);
    const float steps = LARGEST_WEIGHT / most;
    Ints sums = {0};
    for (int64_t k = begin; k < end; k += LANES) {
        const Ints code = round_to_ints(load(scores + k) * steps);
        const Bytes highs = narrow(code >> 7), lows = narrow(code & 127);
        memcpy(high + k, &highs, LANES);
        memcpy(low + k, &lows, LANES);
        sums += code;
    }
    *code_sum = sum_ints(sums);
    // A scale that is not a number shows in the sum, where a maximum might have lost it.
    *step = total == total ? most / LARGEST_WEIGHT : NAN;
}

// Products of all rows with two panels: sums [row][panel][PANEL].
INLINE void multiply_rows(const uint8_t *panels, int64_t distance, const int8_t *codes, int64_t stride, int64_t rows,
                          int64_t quads, int32_t *sums) {
    for (int64_t m = 0, size; m < rows; m += size) {
        Tile *tile = next_tile(rows - m, WIDE, &size);
        tile(panels, distance, codes + m * stride, stride, quads, sums + m * WIDE * PANEL);
    }
}

void attend_to_codes(const Inputs *in, const Segment *segment, Rows *rows) {
    enum { STRIDE = SEGMENT > MAX_DIM ? SEGMENT : MAX_DIM, PAIR = WIDE * PANEL };
    _Alignas(64) int8_t codes[TERMS * INT8_QUERIES][STRIDE];
    _Alignas(64) int32_t sums[TERMS * INT8_QUERIES][PAIR];
    float scores[INT8_QUERIES][SEGMENT], step[INT8_QUERIES];
    int32_t code_sum[INT8_QUERIES];
    const int64_t size = in->size, num_rows = TERMS * rows->size;
    int64_t first, last;
    seen_by_any(rows, &first, &last);
    for (int64_t row = 0; row < rows->size; row++) {
        quantize_query(rows->queries[row], size, codes[2 * row], codes[2 * row + 1], code_sum + row, step + row);
        step[row] *= in->scale;
    }
    for (int64_t k = first / PAIR * PAIR; k < last; k += PAIR) {
        multiply_rows(segment->codes.keys + k * padded(size), padded(size) * PANEL, codes[0], STRIDE, num_rows,
                      (size + QUAD - 1) / QUAD, sums[0]);
        for (int64_t row = 0; row < rows->size; row++)
            for (int64_t n = 0; n < PAIR; n += LANES)
                store(scores[row] + k + n, combine(sums[2 * row] + n, sums[2 * row + 1] + n, code_sum[row]) * step[row] *
                                               load(segment->codes.key_scales + k + n));
    }
    const int64_t begin = first / KEY_STEP * KEY_STEP, end = (last + KEY_STEP - 1) / KEY_STEP * KEY_STEP;
    for (int64_t row = 0; row < rows->size; row++)
        quantize_weights(rows, row, scores[row], segment->codes.value_scales, begin, end, codes[2 * row],
                         codes[2 * row + 1], code_sum + row, step + row);
    for (int64_t d = 0; d < size; d += PAIR) {
        multiply_rows(segment->codes.values + d * SEGMENT + begin * PANEL, SEGMENT * PANEL, codes[0] + begin, STRIDE,
                      num_rows, (end - begin) / QUAD, sums[0]);
        for (int64_t row = 0; row < rows->size; row++)
            for (int64_t n = 0; n < PAIR; n += LANES)
                store(rows->values[row] + d + n,
                      combine(sums[2 * row] + n, sums[2 * row + 1] + n, code_sum[row]) * step[row]);
    }
}
