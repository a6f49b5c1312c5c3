// The CPU bodies of the kernels that torch's operators leave slow at a few tokens a step.
//
// Plain C for any compiler's vectorizer, built on the machine that runs it (see build.py). Floating-point
// contraction is off, so that a product and a sum round as they do in torch; every reduction runs in an order
// fixed by its own length. OpenMP's threads are torch's own: both use the libgomp that torch has loaded.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { LOW_STEPS = 254 };

// Two int8 terms of one token (see engine/quant/int8.py), each plus 128, since products of unsigned and
// signed bytes have an instruction of their own. Returns the token's scale.
static float quantize_token(const float *x, int64_t size, uint8_t *high, uint8_t *low) {
    float largest = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t k = 0; k < size; k++) largest = fmaxf(largest, fabsf(x[k]));
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
    x = fmaxf(x, -87.0f);
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

// Attention of one query a sequence over its keys first[s] … last[s] - 1.
// queries: [T, stride] of which row rows[s] starts with the sequence's query heads [kv_heads * group, D];
// output: [T, kv_heads * group, D], row rows[s]; tables: [S, max_blocks]; cache: as above, in blocks of
// block_size slots. Returns 0, or 1 if memory for the scores ran out.
int decode_attention(const float *queries, const float *cache, float *output, const int64_t *rows,
                     const int64_t *tables, const int64_t *first, const int64_t *last, float scale,
                     int64_t values_offset, int64_t S, int64_t max_blocks, int64_t block_size, int64_t kv_heads,
                     int64_t group, int64_t D, int64_t stride) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < S * kv_heads; task++) {
        const int64_t s = task / kv_heads, head = task % kv_heads, num_keys = last[s] - first[s];
        const int64_t *table = tables + s * max_blocks;
        const float *q = queries + rows[s] * stride + head * group * D;
        float *out = output + (rows[s] * kv_heads + head) * group * D;
        float *scores = malloc(sizeof(float) * (size_t)(group * num_keys));
        if (scores == NULL) {
            failed = 1;
            continue;
        }
        for (int64_t i = 0; i < num_keys; i++) {
            const int64_t position = first[s] + i;
            const int64_t slot = table[position / block_size] * block_size + position % block_size;
            const float *key = cache + (slot * kv_heads + head) * D;
            for (int64_t g = 0; g < group; g++) {
                float product = 0.0f;
#pragma omp simd reduction(+ : product)
                for (int64_t d = 0; d < D; d++) product += q[g * D + d] * key[d];
                scores[g * num_keys + i] = product * scale;
            }
        }
        for (int64_t g = 0; g < group; g++) {
            float *row = scores + g * num_keys, largest = row[0], sum = 0.0f;
            for (int64_t i = 1; i < num_keys; i++) largest = fmaxf(largest, row[i]);
#pragma omp simd
            for (int64_t i = 0; i < num_keys; i++) row[i] = exp_negative(row[i] - largest);
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < num_keys; i++) sum += row[i];
            const float factor = 1.0f / sum;
            for (int64_t i = 0; i < num_keys; i++) row[i] *= factor;
            for (int64_t d = 0; d < D; d++) out[g * D + d] = 0.0f;
        }
        for (int64_t i = 0; i < num_keys; i++) {
            const int64_t position = first[s] + i;
            const int64_t slot = table[position / block_size] * block_size + position % block_size;
            const float *value = cache + values_offset + (slot * kv_heads + head) * D;
            for (int64_t g = 0; g < group; g++) {
                const float weight = scores[g * num_keys + i];
#pragma omp simd
                for (int64_t d = 0; d < D; d++) out[g * D + d] += weight * value[d];
            }
        }
        free(scores);
    }
    return failed;
}
