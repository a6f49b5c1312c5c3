// The CPU bodies of the kernels that torch's operators leave slow at a few tokens a step.
//
// Plain C for any compiler's vectorizer, built on the machine that runs it (see __init__.py, which also sets SEGMENT). Floating-point
// contraction is off, so that a product and a sum round as they do in torch; every reduction runs in an order
// fixed by its own length. OpenMP's threads are torch's own: both use the libgomp that torch has loaded.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LOW_STEPS = 254 };

// Two int8 terms of one token (see engine/quant/int8.py), each plus 128, since products of unsigned and
// signed bytes have an instruction of their own. Returns the token's scale: NaN if a value is not finite.
static float quantize_token(const float *x, int64_t size, uint8_t *high, uint8_t *low) {
    float largest = 0.0f;
    int32_t finite = 1;
#pragma omp simd reduction(max : largest) reduction(& : finite)
    for (int64_t k = 0; k < size; k++) {
        largest = fmaxf(largest, fabsf(x[k]));  // which drops a NaN
        finite &= fabsf(x[k]) <= FLT_MAX;
    }
    if (!finite) {
        memset(high, 128, (size_t)size);
        memset(low, 128, (size_t)size);
        return NAN;
    }
    const float scale = largest * (float)(1.0 / 127);
    const float divisor = fmaxf(scale, 1.17549435e-38f);
#pragma omp simd
    for (int64_t k = 0; k < size; k++) {
        const float steps = x[k] / divisor;
        const float nearest = rintf(steps);
        high[k] = (uint8_t)((int32_t)nearest + 128);
        low[k] = (uint8_t)((int32_t)rintf((steps - nearest) * LOW_STEPS) + 128);
    }
    return scale;
}

// y[m, n] = x[m, :] · weight[n, :] with two-term activations: x [M, K] float, weight [N, K] int8,
// scale [N] float, weight_sums [N] int32 (each row's sum), y [M, N] float.
// codes: scratch of 2 * M * K bytes; token_scales: scratch of M floats.
void int8_matmul(const float *x, const int8_t *weight, const float *scale, const int32_t *weight_sums, float *y,
                 uint8_t *codes, float *token_scales, int64_t M, int64_t N, int64_t K) {
#pragma omp parallel for schedule(static) if (M > 1)
    for (int64_t m = 0; m < M; m++)
        token_scales[m] = quantize_token(x + m * K, K, codes + 2 * m * K, codes + (2 * m + 1) * K);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const int8_t *w = weight + n * K;
        for (int64_t m = 0; m < M; m++) {
            const uint8_t *high = codes + 2 * m * K, *low = high + K;
            int32_t high_sum = 0, low_sum = 0;
            for (int64_t k = 0; k < K; k++) {
                high_sum += (int32_t)high[k] * (int32_t)w[k];
                low_sum += (int32_t)low[k] * (int32_t)w[k];
            }
            high_sum -= 128 * weight_sums[n];
            low_sum -= 128 * weight_sums[n];
            const float value = (float)high_sum * LOW_STEPS + (float)low_sum;
            y[m * N + n] = value * (token_scales[m] * (float)(1.0 / LOW_STEPS)) * scale[n];
        }
    }
}

// y[m, :] = x[m, :] / sqrt(mean(x[m, :]²) + epsilon) * weight: x, y [M, H], weight [H] float.
void rms_norm(const float *x, const float *weight, float *y, float epsilon, int64_t M, int64_t H) {
    for (int64_t m = 0; m < M; m++, x += H, y += H) {
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t h = 0; h < H; h++) squares += x[h] * x[h];
        const float factor = 1.0f / sqrtf(squares / (float)H + epsilon);
#pragma omp simd
        for (int64_t h = 0; h < H; h++) y[h] = x[h] * factor * weight[h];
    }
}

// Rotates queries and keys in place and stores keys and values in the cache.
// heads: [T, query_heads + 2 * kv_heads, D]; cosine, sine: [T, D], the sine's first half negated;
// cache: keys at 0, values at `values_offset`, each [slots, kv_heads, D]; slots: [T].
void rotary_write_kv(float *heads, const float *cosine, const float *sine, float *cache, const int64_t *slots,
                     int64_t values_offset, int64_t T, int64_t query_heads, int64_t kv_heads, int64_t D) {
    const int64_t rotated = query_heads + kv_heads, half = D / 2;
    for (int64_t t = 0; t < T; t++, heads += (rotated + kv_heads) * D, cosine += D, sine += D) {
        for (int64_t h = 0; h < rotated; h++) {
            float *x = heads + h * D;
#pragma omp simd
            for (int64_t d = 0; d < half; d++) {
                const float first = x[d], second = x[d + half];
                x[d] = first * cosine[d] + second * sine[d];
                x[d + half] = second * cosine[d + half] + first * sine[d + half];
            }
        }
        const float *keys = heads + query_heads * D, *values = keys + kv_heads * D;
        float *slot = cache + slots[t] * kv_heads * D;
        for (int64_t d = 0; d < kv_heads * D; d++) {
            slot[d] = keys[d];
            slot[values_offset + d] = values[d];
        }
    }
}

// exp(x) for x <= 0, to 3e-7 relative: 2^n times the Taylor series of the rest, |r| <= ln(2) / 2.
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;  // unlike fmaxf this keeps a NaN
    const float n = rintf(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return sum * power.value;
}

// Sixteen floats; a compiler for smaller registers splits it.
typedef float vector __attribute__((vector_size(64), aligned(4)));

static inline float sum_lanes(vector v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v[0];
}

// Softmax-weighted sum of up to SEGMENT values for `group` queries: out[g, :] is not yet divided by sums[g], its
// weights are relative to the largest score, largest[g]. slots: where key i lies, in units of `stride` floats.
// Inlined for each head dimension, so that a query, a key and a sum stay in registers.
static inline __attribute__((always_inline)) void attend(const float *q, const float *keys, const float *values,
                                                         const int64_t *slots, int64_t num_keys, int64_t stride,
                                                         float scale, int64_t group, float *out, float *largest,
                                                         float *sums, const int64_t D) {
    float weights[SEGMENT];
    for (int64_t g = 0; g < group; g++) {
        float top = -INFINITY, sum = 0.0f;
        for (int64_t i = 0; i < num_keys; i++) {
            const float *key = keys + slots[i] * stride;
            vector products = {0};
            for (int64_t d = 0; d < D; d += 16)
                products += *(const vector *)(q + g * D + d) * *(const vector *)(key + d);
            weights[i] = sum_lanes(products) * scale;
            top = fmaxf(top, weights[i]);
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < num_keys; i++) {
            weights[i] = exp_negative(weights[i] - top);
            sum += weights[i];
        }
        vector total[16] = {{0}};
        for (int64_t i = 0; i < num_keys; i++) {
            const float *value = values + slots[i] * stride;
            for (int64_t d = 0; d < D; d += 16) total[d / 16] += weights[i] * *(const vector *)(value + d);
        }
        for (int64_t d = 0; d < D; d += 16) *(vector *)(out + g * D + d) = total[d / 16];
        largest[g] = top;
        sums[g] = sum;
    }
}

// Attention of one query a sequence over its keys first[s] … last[s] - 1, for head dimensions that are multiples
// of 16 up to 256. Keys are taken in segments of SEGMENT positions counted from 0, each by itself, and combined in
// their order: what a token gets depends on its own position alone.
// queries: [T, stride] of which row rows[s] starts with the sequence's query heads [kv_heads * group, D];
// output: [T, kv_heads * group, D], row rows[s]; tables: [S, max_blocks]; cache: as above, in blocks of
// block_size slots; partial: scratch of S * kv_heads * segments * group * (D + 2) floats, where segments is
// ceil(max(last) / SEGMENT).
void decode_attention(const float *queries, const float *cache, float *output, float *partial,
                      const int64_t *rows, const int64_t *tables, const int64_t *first, const int64_t *last,
                      float scale, int64_t values_offset, int64_t S, int64_t max_blocks, int64_t segments,
                      int64_t block_size, int64_t kv_heads, int64_t group, int64_t D, int64_t stride) {
    float *tops = partial + S * kv_heads * segments * group * D, *sums = tops + S * kv_heads * segments * group;
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < S * kv_heads * segments; task++) {
            const int64_t segment = task % segments, head = task / segments % kv_heads;
            const int64_t s = task / segments / kv_heads;
            int64_t begin = segment * SEGMENT, end = begin + SEGMENT, slots[SEGMENT];
            if (begin < first[s]) begin = first[s];
            if (end > last[s]) end = last[s];
            if (begin >= end) continue;
            for (int64_t position = begin; position < end; position++)
                slots[position - begin] =
                    tables[s * max_blocks + position / block_size] * block_size + position % block_size;
            const float *q = queries + rows[s] * stride + head * group * D;
            const float *keys = cache + head * D, *values = keys + values_offset;
            float *out = partial + task * group * D, *top = tops + task * group, *sum = sums + task * group;
            const int64_t n = end - begin, step = kv_heads * D;
            if (D == 64) attend(q, keys, values, slots, n, step, scale, group, out, top, sum, 64);
            else if (D == 128) attend(q, keys, values, slots, n, step, scale, group, out, top, sum, 128);
            else if (D == 256) attend(q, keys, values, slots, n, step, scale, group, out, top, sum, 256);
            else attend(q, keys, values, slots, n, step, scale, group, out, top, sum, D);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < S * kv_heads * group; task++) {
            const int64_t g = task % group, head = task / group % kv_heads, s = task / group / kv_heads;
            float *out = output + ((rows[s] * kv_heads + head) * group + g) * D;
            float top = -INFINITY, sum = 0.0f;
            for (int64_t d = 0; d < D; d++) out[d] = 0.0f;
            for (int64_t segment = first[s] / SEGMENT; segment * SEGMENT < last[s]; segment++) {
                const int64_t i = ((s * kv_heads + head) * segments + segment) * group + g;
                const float larger = fmaxf(top, tops[i]);
                const float kept = exp_negative(top - larger), added = exp_negative(tops[i] - larger);
                for (int64_t d = 0; d < D; d++) out[d] = out[d] * kept + partial[i * D + d] * added;
                sum = sum * kept + sums[i] * added;
                top = larger;
            }
            for (int64_t d = 0; d < D; d++) out[d] /= sum;
        }
    }
}
