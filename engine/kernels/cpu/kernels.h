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

// Vectors are registers of the instruction set: compilers take wider ones apart badly. What a row's floats are added up
// in has sixteen lanes nevertheless, element i in lane i % 16: `PARTS` registers.
#if defined(__AVX512VNNI__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
enum { WIDTH = 16, PARTS = WIDTH / LANES };

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef float LooseFloats __attribute__((vector_size(4 * LANES), aligned(4)));

// A loop that is written out.
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)

INLINE Floats load(const float *x) { return *(const LooseFloats *)x; }
INLINE void store(float *x, Floats v) { *(LooseFloats *)x = v; }

// The first `size` of a register's floats, zeros behind them; size may be below zero.
INLINE Floats load_part(const float *x, int64_t size) {
    if (size >= LANES) return load(x);
    Floats v = {0};
    if (size > 0) memcpy(&v, x, (size_t)size * sizeof(float));
    return v;
}

INLINE void store_part(float *x, Floats v, int64_t size) {
    if (size >= LANES) store(x, v);
    else if (size > 0) memcpy(x, &v, (size_t)size * sizeof(float));
}

// Of small integers: to 32 bits each, and from them.
INLINE Ints widen_bytes(const void *x) {
#if LANES == 16
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(x));
#elif LANES == 8
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(x));
#else
    Bytes bytes;
    memcpy(&bytes, x, sizeof bytes);
    return __builtin_convertvector(bytes, Ints);
#endif
}

INLINE Ints widen_halves(const void *x) {
#if LANES == 16
    return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(x));
#elif LANES == 8
    return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(x));
#else
    Halves halves;
    memcpy(&halves, x, sizeof halves);
    return __builtin_convertvector(halves, Ints);
#endif
}

INLINE void store_bytes(int8_t *bytes, Ints x) {
#if LANES == 16
    _mm_storeu_si128((__m128i *)bytes, _mm512_cvtepi32_epi8((__m512i)x));
#elif LANES == 8
    const __m256i lowest = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0C080400));
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(lowest), _mm256_extracti128_si256(lowest, 1));
    _mm_storel_epi64((__m128i *)bytes, both);
#else
    const Bytes narrow = __builtin_convertvector(x, Bytes);
    memcpy(bytes, &narrow, sizeof narrow);
#endif
}

INLINE Ints lane_numbers(void) {
    static const int32_t numbers[WIDTH] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (Ints)load((const float *)numbers);
}

INLINE Floats fill(float x) { return x - (Floats){0}; }

INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// Of whole numbers that 32 bits hold.
INLINE Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }

// Lane by lane, of a mask of all ones or zeros.
INLINE Floats choose(Ints mask, Floats yes, Floats no) {
#if LANES == 16
    return (Floats)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)mask), (__m512)no, (__m512)yes);
#elif LANES == 8
    return (Floats)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)mask);
#else
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
#endif
}

INLINE Ints larger_of(Ints a, Ints b) {
#if LANES == 8
    return (Ints)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    const Ints is_first = a > b;
    return (is_first & a) | (~is_first & b);
#endif
}

// Whether a lane of a mask, all ones or zeros each, is set.
INLINE int any(Ints mask) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif LANES == 8
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int64_t pairs[2];
    memcpy(pairs, &mask, sizeof pairs);
    return (pairs[0] | pairs[1]) != 0;
#endif
}

// b where either is not a number.
INLINE Floats maximum(Floats a, Floats b) {
#if LANES == 16
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

// a * b + c, rounded once.
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if LANES == 16
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int i = 0; i < LANES; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

// A row's sixteen lanes, added as a tree.
INLINE float sum_lanes(const Floats *parts) {
    float v[WIDTH];
    EACH(p, PARTS) store(v + p * LANES, parts[p]);
    EACH(i, 8) v[i] += v[i + 8];
    EACH(i, 4) v[i] += v[i + 4];
    return (v[0] + v[2]) + (v[1] + v[3]);
}

// Their largest, `maximum` taken as a tree.
INLINE float largest_lane(const Floats *parts) {
    float v[WIDTH];
    EACH(p, PARTS) store(v + p * LANES, parts[p]);
    EACH(i, 8) v[i] = v[i] > v[i + 8] ? v[i] : v[i + 8];
    EACH(i, 4) v[i] = v[i] > v[i + 4] ? v[i] : v[i + 4];
    EACH(i, 2) v[i] = v[i] > v[i + 2] ? v[i] : v[i + 2];
    return v[0] > v[1] ? v[0] : v[1];
}

INLINE int32_t sum_ints(Ints x) {
    int32_t sum = 0;
    EACH(i, LANES) sum += x[i];
    return sum;
}

INLINE int32_t largest_int(Ints x) {
    int32_t largest = x[0];
    EACH(i, LANES) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

INLINE Floats absolute(Floats v) { return (Floats)((Ints)v & 0x7FFFFFFF); }

INLINE float float_of_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The nearest integer, ties to even, of |x| < 2^22: beside 1.5 * 2^23 there are no bits for a fraction.
INLINE Floats round_even(Floats x) {
#if LANES == 16
    return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif LANES == 8
    return (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
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
#if LANES == 16
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif LANES == 8 && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#else
    Floats v;
    for (int i = 0; i < LANES; i++) v[i] = from_half(x[i]);
    return v;
#endif
}

// The nearest integers as such.
INLINE Ints round_to_ints(Floats x) {
#if LANES == 16
    return (Ints)_mm512_cvtps_epi32((__m512)x);
#elif LANES == 8
    return (Ints)_mm256_cvtps_epi32((__m256)x);
#else
    return to_ints(round_even(x));
#endif
}

// x * 2^n for whole n that leave it a normal number.
INLINE Floats scale_by_power(Floats x, Floats n) {
#if LANES == 16
    return (Floats)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
    const Floats finite = choose(n < INFINITY, n, fill(0.0f));  // a NaN is less than nothing
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
INLINE Floats exp_negative(Floats x) { return exp_in_range(choose(x < -87.0f, fill(-87.0f), x)); }

// exp(x) for x <= 0, 0 below -87.
INLINE Floats exp_or_zero(Floats x) { return choose(x < -87.0f, (Floats){0}, exp_in_range(x)); }

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
    Ints total = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) total -= (Ints)load((const float *)values + i) <= limit;
    int64_t sum = sum_ints(total);
    for (; i < size; i++) sum += values[i] <= limit;
    return sum;
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
    return float_of_bits(high);
}

// The largest size of up to 32 elements, as its bits: a NaN's are above infinity's.
INLINE int32_t largest_size(const float *x, int64_t left) {
    Ints largest = {0};
    EACH(i, SPREAD_BLOCK / LANES)
        largest = larger_of(largest, (Ints)absolute(load_part(x + i * LANES, left - i * LANES)));
    return largest_int(largest);
}

// That of a token whose elements are finite: of the largest of each 32, and of the largest of all, as bits.
INLINE float scale_of_token(const int32_t *maxima, int64_t blocks, int32_t largest, float spread) {
    const float absmax = float_of_bits(largest);
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
        const Ints is_over = absolute(q) > 127.0f;
        if (!any(is_over)) {
            const Ints low_codes = to_ints(q);
            low_sums += low_codes;
            store_bytes(low + k, low_codes);
            continue;
        }
        const Floats h = choose(is_over, round_even(q * (1.0f / 128)), (Floats){0});
        const Ints low_codes = to_ints(q - h * 128), high = to_ints(h);
        low_sums += low_codes;
        high_sums += high;
        store_bytes(low + k, low_codes);
        int8_t over[LANES];
        store_bytes(over, high);
        // Written for each quad, kept if it is not zero: there is room for all.
        for (int i = 0; i < LANES / 4; i++) {
            int32_t of_quad;
            memcpy(&of_quad, over + 4 * i, sizeof of_quad);
            quads[token.num_quads].index = (int32_t)(k / 4) + i;
            memcpy(quads[token.num_quads].codes, &of_quad, sizeof of_quad);
            token.num_quads += of_quad != 0;
        }
    }
    token.low_sum = sum_ints(low_sums);
    token.high_sum = sum_ints(high_sums);
    codes.tokens[m] = token;
}

// Row m of the codes, of x [size]; maxima: scratch of ceil(size / 32) words.
INLINE void quantize_row(const float *x, int64_t size, float spread, Codes codes, int64_t m, int32_t *maxima) {
    int32_t bits = 0;
    for (int64_t k = 0; k < size; k += SPREAD_BLOCK) {
        const int32_t largest = largest_size(x + k, size - k);
        maxima[k / SPREAD_BLOCK] = largest;
        bits = largest > bits ? largest : bits;
    }
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
