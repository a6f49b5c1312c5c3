// What the CPU's kernels share: how an operation is called, vectors of sixteen floats, and int8 activations.
//
// Exactness: floating-point contraction is off and every fused product is written as one, every reduction runs in
// an order fixed by its own length, and the remainder of a row goes through the same code as its full vectors. So
// a result depends neither on the instruction set nor on the threads nor on what is computed beside it.

#ifndef KERNELS_H
#define KERNELS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// The tasks of an operation that were taken and those that are done, in a cache line of their own.
typedef struct {
    int64_t next, done, padding[6];
} Counters;

// One of the threads that run an operation.
typedef struct {
    int64_t num_threads;
    Counters *counters;
    int64_t taken, total;  // tasks: this thread's, all threads'
} Team;

// Called with the words of its arguments.
typedef void Operation(const void *words, Team *team);

// Defines an operation that operations.h lists: its body reads args->NAME.
#define OPERATION(name)                                                                                            \
    static void name##_body(const name##_arguments *args, Team *team);                                             \
    void name(const void *words, Team *team) { name##_body(words, team); }                                         \
    static void name##_body(const name##_arguments *args, Team *team)

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Input features as panels have them.
INLINE int64_t padded_columns(int64_t size) { return (size + 63) / 64 * 64; }

INLINE int64_t count(const int64_t *rows) { return __atomic_load_n(rows, __ATOMIC_RELAXED); }

// The next of `total` tasks, or -1. Every operation calls it until it has returned that.
INLINE int64_t take_task(Team *team, int64_t total) {
    const int64_t task = __atomic_fetch_add(&team->counters->next, 1, __ATOMIC_RELAXED);
    team->total = total;
    team->taken += task < total;
    return task < total ? task : -1;
}

#define FOR_TASKS(task, total) for (int64_t task; (task = take_task(team, total)) >= 0;)

// Rows, in tasks of a few.
#define FOR_ROWS(row, rows)                                                                                        \
    const int64_t share_ = (rows + 3 * team->num_threads - 1) / (3 * team->num_threads);                           \
    FOR_TASKS(task_, rows == 0 ? 0 : (rows + share_ - 1) / share_)                                                 \
    for (int64_t row = task_ * share_; row < smaller(rows, (task_ + 1) * share_); row++)

// Sixteen at a time; a compiler for smaller registers splits them.
enum { LANES = 16 };
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef float LooseFloats __attribute__((vector_size(64), aligned(4)));

// Where registers hold eight, a compiler splits sums and products itself, but takes comparisons, conversions and
// shuffles apart lane by lane.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define HAS_HALVES 1
typedef union {
    Floats all;
    __m256 half[2];
} FloatHalves;
typedef union {
    Ints all;
    __m256i half[2];
} IntHalves;
#endif

INLINE Floats load(const float *x) { return *(const LooseFloats *)x; }
INLINE void store(float *x, Floats v) { *(LooseFloats *)x = v; }

// The first `size` of sixteen floats, zeros behind them.
INLINE Floats load_part(const float *x, int64_t size) {
    if (size >= LANES) return load(x);
    Floats v = {0};
    memcpy(&v, x, (size_t)size * sizeof(float));
    return v;
}

INLINE void store_part(float *x, Floats v, int64_t size) {
    if (size >= LANES) store(x, v);
    else memcpy(x, &v, (size_t)size * sizeof(float));
}

// Of sixteen small integers: to 32 bits each, and from them.
INLINE Ints widen_bytes(const void *x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(x));
#elif defined(HAS_HALVES)
    const __m128i bytes = _mm_loadu_si128(x);
    const IntHalves v = {.half = {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))}};
    return v.all;
#else
    Bytes bytes;
    memcpy(&bytes, x, sizeof bytes);
    return __builtin_convertvector(bytes, Ints);
#endif
}

INLINE Ints widen_halves(const void *x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(x));
#elif defined(HAS_HALVES)
    const __m128i *halves = x;
    const IntHalves v = {
        .half = {_mm256_cvtepu16_epi32(_mm_loadu_si128(halves)), _mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1))}};
    return v.all;
#else
    Halves halves;
    memcpy(&halves, x, sizeof halves);
    return __builtin_convertvector(halves, Ints);
#endif
}

INLINE Bytes narrow(Ints x) {
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(HAS_HALVES)
    const __m256i lowest = _mm256_set1_epi32(0x0C080400);
    const IntHalves v = {x};
    __m128i eight[2];
    for (int i = 0; i < 2; i++) {
        const __m256i bytes = _mm256_shuffle_epi8(v.half[i], lowest);
        eight[i] = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    }
    return (Bytes)_mm_unpacklo_epi64(eight[0], eight[1]);
#else
    return __builtin_convertvector(x, Bytes);
#endif
}

INLINE Floats fill(float x) { return x - (Floats){0}; }

// A mask of all ones where a is less.
INLINE Ints less(Floats a, Floats b) {
#if defined(HAS_HALVES)
    const FloatHalves x = {a}, y = {b};
    IntHalves mask;
    for (int i = 0; i < 2; i++) mask.half[i] = (__m256i)_mm256_cmp_ps(x.half[i], y.half[i], _CMP_LT_OQ);
    return mask.all;
#else
    return a < b;
#endif
}

INLINE Floats to_floats(Ints x) {
#if defined(HAS_HALVES)
    const IntHalves v = {x};
    const FloatHalves floats = {.half = {_mm256_cvtepi32_ps(v.half[0]), _mm256_cvtepi32_ps(v.half[1])}};
    return floats.all;
#else
    return __builtin_convertvector(x, Floats);
#endif
}

// Of whole numbers that 32 bits hold.
INLINE Ints to_ints(Floats x) {
#if defined(HAS_HALVES)
    const FloatHalves v = {x};
    const IntHalves ints = {.half = {_mm256_cvttps_epi32(v.half[0]), _mm256_cvttps_epi32(v.half[1])}};
    return ints.all;
#else
    return __builtin_convertvector(x, Ints);
#endif
}

// Lane by lane, of a mask of all ones or zeros.
INLINE Floats choose(Ints mask, Floats yes, Floats no) {
#if defined(__AVX512DQ__)
    return (Floats)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)mask), (__m512)no, (__m512)yes);
#elif defined(HAS_HALVES)
    const FloatHalves a = {yes}, b = {no}, m = {(Floats)mask};
    FloatHalves v;
    for (int i = 0; i < 2; i++) v.half[i] = _mm256_blendv_ps(b.half[i], a.half[i], m.half[i]);
    return v.all;
#else
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
#endif
}

INLINE Ints larger_of(Ints a, Ints b) {
#if defined(HAS_HALVES)
    const IntHalves x = {a}, y = {b};
    const IntHalves v = {.half = {_mm256_max_epi32(x.half[0], y.half[0]), _mm256_max_epi32(x.half[1], y.half[1])}};
    return v.all;
#else
    const Ints is_first = a > b;
    return (is_first & a) | (~is_first & b);
#endif
}

// Whether a lane of a mask, all ones or zeros each, is set.
INLINE int any(Ints mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(HAS_HALVES)
    const IntHalves v = {mask};
    const __m256i either = _mm256_or_si256(v.half[0], v.half[1]);
    return !_mm256_testz_si256(either, either);
#else
    int64_t pairs[8], set = 0;
    memcpy(pairs, &mask, sizeof pairs);
    for (int i = 0; i < 8; i++) set |= pairs[i];
    return set != 0;
#endif
}

// b where either is not a number.
INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(HAS_HALVES)
    const FloatHalves x = {a}, y = {b};
    const FloatHalves v = {.half = {_mm256_max_ps(x.half[0], y.half[0]), _mm256_max_ps(x.half[1], y.half[1])}};
    return v.all;
#else
    return choose(a > b, a, b);
#endif
}

// a * b + c, rounded once.
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(HAS_HALVES) && defined(__FMA__)
    FloatHalves x = {a}, y = {b}, z = {c};
    z.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
    z.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
    return z.all;
#else
    for (int i = 0; i < LANES; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

#if defined(__clang__)
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, ...) __builtin_shuffle(v, (Ints){__VA_ARGS__})
#endif

// The sum of all lanes, as a tree.
INLINE float sum_lanes(Floats v) {
#if defined(HAS_HALVES)
    const FloatHalves halves = {v};
    const __m256 eight = _mm256_add_ps(halves.half[0], halves.half[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    v += SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v[0];
#endif
}

INLINE float largest_lane(Floats v) {
#if defined(HAS_HALVES)
    const FloatHalves halves = {v};
    const __m256 eight = _mm256_max_ps(halves.half[0], halves.half[1]);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    v = maximum(v, SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = maximum(v, SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = maximum(v, SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = maximum(v, SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return v[0];
#endif
}

INLINE Floats absolute(Floats v) { return (Floats)((Ints)v & 0x7FFFFFFF); }

// The nearest integer, ties to even, of |x| < 2^22: beside 1.5 * 2^23 there are no bits for a fraction.
INLINE Floats round_even(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return (x + 12582912.0f) - 12582912.0f;
#endif
}

// Half precision, by its own instructions where the compiler may know no such type.
#if defined(__F16C__)
typedef uint16_t Half;
INLINE float from_half(Half x) { return _cvtsh_ss(x); }
INLINE Half to_half(float x) { return _cvtss_sh(x, 0); }
#else
typedef _Float16 Half;
INLINE float from_half(Half x) { return (float)x; }
INLINE Half to_half(float x) { return (Half)x; }
#endif

INLINE Floats load_halves(const Half *x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif defined(HAS_HALVES) && defined(__F16C__)
    const __m128i *halves = (const __m128i *)x;
    const FloatHalves v = {
        .half = {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
    return v.all;
#else
    Floats v;
    for (int i = 0; i < LANES; i++) v[i] = from_half(x[i]);
    return v;
#endif
}

// The nearest integers as such.
INLINE Ints round_to_ints(Floats x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtps_epi32((__m512)x);
#else
    return to_ints(round_even(x));
#endif
}

INLINE int32_t sum_ints(Ints x) {
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

// x * 2^n for whole n that leave it a normal number.
INLINE Floats scale_by_power(Floats x, Floats n) {
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
    const Floats finite = choose(less(n, fill(INFINITY)), n, fill(0.0f));  // a NaN is less than nothing
    return x * (Floats)((to_ints(finite) + 127) << 23);
#endif
}

// exp(x) for -87 <= x <= 0, to 3e-7 relative: 2^n times the Taylor series of the rest, |r| <= ln(2) / 2. Keeps a NaN.
INLINE Floats exp_in_range(Floats x) {
    const Floats n = round_even(x * 1.44269504f);
    // ln(2) in two parts
    const Floats r = multiply_add(n, fill(2.12194440e-4f), multiply_add(n, fill(-0.693359375f), x));
    Floats sum = fill(1.0f / 5040);
    sum = multiply_add(sum, r, fill(1.0f / 720));
    sum = multiply_add(sum, r, fill(1.0f / 120));
    sum = multiply_add(sum, r, fill(1.0f / 24));
    sum = multiply_add(sum, r, fill(1.0f / 6));
    sum = multiply_add(sum, r, fill(0.5f));
    sum = multiply_add(sum, r, fill(1.0f));
    sum = multiply_add(sum, r, fill(1.0f));
    return scale_by_power(sum, n);
}

// exp(x) for x <= 0, exp(-87) below that.
INLINE Floats exp_negative(Floats x) { return exp_in_range(choose(less(x, fill(-87.0f)), fill(-87.0f), x)); }

// exp(x) for x <= 0, 0 below -87.
INLINE Floats exp_or_zero(Floats x) { return choose(less(x, fill(-87.0f)), (Floats){0}, exp_in_range(x)); }

INLINE float exp_negative_scalar(float x) { return exp_negative(fill(x))[0]; }

// Activations as int8 terms, see engine/kernels/quantize.py ("sparse"): x = (128 * high + low) * scale.
typedef struct {
    float scale;
    int32_t low_sum, high_sum, num_quads;
} Token;

// Four high terms of which one is not zero: those of elements 4 * index … 4 * index + 3.
typedef struct {
    int32_t index;
    int8_t codes[4];
} Quad;

// Addresses of M activations: low [M, stride] int8, tokens [M], quads [M, stride / 4]; stride is a multiple of 64,
// and low's rows end in zeros.
typedef struct {
    int8_t *low;
    Token *tokens;
    Quad *quads;
    int64_t stride;
} Codes;

enum { SPREAD_BLOCK = 32 };

INLINE int64_t count_at_most(const int32_t *values, int64_t size, int32_t limit) {
    int64_t total = 0;
#if defined(__AVX512F__)
    for (int64_t i = 0; i < size; i += LANES) {
        const __mmask16 there = (__mmask16)(size - i >= LANES ? 0xFFFF : (1 << (size - i)) - 1);
        const __m512i v = _mm512_maskz_loadu_epi32(there, values + i);
        total += __builtin_popcount(_mm512_mask_cmple_epi32_mask(there, v, _mm512_set1_epi32(limit)));
    }
#else
    for (int64_t i = 0; i < size; i++) total += values[i] <= limit;
#endif
    return total;
}

// The lower median of `size` non-negative floats given as their bits, which are ordered like they are.
INLINE float lower_median(const int32_t *bits, int64_t size) {
    const int64_t rank = (size + 1) / 2;
    int32_t high = 0x7F800000;
    if (size <= 64) {  // the smallest that enough are not above
        for (int64_t i = 0; i < size; i++)
            if (count_at_most(bits, size, bits[i]) >= rank && bits[i] < high) high = bits[i];
    } else {
        int32_t low = -1;  // at most `low` are too few, at most `high` enough
        while (high - low > 1) {
            const int32_t middle = low + (high - low) / 2;
            if (count_at_most(bits, size, middle) >= rank) high = middle;
            else low = middle;
        }
    }
    float median;
    memcpy(&median, &high, sizeof median);
    return median;
}

// The sizes of up to 32 elements, in two halves, as their bits: a NaN's are above infinity's.
INLINE Ints block_sizes(const float *x, int64_t left) {
    const Ints first = (Ints)absolute(load_part(x, left));
    return larger_of(first, left > LANES ? (Ints)absolute(load_part(x + LANES, left - LANES)) : (Ints){0});
}

// That of a token whose elements are finite: of the largest of each 32, and of the largest of all, as bits.
INLINE float scale_of_token(const int32_t *maxima, int64_t blocks, int32_t largest, float spread) {
    float absmax;
    memcpy(&absmax, &largest, sizeof absmax);
    const float scale = spread < INFINITY ? lower_median(maxima, blocks) * spread : absmax * (1.0f / 127);
    return fmaxf(fmaxf(scale, absmax * (1.0f / 16256)), 1.17549435e-38f);
}

// Row m of the codes where x is not finite.
INLINE void write_no_codes(Codes codes, int64_t m) {
    memset(codes.low + m * codes.stride, 0, (size_t)codes.stride);
    codes.tokens[m] = (Token){NAN, 0, 0, 0};
}

// Row m of the codes, of x [size] with this scale.
INLINE void write_codes(const float *x, int64_t size, float scale, Codes codes, int64_t m) {
    int8_t *low = codes.low + m * codes.stride;
    Quad *quads = codes.quads + m * (codes.stride / 4);
    Token token = {scale, 0, 0, 0};
    const float steps = 1.0f / scale;
    Ints low_sums = {0}, high_sums = {0};
    for (int64_t k = 0; k < codes.stride; k += LANES) {
        const Floats q = k < size ? round_even(load_part(x + k, size - k) * steps) : (Floats){0};
        const Ints is_over = less(fill(127.0f), absolute(q));
        const int has_high = any(is_over);
        const Floats h = has_high ? choose(is_over, round_even(q * (1.0f / 128)), (Floats){0}) : (Floats){0};
        const Ints low_codes = to_ints(q - h * 128);
        low_sums += low_codes;
        const Bytes bytes = narrow(low_codes);
        memcpy(low + k, &bytes, LANES);
        if (!has_high) continue;
        const Ints high = to_ints(h);
        high_sums += high;
        const Bytes over = narrow(high);
        int32_t of_quads[4];
        memcpy(of_quads, &over, sizeof of_quads);
        // Written for each of the four, kept if it is not zero: there is room for all.
        for (int i = 0; i < 4; i++) {
            quads[token.num_quads].index = (int32_t)(k / 4) + i;
            memcpy(quads[token.num_quads].codes, of_quads + i, 4);
            token.num_quads += of_quads[i] != 0;
        }
    }
    for (int i = 0; i < LANES; i++) token.low_sum += low_sums[i], token.high_sum += high_sums[i];
    codes.tokens[m] = token;
}

// Row m of the codes, of x [size]; maxima: scratch of ceil(size / 32) words.
INLINE void quantize_row(const float *x, int64_t size, float spread, Codes codes, int64_t m, int32_t *maxima) {
    Ints largest = {0};
    for (int64_t k = 0; k < size; k += SPREAD_BLOCK) {
        const Ints sizes = block_sizes(x + k, size - k);
        largest = larger_of(largest, sizes);
        maxima[k / SPREAD_BLOCK] = ((Ints)fill(largest_lane((Floats)sizes)))[0];
    }
    int32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits = largest[i] > bits ? largest[i] : bits;
    if (bits >= 0x7F800000) write_no_codes(codes, m);
    else write_codes(x, size, scale_of_token(maxima, (size + SPREAD_BLOCK - 1) / SPREAD_BLOCK, bits, spread), codes, m);
}

// Memory of a thread's own, as large as has ever been asked for.
typedef struct {
    void *memory;
    int64_t capacity;
} Room;

INLINE void *room(Room *room, int64_t bytes) {
    if (room->capacity < bytes) {
        free(room->memory);
        room->memory = aligned_alloc(64, (size_t)bytes);
        room->capacity = bytes;
    }
    return room->memory;
}

// The types of a cache, in the order of engine/kernels/attention/kv_layer.py, and the bytes of an element; INT4 has two
// in one.
enum { FLOAT32, BFLOAT16, FLOAT16, INT8, FP8, INT4 };
static const int64_t CACHE_BYTES[] __attribute__((unused)) = {4, 2, 2, 1, 1};
enum { INT4_GROUP = 32 };  // elements of a vector that share a scale and a minimum

// The arguments of each operation, and its declaration.
#define INTEGER(name) int64_t name;
#define FLOAT(name) double name;
#define READS(type, name) const type *name;
#define MAY_READ(type, name) const type *name;
#define WRITES(type, name) type *name;
#define MAY_WRITE(type, name) type *name;
#define READS_CODES Codes codes;
#define READS_GROUP_CODES Codes codes;
#define WRITES_CODES Codes codes;
#define MAY_WRITE_CODES Codes codes;
// Hidden: another library's symbol of that name takes no operation's place.
#define SIGNATURE(operation, arguments)                                                                            \
    typedef struct {                                                                                               \
        const int64_t *num_rows;                                                                                   \
        arguments                                                                                                  \
    } operation##_arguments;                                                                                       \
    __attribute__((visibility("hidden"))) Operation operation;
#include "operations.h"
#undef SIGNATURE
#undef INTEGER
#undef FLOAT
#undef READS
#undef MAY_READ
#undef WRITES
#undef MAY_WRITE
#undef READS_CODES
#undef READS_GROUP_CODES
#undef WRITES_CODES
#undef MAY_WRITE_CODES

_Static_assert(sizeof(void *) == 8, "arguments are words of 8 bytes");

#endif
