// Operations on tokens one by one: norm, gated activation, rotary embedding with the cache write.

#include "kernels.h"

#if defined(__clang__)
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, ...) __builtin_shuffle(v, (Ints){__VA_ARGS__})
#endif

// A register in which those `distance` apart, a power of two below LANES, have become their sum and their difference.
INLINE Floats sums_and_differences(Floats x, int distance) {
#if LANES == 16
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Floats partner = distance == 8   ? SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
                           : distance == 4 ? SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
                           : distance == 2 ? SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
                                           : SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif LANES == 8
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const Floats partner = distance == 4   ? SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3)
                           : distance == 2 ? SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5)
                                           : SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    const Ints lane = {0, 1, 2, 3};
    const Floats partner = distance == 2 ? SHUFFLE(x, 2, 3, 0, 1) : SHUFFLE(x, 1, 0, 3, 2);
#endif
    const Ints sign = ((lane & distance) != 0) & INT32_MIN;
    return partner + (Floats)((Ints)x ^ sign);
}

// A block of rotation.py: those next to each other first, halves last, times a factor.
INLINE void rotate_block(float *x, const int64_t size, float factor) {
    Floats v[128 / LANES];
    const int count = (int)size / LANES;
    EACH(i, count) {
        v[i] = load(x + i * LANES);
        for (int distance = 1; distance < LANES; distance *= 2) v[i] = sums_and_differences(v[i], distance);
    }
    for (int distance = 1; distance < count; distance *= 2)
        EACH(i, count) {
            if (i & distance) continue;
            const Floats a = v[i], b = v[i + distance];
            v[i] = a + b;
            v[i + distance] = a - b;
        }
    EACH(i, count) store(x + i * LANES, v[i] * factor);
}

// rotate of rotation.py, in place; x [size]
INLINE void rotate_row(float *x, int64_t size) {
    for (; size >= 128; x += 128, size -= 128) rotate_block(x, 128, 0.0883883476f);
    if (size >= 64) rotate_block(x, 64, 0.125f), x += 64, size -= 64;
    if (size >= 32) rotate_block(x, 32, 0.176776695f);
}

OPERATION(quantize) {
    const int64_t rows = count(args->num_rows), size = args->size;
    int32_t maxima[size / SPREAD_BLOCK + 1];
    float rotated[size];
    FOR_ROWS(m, rows) {
        const float *x = args->x + m * args->x_stride;
        if (args->is_rotated) {
            memcpy(rotated, x, (size_t)size * sizeof *x);
            rotate_row(rotated, size);
            x = rotated;
        }
        quantize_row(x, size, (float)args->spread, args->codes, m, maxima);
    }
}

OPERATION(add) {
    const int64_t rows = count(args->num_rows), size = args->size;
    float *x = args->x;
    const float *delta = args->delta;
    FOR_ROWS(m, rows)
        for (int64_t i = m * size; i < (m + 1) * size; i++) x[i] += delta[i];
}

OPERATION(gather) {
    const int64_t rows = count(args->num_rows), size = args->size;
    FOR_ROWS(m, rows)
        memcpy(args->output + m * size, args->x + args->indices[m] * size, (size_t)size * sizeof(float));
}

// y = x / sqrt(mean(x²) + epsilon) * weight; x [size]
INLINE void normalize(const float *x, const float *weight, float *y, float epsilon, int64_t size) {
    Floats squares[PARTS] = {{0}};
    for (int64_t k = 0; k < size; k += WIDTH)
        EACH(p, PARTS) {
            const Floats v = load_part(x + k + p * LANES, size - k - p * LANES);
            squares[p] = multiply_add(v, v, squares[p]);
        }
    const float factor = 1.0f / sqrtf(sum_lanes(squares) / (float)size + epsilon);
    for (int64_t k = 0; k < size; k += LANES) {
        const Floats v = load_part(x + k, size - k) * factor * load_part(weight + k, size - k);
        store_part(y + k, v, size - k);
    }
}

OPERATION(rms_norm) {
    const int64_t rows = count(args->num_rows), size = args->size;
    float normed[size];
    int32_t maxima[size / SPREAD_BLOCK + 1];
    FOR_ROWS(m, rows) {
        float *x = args->x + m * size;
        if (args->delta != NULL) {
            const float *delta = args->delta + m * size;
            for (int64_t k = 0; k < size; k++) x[k] += delta[k];
        }
        float *y = args->output == NULL ? normed : args->output + m * size;
        normalize(x, args->weight, y, (float)args->epsilon, size);
        if (args->is_rotated) rotate_row(y, size);
        if (args->codes.low != NULL) quantize_row(y, size, (float)args->spread, args->codes, m, maxima);
    }
}

OPERATION(gated) {
    const int64_t rows = count(args->num_rows), size = args->size, is_gelu = args->is_gelu;
    float product[size];
    int32_t maxima[size / SPREAD_BLOCK + 1];
    FOR_ROWS(m, rows) {
        const float *gates = args->gate_up + m * 2 * size, *ups = gates + size;
        float *y = args->output == NULL ? product : args->output + m * size;
        for (int64_t k = 0; k < size; k += LANES) {
            const Floats gate = load_part(gates + k, size - k), up = load_part(ups + k, size - k);
            // (1 + tanh(u)) / 2 is the sigmoid of 2u, here with u = sqrt(2 / pi) * (x + 0.044715 x³)
            const Floats inner =
                is_gelu ? 1.5957691216057308f * (gate + 0.044715f * (gate * gate * gate)) : gate;
            const Floats power = exp_negative(-absolute(inner));
            const Floats sigmoid = choose(inner < 0.0f, power, fill(1.0f)) / (1.0f + power);
            store_part(y + k, gate * sigmoid * up, size - k);
        }
        if (args->is_rotated) rotate_row(y, size);
        if (args->codes.low != NULL) quantize_row(y, size, (float)args->spread, args->codes, m, maxima);
    }
}

enum { CHECKSUM_LANES = 1024, CHECKSUM_ROWS = 256 };

INLINE void checksum_row(uint32_t *h, const uint32_t *words) {
    for (int64_t lane = 0; lane < CHECKSUM_LANES; lane++) h[lane] = (h[lane] ^ words[lane]) * 2654435761u;
}

OPERATION(checksum) {
    const int64_t blocks = count(args->num_rows), row_bytes = 4 * CHECKSUM_LANES;
    const int64_t rows = args->num_bytes / row_bytes, rest = args->num_bytes % row_bytes;
    const uint8_t *data = args->data;
    FOR_TASKS(m, blocks) {
        uint32_t h[CHECKSUM_LANES], sum = 0;
        for (int64_t lane = 0; lane < CHECKSUM_LANES; lane++) h[lane] = (uint32_t)m;
        const int64_t start = m * CHECKSUM_ROWS;
        for (int64_t row = start; row < start + CHECKSUM_ROWS && row < rows; row++)
            checksum_row(h, (const uint32_t *)(data + row * row_bytes));
        if (rest && rows >= start && rows < start + CHECKSUM_ROWS) {
            uint32_t last[CHECKSUM_LANES] = {0};
            memcpy(last, data + rows * row_bytes, rest);
            checksum_row(h, last);
        }
        for (int64_t lane = 0; lane < CHECKSUM_LANES; lane++) sum += h[lane] * (2 * (uint32_t)lane + 1);
        args->sums[m] = (int32_t)sum;
    }
}

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// e4m3 without infinities: 4 bits of exponent, 3 of fraction, saturating at 448.
INLINE uint8_t to_fp8(float x) {
    const uint8_t sign = signbit(x) ? 0x80 : 0;
    const float size = fminf(fabsf(x), 448.0f);
    if (x != x) return 0x7F;
    int exponent;
    frexpf(fmaxf(size, 0x1p-10f), &exponent);  // zero has no exponent
    // Steps of 2^-9 below 2^-6, of an eighth of the power of two from there.
    const float step = ldexpf(1.0f, exponent < -5 ? -9 : exponent - 4);
    const int steps = (int)nearbyintf(size / step);
    if (exponent < -5) return sign | (uint8_t)steps;
    return sign | (uint8_t)(((exponent + 5) << 3) + steps);
}

// A vector's codes of four bits, two in a byte, and a scale and a minimum a group.
INLINE void write_int4(const float *x, uint8_t *bytes, Half *scales, int64_t size) {
    const Ints least = {0}, most = least + 15;
    int8_t codes[size + INT4_GROUP];
    for (int64_t d = 0; d < size; d += INT4_GROUP) {
        const int64_t left = smaller(INT4_GROUP, size - d);
        float group[INT4_GROUP];
        memcpy(group, x + d, (size_t)left * sizeof *group);
        // What is not there takes the first one's place.
        for (int64_t i = left; i < INT4_GROUP; i++) group[i] = x[d];
        Floats highest[PARTS], negated[PARTS];
        Ints bits = {0};
        EACH(p, PARTS) highest[p] = negated[p] = fill(-INFINITY);
        EACH(i, INT4_GROUP / LANES) {
            const Floats part = load(group + i * LANES);
            bits = larger_of(bits, (Ints)absolute(part));
            highest[i % PARTS] = maximum(highest[i % PARTS], part);
            negated[i % PARTS] = maximum(negated[i % PARTS], -part);
        }
        const Half minimum = to_half(-largest_lane(negated));
        const float base = from_half(minimum);
        const Half scale = to_half(fmaxf((largest_lane(highest) - base) / 15, 0.0f));
        const float step = from_half(scale), divisor = step > 0.0f ? step : 1.0f;
        // A NaN's bits are above infinity's; the others may be finite and beyond half precision.
        const int is_finite = !any(bits >= 0x7F800000) && base - base == 0.0f && step - step == 0.0f;
        EACH(i, INT4_GROUP / LANES) {
            Ints code = {0};
            if (is_finite) code = larger_of(round_to_ints((load(group + i * LANES) - base) / divisor), least);
            store_bytes(codes + d + i * LANES, -larger_of(-code, -most));
        }
        // What is not finite shows where it is read.
        *scales++ = is_finite ? scale : to_half(NAN);
        *scales++ = is_finite ? minimum : to_half(NAN);
    }
    for (int64_t i = 0; i < size / 2; i++) bytes[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
}

// A head's vector into the cache; scales: those of integer codes.
INLINE void write_vector(const float *x, void *cache, void *scales, int64_t index, int64_t size, int64_t type) {
    if (type == FLOAT32) memcpy((float *)cache + index * size, x, (size_t)size * sizeof(float));
    else if (type == BFLOAT16)
        for (int64_t d = 0; d < size; d++) ((uint16_t *)cache)[index * size + d] = to_bfloat16(x[d]);
    else if (type == FLOAT16)
        for (int64_t d = 0; d < size; d++) ((Half *)cache)[index * size + d] = to_half(x[d]);
    else if (type == FP8)
        for (int64_t d = 0; d < size; d++) ((uint8_t *)cache)[index * size + d] = to_fp8(x[d]);
    else if (type == INT4) {
        const int64_t groups = (size + INT4_GROUP - 1) / INT4_GROUP;
        write_int4(x, (uint8_t *)cache + index * (size / 2), (Half *)scales + index * 2 * groups, size);
    } else {
        Ints bits = {0};  // a NaN's are above infinity's
        for (int64_t d = 0; d < size; d += LANES) bits = larger_of(bits, (Ints)absolute(load_part(x + d, size - d)));
        const int is_finite = !any(bits >= 0x7F800000);
        const float step = is_finite ? fmaxf(float_of_bits(largest_int(bits)) / 127, 1.17549435e-38f) : 1.0f;
        for (int64_t d = 0; d < size; d += LANES) {
            int8_t codes[LANES];
            store_bytes(codes, round_to_ints(load_part(x + d, size - d) / step));
            memcpy((int8_t *)cache + index * size + d, codes, (size_t)smaller(LANES, size - d));
        }
        // What is not finite shows where it is read.
        ((float *)scales)[index] = is_finite ? step : NAN;
    }
}

// spread_heads of hadamard.py. Pieces of `piece` elements, a power of two, fill both halves.
INLINE void spread_head(float *x, int64_t size, int64_t piece, float factor) {
    const int64_t half = size / 2;
    int64_t distance = 1;
    if (piece >= LANES) {
        for (int64_t d = 0; d < size; d += LANES) {
            Floats v = load(x + d);
            for (int i = 1; i < LANES; i *= 2) v = sums_and_differences(v, i);
            store(x + d, v);
        }
        distance = LANES;
    }
    for (; distance < piece; distance *= 2)
        for (int64_t d = 0; d < size; d += 2 * distance)
            for (int64_t i = d; i < d + distance; i++) {
                const float a = x[i], b = x[i + distance];
                x[i] = a + b;
                x[i + distance] = a - b;
            }
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = (a + b) * factor;
        x[i + half] = (a - b) * factor;
    }
}

OPERATION(rotate_and_write) {
    const int64_t rows = count(args->num_rows), heads = args->num_heads, kv_heads = args->num_kv_heads;
    const int64_t size = args->head_dim, half = size / 2, type = args->cache_type;
    FOR_ROWS(m, rows) {
        float *x = args->heads + m * (heads + 2 * kv_heads) * size;
        const float *cosine = args->cosine + args->positions[m] * half;
        const float *sine = args->sine + args->positions[m] * half;
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            float *first = x + h * size, *second = first + half;
            const float *norm = h < heads ? args->query_norm : args->key_norm;
            if (norm != NULL) normalize(first, norm, first, (float)args->epsilon, size);
            for (int64_t d = 0; d < half; d++) {
                const float a = first[d], b = second[d];
                first[d] = a * cosine[d] - b * sine[d];
                second[d] = b * cosine[d] + a * sine[d];
            }
            if (type == INT8)
                spread_head(first, size, args->hadamard_size,
                            (float)(h < heads ? args->query_factor : args->key_factor));
        }
        for (int64_t g = 0; g < kv_heads; g++) {
            const float *key = x + (heads + g) * size, *value = key + kv_heads * size;
            const int64_t index = args->slots[m] * kv_heads + g;
            write_vector(key, args->keys, args->key_scales, index, size, type);
            write_vector(value, args->values, args->value_scales, index, size, type);
        }
    }
}
