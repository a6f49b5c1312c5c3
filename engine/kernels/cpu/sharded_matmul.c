// Products of int8 activations with int8 weights whose input features are shared by ranks, each of which has whole blocks
// of 32 of them (engine/kernels/sharded_matmul.py). What ranks exchange is exact: maxima, and sums of integers.

#include "term_sums.h"

enum { INFINITE = 0x7F800000 };  // infinity's bits

// rows, x [M, K] float, x's stride, K (a multiple of 32), output [M, K / 32] float: the largest of each 32, infinity
// where one is not finite
OPERATION(block_maxima) {
    const int64_t rows = count(w[0]), size = w[3].i;
    FOR_ROWS(m, rows) {
        const float *x = (const float *)w[1].p + m * w[2].i;
        float *y = (float *)w[4].p + m * (size / SPREAD_BLOCK);
        for (int64_t k = 0; k < size; k += SPREAD_BLOCK) {
            const Ints sizes = block_sizes(x + k, SPREAD_BLOCK);
            y[k / SPREAD_BLOCK] = any(sizes >= INFINITE) ? INFINITY : largest_lane((Floats)sizes);
        }
    }
}

// rows, x [M, K] float, x's stride, K, spread, codes (4 words), maxima [M, blocks] float of the whole tokens, blocks
OPERATION(quantize_part) {
    const int64_t rows = count(w[0]), blocks = w[10].i;
    const Codes codes = {w[5].p, w[6].p, w[7].p, w[8].i};
    FOR_ROWS(m, rows) {
        const int32_t *maxima = (const int32_t *)w[9].p + m * blocks;
        int32_t largest = 0;
        for (int64_t b = 0; b < blocks; b++) largest = maxima[b] > largest ? maxima[b] : largest;
        if (largest >= INFINITE) {
            write_no_codes(codes, m);
            continue;
        }
        const float scale = scale_of_token(maxima, blocks, largest, (float)w[4].f);
        write_codes((const float *)w[1].p + m * w[2].i, w[3].i, scale, codes, m);
    }
}

// rows, codes (4 words), weight [shares, features padded to 16, K] in panels, shares, features of a share, terms,
// output [shares, M, terms, features] int32: sums of low terms and, with two terms, of high ones
OPERATION(sum_products) {
    const int64_t rows = count(w[0]), shares = w[6].i, features = w[7].i, terms = w[8].i;
    const Codes codes = {w[1].p, w[2].p, w[3].p, w[4].i};
    const int64_t distance = codes.stride * PANEL, panels = (features + PANEL - 1) / PANEL;
    const int64_t tasks_a_share = (panels + WIDE - 1) / WIDE, tasks_a_chunk = shares * tasks_a_share;
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    int64_t chunk_of_high __attribute__((unused)) = -1;
    const int8_t *dense = NULL;
    begin_tiles();
    FOR_TASKS(task, tasks_a_chunk * chunks) {
        const int64_t share = task % tasks_a_chunk / tasks_a_share, first = task % tasks_a_share * WIDE;
        const int64_t num_panels = smaller(WIDE, panels - first);
        const int64_t chunk = task / tasks_a_chunk, from = chunk * CHUNK, to = smaller(from + CHUNK, rows);
#if HAS_TILES
        if (chunk != chunk_of_high) dense = to - from >= UNIT_ROWS ? dense_high_terms(codes, from, to) : NULL;
        chunk_of_high = chunk;
#endif
        const uint8_t *weight = (const uint8_t *)w[5].p + (share * panels + first) * distance;
        Ints sums[2][MOST_ROWS * WIDE];  // low, high
        for (int64_t m = from, size; m < to; m += size) {
            const int8_t *high_terms = dense == NULL ? NULL : dense + (m - from) * codes.stride;
            size = num_panels == 1 ? sum_terms(weight, distance, 1, codes, m, to, high_terms, sums[0], sums[1])
                                   : sum_terms(weight, distance, WIDE, codes, m, to, high_terms, sums[0], sums[1]);
            for (int64_t i = 0; i < size * terms; i++) {
                const int64_t token = i / terms, term = i % terms;
                int32_t *y = (int32_t *)w[9].p + ((share * rows + m + token) * terms + term) * features;
                for (int64_t n = 0; n < num_panels; n++) {
                    const int64_t feature = (first + n) * PANEL, left = smaller(PANEL, features - feature);
                    memcpy(y + feature, &sums[term][token * num_panels + n], (size_t)left * sizeof *y);
                }
            }
        }
    }
    end_tiles();
}

// Of some features: the parts' sums, added. parts [shares][distance] int32.
INLINE Floats add_parts(const int32_t *parts, int64_t shares, int64_t distance, int64_t left) {
    Ints sum = {0};
    for (int64_t i = 0; i < shares; i++) sum += (Ints)load_part((const float *)(parts + i * distance), left);
    return __builtin_convertvector(sum, Floats);
}

// rows, sums [shares, M, terms, N] int32, shares, N, terms, tokens [M] of their codes, scale [N] float, bias likewise or
// null, output [M, N] float
OPERATION(finish_sums) {
    const int64_t rows = count(w[0]), shares = w[2].i, features = w[3].i, terms = w[4].i;
    const int64_t distance = rows * terms * features;
    const Token *tokens = w[5].p;
    const float *scale = w[6].p, *bias = w[7].p;
    FOR_ROWS(m, rows) {
        const int32_t *sums = (const int32_t *)w[1].p + m * terms * features;
        for (int64_t n = 0; n < features; n += LANES) {
            const int64_t left = features - n;
            const Floats low = add_parts(sums + n, shares, distance, left);
            const Floats high = terms == 1 ? (Floats){0} : add_parts(sums + features + n, shares, distance, left);
            Floats value = (high * 128.0f + low) * tokens[m].scale * load_part(scale + n, left);
            if (bias != NULL) value += load_part(bias + n, left);
            store_part((float *)w[8].p + m * features + n, value, left);
        }
    }
}
