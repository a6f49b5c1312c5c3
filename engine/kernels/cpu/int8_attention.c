// Attention to a segment of an int8 or int4 cache, in exact integer products.
//
// A query becomes codes of fifteen bits with one step; so do a segment's weights, once the steps of the values are in
// them, with fourteen bits of the largest. Both products are then int32 sums over the codes that the cache holds, which
// no instruction set and no company can change. Where instructions multiply bytes a code is two terms, 128 * high + low;
// others multiply sixteen bits anyway.
//
// Four bits are expanded to int8 codes with one step a vector, in integers again: (code * factor + offset) / 256.

#include "attention.h"
#include "int8_tiles.h"

enum {
    // Keys come in whole steps of what the products take.
    KEY_STEP = HAS_TILES ? UNIT_ELEMENTS : WIDTH,
    PAIR = WIDE * PANEL,  // what they are multiplied with at a time
    STRIDE = SEGMENT > MAX_DIM ? SEGMENT : MAX_DIM,
    LARGEST_QUERY = 127 * 128,
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
        transpose((const float *)(from.keys + d), from.stride / 4, (int32_t)0x80808080,
                  (float *)(segment->codes.keys + strip * padded(size) + d * PANEL), WIDTH);
        for (int i = 0; i < WIDTH; i += QUAD)
            interleave(from.values + i * from.stride + d, from.stride,
                       segment->codes.values + d / PANEL * DISTANCE + (strip + i) * PANEL, DISTANCE);
    }
    for (int i = 0; i < WIDTH; i++) {
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
    for (int64_t strip = (first - base) / WIDTH * WIDTH; base + strip < last; strip += WIDTH) {
        const int64_t begin = base + strip;
        if (is_regular && begin >= first && begin + WIDTH <= last) {
            if (begin + AHEAD < last) prefetch_rows(in, row_of(in, table, head, begin + AHEAD), WIDTH);
            const int64_t row = row_of(in, table, head, begin), apart = in->kv_heads;
            pack((Vectors){keys + row * size, values + row * size, apart * size, all_key_scales + row,
                           all_value_scales + row, apart},
                 size, strip, segment);
            continue;
        }
        int8_t copied_keys[WIDTH][MAX_DIM] = {0}, copied_values[WIDTH][MAX_DIM] = {0};
        float key_scales[WIDTH] = {0}, value_scales[WIDTH] = {0};
        for (int64_t i = larger(0, first - begin); i < smaller(WIDTH, last - begin); i++) {
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
    const uint8_t *codes[WIDTH];
    const Half *scales[WIDTH];
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
    enum { FRACTION = 256, MAX_GROUPS = MAX_DIM / INT4_GROUP, HALF_GROUP = INT4_GROUP / 2 };
    const int64_t groups = (size + INT4_GROUP - 1) / INT4_GROUP;
    int32_t factors[MAX_GROUPS][WIDTH], offsets[MAX_GROUPS][WIDTH];
    for (int64_t i = 0; i < WIDTH; i += LANES) {
        Floats scale[MAX_GROUPS], minimum[MAX_GROUPS];
        Ints bits = {0};
        for (int64_t g = 0; g < groups; g++) {
            Half scales[LANES], minimums[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                scales[lane] = from->scales[i + lane][2 * g];
                minimums[lane] = from->scales[i + lane][2 * g + 1];
            }
            scale[g] = load_halves(scales);
            minimum[g] = load_halves(minimums);
            bits = larger_of(bits, (Ints)absolute(minimum[g]));
            bits = larger_of(bits, (Ints)absolute(15.0f * scale[g] + minimum[g]));
        }
        const Ints is_finite = bits < 0x7F800000;  // a NaN's are above infinity's
        const Floats step = choose(bits > 0, (Floats)bits / 127.0f, fill(1.0f)), per_step = (float)FRACTION / step;
        store(steps + i, choose(is_finite, step, fill(NAN)));
        for (int64_t g = 0; g < groups; g++) {
            const Ints factor = round_to_ints(choose(is_finite, scale[g] * per_step, (Floats){0}));
            // Half a step more: the quotient is rounded down.
            const Ints offset = round_to_ints(choose(is_finite, minimum[g] * per_step, (Floats){0})) + FRACTION / 2;
            store((float *)factors[g] + i, (Floats)factor);
            store((float *)offsets[g] + i, (Floats)offset);
        }
    }
    for (int i = 0; i < WIDTH; i++) {
        int64_t g = 0;
        for (; g < size / INT4_GROUP; g++)
            expand_pairs(from->codes[i] + g * HALF_GROUP, HALF_GROUP, factors[g][i], offsets[g][i],
                         expanded[i] + g * INT4_GROUP);
        if (g < groups)
            expand_pairs(from->codes[i] + g * HALF_GROUP, size / 2 - g * HALF_GROUP, factors[g][i], offsets[g][i],
                         expanded[i] + g * INT4_GROUP);
    }
}

void read_int4(const Inputs *in, const int32_t *table, int64_t head, int64_t first, int64_t last, Segment *segment) {
    enum { AHEAD = 64 };
    static const Half nothing[MAX_DIM] = {0};
    const int64_t base = first / SEGMENT * SEGMENT, size = in->size, bytes = size / 2;
    const int64_t pairs = 2 * ((size + INT4_GROUP - 1) / INT4_GROUP);
    _Alignas(64) int8_t expanded_keys[WIDTH][MAX_DIM] = {0}, expanded_values[WIDTH][MAX_DIM] = {0};
    float key_steps[WIDTH], value_steps[WIDTH];
    for (int64_t position = first; position < smaller(first + AHEAD, last); position++)
        prefetch_rows(in, row_of(in, table, head, position), 1);
    for (int64_t strip = (first - base) / WIDTH * WIDTH; base + strip < last; strip += WIDTH) {
        Nibbles keys, values;
        for (int64_t i = 0; i < WIDTH; i++) {
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

#if defined(__AVX512VNNI__)

// Codes of some rows, and their products with two panels at a time, high terms and low ones in turn.
typedef struct {
    _Alignas(64) int8_t codes[2 * INT8_QUERIES][STRIDE];
    _Alignas(64) int32_t sums[2 * INT8_QUERIES][PAIR];
} Operand;

// Codes k … k + LANES - 1 of a row: of fifteen bits.
INLINE void set_codes(Operand *x, int64_t row, int64_t k, Ints code) {
    store_bytes(x->codes[2 * row] + k, code >> 7);
    store_bytes(x->codes[2 * row + 1] + k, code & 127);
}

// Products of all rows' codes from `begin` on.
INLINE void multiply_rows(Operand *x, int64_t rows, int64_t begin, int64_t quads, const uint8_t *panels,
                          int64_t distance) {
    for (int64_t m = 0, size; m < 2 * rows; m += size) {
        Tile *tile = next_tile(2 * rows - m, WIDE, &size);
        tile(panels, distance, x->codes[m] + begin, STRIDE, quads, x->sums[m]);
    }
}

INLINE Ints sums_of(const Operand *x, int64_t row, int64_t n) {
    const Ints high = (Ints)load((const float *)x->sums[2 * row] + n);
    return (high << 7) + (Ints)load((const float *)x->sums[2 * row + 1] + n);
}

#else

enum { ROWS_TOGETHER = 4 };  // as many as `add_wide` has registers for

// Where code k stands.
INLINE int64_t place_of(int64_t k) { return k / QUAD * QUAD + k % 2 * 2 + k % QUAD / 2; }

// Codes of some rows, those of a quad in the order 0, 2, 1, 3, and their products with two panels at a time.
typedef struct {
    _Alignas(64) int16_t codes[INT8_QUERIES][STRIDE];
    _Alignas(64) int32_t sums[INT8_QUERIES][PAIR];
} Operand;

// Codes k … k + LANES - 1 of a row: of fifteen bits.
INLINE void set_codes(Operand *x, int64_t row, int64_t k, Ints code) {
    int16_t *codes = x->codes[row] + k;
#if defined(__AVX2__)
    const __m256i order = _mm256_broadcastsi128_si256(_mm_set_epi64x(-1, 0x0D0C050409080100));
    const __m256i quads = _mm256_shuffle_epi8((__m256i)code, order);
    const __m128i both = _mm_unpacklo_epi64(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
    _mm_storeu_si128((__m128i *)codes, both);
#else
    for (int i = 0; i < LANES; i++) codes[place_of(i)] = (int16_t)code[i];
#endif
}

// Products of some rows' codes from `begin` on, added to sums.
INLINE void add_rows(Operand *x, int64_t row, int rows, int64_t begin, int64_t quads, const uint8_t *panel,
                     int32_t *sums) {
    const int16_t *codes = x->codes[row] + begin;
#if defined(__AVX2__)
    add_wide(panel, codes, STRIDE, rows, quads, sums, PAIR);
#else
    for (int m = 0; m < rows; m++)
        for (int64_t k = 0; k < quads * QUAD; k++)
            for (int output = 0; output < PANEL; output++)
                sums[m * PAIR + output] += (int32_t)panel[k / QUAD * QUAD_BYTES + output * QUAD + k % QUAD] *
                                           codes[m * STRIDE + place_of(k)];
#endif
}

// Products of all rows' codes from `begin` on.
INLINE void multiply_rows(Operand *x, int64_t rows, int64_t begin, int64_t quads, const uint8_t *panels,
                          int64_t distance) {
    memset(x->sums, 0, (size_t)rows * sizeof *x->sums);
    for (int64_t m = 0; m < rows; m += ROWS_TOGETHER)
        for (int n = 0; n < WIDE; n++) {
            const uint8_t *panel = panels + n * distance;
            int32_t *sums = x->sums[m] + n * PANEL;
            switch (smaller(rows - m, ROWS_TOGETHER)) {
            case 1: add_rows(x, m, 1, begin, quads, panel, sums); break;
            case 2: add_rows(x, m, 2, begin, quads, panel, sums); break;
            case 3: add_rows(x, m, 3, begin, quads, panel, sums); break;
            default: add_rows(x, m, ROWS_TOGETHER, begin, quads, panel, sums);
            }
        }
}

INLINE Ints sums_of(const Operand *x, int64_t row, int64_t n) { return (Ints)load((const float *)x->sums[row] + n); }

#endif

// A row's products as floats, less what the panels' 128 added.
INLINE Floats products_of(const Operand *x, int64_t row, int64_t n, int32_t code_sum) {
    return to_floats(sums_of(x, row, n) - 128 * code_sum);
}

// Codes of a query [size], zeros behind them; their sum and step.
INLINE void quantize_query(const float *query, int64_t size, Operand *x, int64_t row, int32_t *sum, float *step) {
    Ints largest = {0};
    for (int64_t d = 0; d < size; d += LANES)
        largest = larger_of(largest, (Ints)absolute(load_part(query + d, size - d)));
    const int32_t bits = largest_int(largest);
    const int is_finite = bits < 0x7F800000;  // a NaN's bits are above all
    const float absmax = is_finite ? fmaxf(float_of_bits(bits), 0x1p-100f) : INFINITY;
    const float steps = LARGEST_QUERY / absmax;
    Ints sums = {0};
    for (int64_t d = 0; d < padded(size); d += LANES) {
        const int is_there = is_finite && d < size;
        const Ints code = is_there ? round_to_ints(load_part(query + d, size - d) * steps) : (Ints){0};
        set_codes(x, row, d, code);
        sums += code;
    }
    *sum = sum_ints(sums);
    *step = is_finite ? absmax / LARGEST_QUERY : NAN;
}

// Whether a row sees only some of a register's keys.
INLINE int is_edge(const Rows *rows, int64_t row, int64_t k) {
    return k < rows->first[row] || k + LANES > rows->last[row];
}

// Scores [SEGMENT] of a row to codes of the weights times the values' steps; their sum and step.
INLINE void quantize_weights(Rows *rows, int64_t row, float *scores, const float *value_scales, int64_t begin,
                             int64_t end, Operand *x, int32_t *code_sum, float *step) {
    Floats largest[PARTS], sum[PARTS] = {{0}}, largest_weighted[PARTS] = {{0}}, sum_weighted[PARTS] = {{0}};
    EACH(p, PARTS) largest[p] = fill(-INFINITY);
    for (int64_t strip = begin; strip < end; strip += WIDTH)
        EACH(p, PARTS) {
            const int64_t k = strip + p * LANES;
            Floats score = load(scores + k);
            if (is_edge(rows, row, k)) {
                score = choose(seen_by(rows, row, k), score, fill(-INFINITY));
                store(scores + k, score);
            }
            largest[p] = maximum(largest[p], score);
        }
    const float top = largest_lane(largest);
    for (int64_t strip = begin; strip < end; strip += WIDTH)
        EACH(p, PARTS) {
            const int64_t k = strip + p * LANES;
            const Floats weight = exp_or_zero(load(scores + k) - top);
            Floats weighted = weight * load(value_scales + k);
            // An unseen key weighs 0, which is not enough where its scale is not a number.
            if (is_edge(rows, row, k)) weighted = choose(seen_by(rows, row, k), weighted, (Floats){0});
            sum[p] += weight;
            largest_weighted[p] = maximum(largest_weighted[p], weighted);
            sum_weighted[p] += weighted;
            store(scores + k, weighted);
        }
    rows->largest[row] = top;
    rows->sum[row] = sum_lanes(sum);
    const float most = fmaxf(largest_lane(largest_weighted), 0x1p-100f), total = sum_lanes(sum_weighted);
    const float steps = LARGEST_WEIGHT / most;
    Ints sums = {0};
    for (int64_t k = begin; k < end; k += LANES) {
        const Ints code = round_to_ints(load(scores + k) * steps);
        set_codes(x, row, k, code);
        sums += code;
    }
    *code_sum = sum_ints(sums);
    // A scale that is not a number shows in the sum, where a maximum might have lost it.
    *step = total == total ? most / LARGEST_WEIGHT : NAN;
}

void attend_to_codes(const Inputs *in, const Segment *segment, Rows *rows) {
    Operand x;
    float scores[INT8_QUERIES][SEGMENT], step[INT8_QUERIES];
    int32_t code_sum[INT8_QUERIES];
    const int64_t size = in->size;
    int64_t first, last;
    seen_by_any(rows, &first, &last);
    for (int64_t row = 0; row < rows->size; row++) {
        quantize_query(rows->queries[row], size, &x, row, code_sum + row, step + row);
        step[row] *= in->scale;
    }
    for (int64_t k = first / PAIR * PAIR; k < last; k += PAIR) {
        multiply_rows(&x, rows->size, 0, (size + QUAD - 1) / QUAD, segment->codes.keys + k * padded(size),
                      padded(size) * PANEL);
        for (int64_t row = 0; row < rows->size; row++)
            EACH(n, PAIR / LANES) {
                const Floats scale = load(segment->codes.key_scales + k + n * LANES);
                store(scores[row] + k + n * LANES, products_of(&x, row, n * LANES, code_sum[row]) * step[row] * scale);
            }
    }
    const int64_t begin = first / KEY_STEP * KEY_STEP, end = (last + KEY_STEP - 1) / KEY_STEP * KEY_STEP;
    for (int64_t row = 0; row < rows->size; row++)
        quantize_weights(rows, row, scores[row], segment->codes.value_scales, begin, end, &x, code_sum + row,
                         step + row);
    for (int64_t d = 0; d < size; d += PAIR) {
        multiply_rows(&x, rows->size, begin, (end - begin) / QUAD, segment->codes.values + d * SEGMENT + begin * PANEL,
                      SEGMENT * PANEL);
        for (int64_t row = 0; row < rows->size; row++)
            EACH(n, PAIR / LANES)
                store(rows->values[row] + d + n * LANES, products_of(&x, row, n * LANES, code_sum[row]) * step[row]);
    }
}
