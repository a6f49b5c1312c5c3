// Products of int8 activations with int8 weights whose input features are shared by ranks, each of which has whole
// blocks of 32 of them (engine/kernels/matmul/cpu_sharded.py). What ranks exchange is exact: maxima, and sums of
// integers.

#include "term_sums.h"

enum { INFINITE = 0x7F800000 };  // infinity's bits

OPERATION(block_maxima) {
    const int64_t rows = count(args->num_rows), size = args->size;
    FOR_ROWS(m, rows) {
        const float *x = args->x + m * args->x_stride;
        float *y = args->maxima + m * (size / SPREAD_BLOCK);
        for (int64_t k = 0; k < size; k += SPREAD_BLOCK) {
            const int32_t largest = largest_size(x + k, SPREAD_BLOCK);
            y[k / SPREAD_BLOCK] = largest >= INFINITE ? INFINITY : float_of_bits(largest);
        }
    }
}

OPERATION(quantize_part) {
    const int64_t rows = count(args->num_rows), blocks = args->num_blocks;
    const Codes codes = args->codes;
    FOR_ROWS(m, rows) {
        const int32_t *maxima = (const int32_t *)args->maxima + m * blocks;  // bits are ordered like the floats
        int32_t largest = 0;
        for (int64_t b = 0; b < blocks; b++) largest = maxima[b] > largest ? maxima[b] : largest;
        if (largest >= INFINITE) {
            write_no_codes(codes, m);
            continue;
        }
        const float scale = scale_of_token(maxima, blocks, largest, (float)args->spread);
        write_codes(args->x + m * args->x_stride, args->size, scale, codes, m);
    }
}

OPERATION(sum_products) {
    const int64_t rows = count(args->num_rows), features = args->features, terms = args->num_terms;
    const Codes codes = args->codes;
    const int64_t quads = codes.stride / QUAD, distance = quads * QUAD_BYTES, panels = (features + PANEL - 1) / PANEL;
    const int64_t tasks_a_share = (panels + WIDE - 1) / WIDE, tasks_a_chunk = args->num_shares * tasks_a_share;
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
        const int64_t panel_bytes = args->weight_kind == WEIGHT_SPARSE ? sparse_bytes(8, quads) : distance;
        const int is_sparse = args->weight_kind == WEIGHT_SPARSE && rows <= FEW_ROWS;
        const uint8_t *weight = args->weight + (share * panels + first) * panel_bytes;
        if (args->weight_kind == WEIGHT_SPARSE && !is_sparse) weight = expanded_panels(weight, num_panels, quads);
        _Alignas(64) int32_t sums[2][MOST_ROWS * WIDE * PANEL];  // low, high
        for (int64_t m = from, size; m < to; m += size) {
            const int8_t *high_terms = dense == NULL ? NULL : dense + (m - from) * codes.stride;
            if (is_sparse) size = sum_sparse_terms(weight, num_panels, codes, m, to, sums[0], sums[1]);
            else if (num_panels == 1) size = sum_terms(weight, distance, 1, codes, m, to, high_terms, sums[0], sums[1]);
            else size = sum_terms(weight, distance, WIDE, codes, m, to, high_terms, sums[0], sums[1]);
            for (int64_t i = 0; i < size * terms; i++) {
                const int64_t token = i / terms, term = i % terms;
                int32_t *y = args->sums + ((share * rows + m + token) * terms + term) * features;
                for (int64_t n = 0; n < num_panels; n++) {
                    const int64_t feature = (first + n) * PANEL, left = smaller(PANEL, features - feature);
                    memcpy(y + feature, sums[term] + (token * num_panels + n) * PANEL, (size_t)left * sizeof *y);
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
    return to_floats(sum);
}

OPERATION(finish_sums) {
    const int64_t rows = count(args->num_rows), shares = args->num_shares, features = args->features;
    const int64_t terms = args->num_terms, distance = rows * terms * features;
    const float *scale = args->scale, *bias = args->bias;
    FOR_ROWS(m, rows) {
        const int32_t *sums = args->sums + m * terms * features;
        for (int64_t n = 0; n < features; n += LANES) {
            const int64_t left = features - n;
            const Floats low = add_parts(sums + n, shares, distance, left);
            const Floats high = terms == 1 ? (Floats){0} : add_parts(sums + features + n, shares, distance, left);
            Floats value = (high * 128.0f + low) * args->tokens[m].scale * load_part(scale + n, left);
            if (bias != NULL) value += load_part(bias + n, left);
            store_part(args->output + m * features + n, value, left);
        }
    }
}
