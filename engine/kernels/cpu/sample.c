// From logits to tokens: what changes logits, the draw and log-probabilities, a row of the vocabulary a task.
//
// What is drawn is defined in sample_row.py, and every float here is made by the same operations as there. Masses are
// whole numbers, so that a threshold may be searched for in any order.

#include "kernels.h"

enum {
    MASS_BITS = 30,
    SUM_LANES = 1024,
    GROUP = 32,            // logits of which the largest bounds top_k
    MASS_VECTORS = 4096,   // whose lanes' sums of 2^15 each fit
};

typedef uint32_t Hashes __attribute__((vector_size(4 * LANES)));

// The nearest whole number, ties to even, of |x| < 2^22.
INLINE Floats nearest(Floats x) { return (x + 12582912.0f) - 12582912.0f; }

INLINE float largest_of(Floats v) {
    float largest = v[0];
    for (int i = 1; i < LANES; i++) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

// exp_negative of float_math.py: no product is fused with a sum.
INLINE Floats plain_exp_negative(Floats x) {
    const Ints is_out = x < -87.0f;
    const Floats in_range = choose(is_out, fill(-87.0f), x);
    const Floats n = nearest(in_range * 1.44269504f);
    const Floats rest = (in_range - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats value = fill(1.0f / 5040);
    value = value * rest + 1.0f / 720;
    value = value * rest + 1.0f / 120;
    value = value * rest + 1.0f / 24;
    value = value * rest + 1.0f / 6;
    value = value * rest + 0.5f;
    value = value * rest + 1.0f;
    value = value * rest + 1.0f;
    return choose(is_out, (Floats){0}, value * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23));
}

// log of float_math.py.
INLINE Floats plain_log(Floats x) {
    const Ints bits = (Ints)x - 0x3F3504F3;
    const Floats exponent = __builtin_convertvector(bits >> 23, Floats), f = (Floats)((bits & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
    const Floats s = f / (f + 2.0f), z = s * s;
    Floats series = fill(2.0f / 9);
    series = series * z + 2.0f / 7;
    series = series * z + 2.0f / 5;
    series = series * z + 2.0f / 3;
    const Floats mantissa = s * (z * series) + (s + s);
    return exponent * 0.693359375f + (mantissa + exponent * -2.12194440e-4f);
}

INLINE Ints mix32(Ints bits) {
    Hashes w = (Hashes)bits;
    w = (w ^ (w >> 16)) * 0x85EBCA6Bu;
    w = (w ^ (w >> 13)) * 0xC2B2AE35u;
    return (Ints)(w ^ (w >> 16));
}

// A row's key for noise.py.
typedef struct {
    int32_t low, high;
} Key;

// The hash of each token id, + 1/2: the upper and the lower half are exact, their sum is rounded once.
INLINE Floats hash_of(Ints token_ids, Key key) {
    const Ints bits = mix32(mix32(token_ids ^ key.low) + key.high);
    return __builtin_convertvector((bits >> 16) & 0xFFFF, Floats) * 65536.0f + __builtin_convertvector(bits & 0xFFFF, Floats) + 0.5f;
}

// -log(-log(1 - u)), of noise.py.
INLINE Floats gumbel(Floats hash) {
    const Floats most = fill(1.0f - 0x1p-24f), scaled = hash * 0x1p-32f, u = choose(scaled > most, most, scaled);
    const Floats rounded = 1.0f - u, lost = (1.0f - rounded) - u;
    return -plain_log(-(plain_log(rounded) + (lost + lost * u)));
}

// A register of floats, -infinity beyond the end.
INLINE Floats load_logits(const float *x, int64_t left) {
    if (left >= LANES) return *(const LooseFloats *)x;
    Floats v = fill(-INFINITY);
    memcpy(&v, x, (size_t)left * sizeof(float));
    return v;
}

// The largest of a row and the first place of it; -1 where one is NaN or that is not finite.
INLINE int64_t likeliest(const float *x, int64_t size, float *peak) {
    Floats largest = fill(-INFINITY);
    Ints is_nan = {0};
    for (int64_t k = 0; k < size; k += LANES) {
        const Floats v = load_logits(x + k, size - k);
        largest = choose(v > largest, v, largest);
        is_nan |= v != v;
    }
    *peak = largest_of(largest);
    if (any(is_nan) || *peak - *peak != 0.0f) return -1;
    int64_t index = 0;
    while (index + LANES <= size && !any(load_logits(x + index, size) == *peak)) index += LANES;
    while (x[index] != *peak) index++;
    return index;
}

INLINE Ints mass_of(Floats x, float peak, float temperature) {
    return __builtin_convertvector(plain_exp_negative((x - peak) / temperature) * (float)(1 << MASS_BITS), Ints);
}

// That of the logits of a row that reach `least`.
INLINE int64_t total_mass(const float *x, int64_t size, float least, float peak, float temperature) {
    int64_t total = 0;
    for (int64_t begin = 0; begin < size; begin += MASS_VECTORS * LANES) {
        Ints upper = {0}, lower = {0};
        for (int64_t k = begin; k < smaller(size, begin + MASS_VECTORS * LANES); k += LANES) {
            const Floats v = load_logits(x + k, size - k);
            const Ints mass = mass_of(v, peak, temperature) & (v >= least);
            upper += mass >> 15;
            lower += mass & 0x7FFF;
        }
        for (int i = 0; i < LANES; i++) total += ((int64_t)upper[i] << 15) + lower[i];
    }
    return total;
}

// Logits and their token ids, in the order of these.
typedef struct {
    float *values;
    int32_t *token_ids;
    int64_t size;
} Tokens;

// Those of a row that reach `least`. Behind them lies room for a vector.
INLINE void collect(const float *x, int64_t size, float least, Tokens *tokens) {
    int64_t found = 0;
    for (int64_t k = 0; k < size; k += LANES) {
        const Floats v = load_logits(x + k, size - k);
        if (!any((v >= least))) continue;
        for (int64_t i = k; i < smaller(size, k + LANES); i++) {
            tokens->values[found] = x[i];
            tokens->token_ids[found] = (int32_t)i;
            found += x[i] >= least;
        }
    }
    tokens->size = found;
}

// The bits of a float as an integer of the same order, and back.
INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & INT32_MAX); }
INLINE int32_t key_of(float x) {
    x += 0.0f;  // -0 is 0
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return ordered(bits);
}
INLINE float value_of(int32_t key) {
    const int32_t bits = ordered(key);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The largest of the values for which those at least as large weigh `target` or more, -infinity if none. A quickselect
// whose pivots are medians of three and, every other time, the middle of all floats between, which ends it.
// keys: of the values; both are reordered.
static float reach(int32_t *keys, int32_t *weights, int64_t size, int64_t target) {
    int64_t low = INT32_MIN, high = INT32_MAX;
    for (int64_t pass = 0; size > 0; pass++) {
        const int32_t a = keys[0], b = keys[size / 2], c = keys[size - 1];
        const int32_t smallest = a < b ? a : b, largest = a < b ? b : a;
        int32_t pivot = c < smallest ? smallest : c > largest ? largest : c;
        if (pass % 2 == 1) pivot = (int32_t)((low + high) >> 1);
        int64_t above = 0, equal = 0;
        for (int64_t i = 0; i < size; i++) {
            above += keys[i] > pivot ? weights[i] : 0;
            equal += keys[i] == pivot ? weights[i] : 0;
        }
        if (above < target && above + equal >= target) return value_of(pivot);
        const int is_above = above >= target;
        if (is_above) low = (int64_t)pivot + 1;
        else {
            high = (int64_t)pivot - 1;
            target -= above + equal;
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < size; i++) {
            const int32_t key = keys[i];
            keys[kept] = key;
            weights[kept] = weights[i];
            kept += is_above ? key > pivot : key < pivot;
        }
        size = kept;
    }
    return -INFINITY;
}

// What of a row the filters keep.
typedef struct {
    float temperature, top_p, min_p;
    int32_t top_k;
} Filters;

// The k-th largest, or less: that of the largest of each GROUP, of which the row has at least as many.
INLINE float bound_of_top_k(const float *x, int64_t size, int64_t k, int32_t *keys, int32_t *weights) {
    int64_t groups = 0;
    for (int64_t i = 0; i < size; i += GROUP) {
        Floats largest = load_logits(x + i, size - i);
        for (int64_t j = i + LANES; j < smaller(size, i + GROUP); j += LANES) {
            const Floats v = load_logits(x + j, size - j);
            largest = choose(v > largest, v, largest);
        }
        keys[groups] = key_of(largest_of(largest));
        weights[groups++] = 1;
    }
    return reach(keys, weights, groups, k);
}

// Fills in the tokens that the filters keep, perhaps more, and returns the least logit of those that they do keep.
// keys, weights: scratch of a row.
static float filter(const float *x, int64_t size, float peak, const Filters *how, Tokens *tokens, int32_t *keys,
                    int32_t *weights) {
    const float temperature = how->temperature;
    float least = -INFINITY;
    if (how->min_p > 0.0f)
        least = peak + temperature * plain_log(fill(how->min_p > 0x1p-126f ? how->min_p : 0x1p-126f))[0];
    const int has_top_k = how->top_k > 0 && how->top_k < size;
    if (has_top_k) {
        collect(x, size, fmaxf(least, bound_of_top_k(x, size, how->top_k, keys, weights)), tokens);
        for (int64_t i = 0; i < tokens->size; i++) keys[i] = key_of(tokens->values[i]), weights[i] = 1;
        least = fmaxf(least, reach(keys, weights, tokens->size, how->top_k));
    }
    if (how->top_p < 1.0f) {
        const int64_t total = has_top_k ? total_mass(tokens->values, tokens->size, least, peak, temperature)
                                        : total_mass(x, size, least, peak, temperature);
        const int64_t target = (int64_t)ceil((double)how->top_p * (double)total);
        if (!has_top_k) {
            // Tokens of less mass than an equal share of what may be missing are not needed. Below that by a thousandth
            // and what rounding may lose.
            const double share = (double)((total - target) / size) / (1 << MASS_BITS);
            const double bound = peak + temperature * (log(share) - 1e-3) - 1e-6 * fabs((double)peak);
            collect(x, size, fmaxf(least, (float)bound), tokens);
        }
        int64_t found = 0;
        for (int64_t i = 0; i < tokens->size; i += LANES) {
            const Ints mass = mass_of(load_logits(tokens->values + i, tokens->size - i), peak, temperature);
            for (int64_t j = i; j < smaller(tokens->size, i + LANES); j++) {
                keys[found] = key_of(tokens->values[j]);
                weights[found] = mass[j - i];
                found += tokens->values[j] >= least;
            }
        }
        least = fmaxf(least, reach(keys, weights, found, target));
    } else if (!has_top_k) collect(x, size, least, tokens);
    return least;
}

// The best of what was scored, of equal ones the lowest token id.
typedef struct {
    float score;
    int32_t token_id;
} Best;

INLINE void take(Best *best, Floats scores, Ints token_ids, Ints is_there) {
    const Floats there = choose(is_there, scores, fill(-INFINITY));
    if (!any(there >= best->score)) return;
    for (int i = 0; i < LANES; i++)
        if (there[i] > best->score || (there[i] == best->score && token_ids[i] < best->token_id))
            *best = (Best){there[i], token_ids[i]};
}

// Over all tokens. Noise is at most -log(u), and that at most what the exponent of its hash says: few need more.
INLINE Best draw_of_all(const float *x, int64_t size, float temperature, Key key, int64_t first) {
    enum { BIAS = 127 };
    const Floats some = load_logits(x + first, 1);
    Best best = {-INFINITY, INT32_MAX};
    take(&best, some / temperature + gumbel(hash_of(lane_numbers() + (int32_t)first, key)), lane_numbers() + (int32_t)first, lane_numbers() < 1);
    const float most = 22.9f;  // 33 ln 2
    for (int64_t k = 0; k < size; k += LANES) {
        const Floats v = load_logits(x + k, size - k) / temperature;
        if (!any(v + most >= best.score)) continue;
        const Ints token_ids = lane_numbers() + (int32_t)k;
        const Floats hash = hash_of(token_ids, key);
        const Ints exponent = ((Ints)hash >> 23) - BIAS;
        const Floats bound = __builtin_convertvector(32 - exponent, Floats) * 0.69322f + 1e-3f;
        if (!any(v + bound >= best.score)) continue;
        take(&best, v + gumbel(hash), token_ids, (v > -INFINITY));
    }
    return best;
}

INLINE Best draw_of_some(const Tokens *tokens, float least, float temperature, Key key) {
    Best best = {-INFINITY, INT32_MAX};
    for (int64_t k = 0; k < tokens->size; k += LANES) {
        const Floats v = load_logits(tokens->values + k, tokens->size - k);
        const Ints is_kept = (v >= least) & (v > -INFINITY);
        if (!any(is_kept)) continue;
        Ints token_ids;
        memcpy(&token_ids, tokens->token_ids + k, sizeof token_ids);
        take(&best, v / temperature + gumbel(hash_of(token_ids, key)), token_ids, is_kept);
    }
    return best;
}

OPERATION(adjust_logits) {
    const int64_t rows = count(args->num_rows), size = args->vocab_size;
    FOR_TASKS(m, rows) {
        float *x = args->logits + m * size;
        if (args->allowed != NULL) {
            const int32_t *words = args->allowed + m * ((size + 31) / 32);
            for (int64_t k = 0; k < size; k += 32) {
                if (words[k / 32] == -1) continue;
                for (int64_t i = k; i < smaller(size, k + 32); i++)
                    if (!((uint32_t)words[k / 32] >> (i - k) & 1)) x[i] = -INFINITY;
            }
        }
        if (args->starts == NULL) continue;
        for (int64_t i = args->starts[m]; i < args->starts[m + 1]; i++) {
            const int32_t token_id = args->token_ids[i];
            if (token_id < 0 || token_id >= size) continue;
            const float v = x[token_id] + args->bias[i], penalty = args->repetition[i];
            x[token_id] = (v > 0.0f ? v / penalty : v * penalty) - args->subtract[i];
        }
    }
}

OPERATION(draw_tokens) {
    const int64_t rows = count(args->num_rows), size = args->vocab_size, padded = size + 2 * LANES;
    static _Thread_local Room scratch;
    FOR_TASKS(m, rows) {
        const float *x = args->logits + m * size;
        const Filters how = {args->temperature[m], args->top_p[m], args->min_p[m], args->top_k[m]};
        const Key key = {args->key_low[m], args->key_high[m]};
        float peak;
        const int64_t index = likeliest(x, size, &peak);
        const float largest = peak / how.temperature;
        args->tokens[m] = (int32_t)index;
        if (index < 0 || how.temperature == 0.0f) continue;
        if (largest - largest != 0.0f) args->tokens[m] = -1;
        else if (how.top_p < 1.0f || how.min_p > 0.0f || (how.top_k > 0 && how.top_k < size)) {
            int32_t *words = room(&scratch, 4 * padded * (int64_t)sizeof(int32_t));
            Tokens tokens = {(float *)words, words + padded, 0};
            const float least = filter(x, size, peak, &how, &tokens, words + 2 * padded, words + 3 * padded);
            args->tokens[m] = draw_of_some(&tokens, least, how.temperature, key).token_id;
        } else args->tokens[m] = draw_of_all(x, size, how.temperature, key, index).token_id;
    }
}

// log_sum_exp of float_math.py.
INLINE float log_sum_exp(const float *x, int64_t size, float peak) {
    float sums[SUM_LANES] = {0};
    for (int64_t k = 0; k < size; k += LANES) {
        float *part = sums + k % SUM_LANES;
        *(LooseFloats *)part += plain_exp_negative(load_logits(x + k, size - k) - peak);
    }
    for (int64_t half = SUM_LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; i++) sums[i] += sums[i + half];
    return peak + plain_log(fill(sums[0]))[0];
}

OPERATION(logprobs_of) {
    const int64_t rows = count(args->num_rows), size = args->vocab_size;
    FOR_TASKS(m, rows) {
        const float *x = args->logits + m * size;
        const int64_t num = smaller(args->nums[m], size);
        float *values = args->top_values + m * args->most;
        int64_t *token_ids = args->top_ids + m * args->most;
        const float chosen = x[args->tokens[m] < 0 ? 0 : args->tokens[m]];
        Floats largest = fill(-INFINITY);
        int64_t better = 0, found = 0;
        for (int64_t k = 0; k < size; k += LANES) {
            const Floats v = load_logits(x + k, size - k);
            largest = choose(v > largest, v, largest);
            const Ints is_better = v > chosen;
            if (any(is_better))
                for (int i = 0; i < LANES; i++) better -= is_better[i];
            if (num == 0 || (found == num && !any(v > values[num - 1]))) continue;
            for (int64_t i = k; i < smaller(size, k + LANES); i++) {
                if (found == num && !(x[i] > values[num - 1])) continue;
                int64_t place = found < num ? found++ : num - 1;
                for (; place > 0 && x[i] > values[place - 1]; place--) {
                    values[place] = values[place - 1];
                    token_ids[place] = token_ids[place - 1];
                }
                values[place] = x[i];
                token_ids[place] = i;
            }
        }
        const float log_sum = log_sum_exp(x, size, largest_of(largest));
        args->chosen[m] = chosen - log_sum;
        args->ranks[m] = (int32_t)better + 1;
        for (int64_t i = 0; i < found; i++) values[i] -= log_sum;
    }
}
