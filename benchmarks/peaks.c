// What this machine can do at most: peaks THREADS prints bytes read from memory and int8 multiply-adds a second,
// the best of five of each, on so many threads at once.

#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    ROUNDS = 5,
    BUFFER = 256 << 20,  // bytes of all threads together: far more than a last-level cache
    PRODUCTS = 20 << 20, // instructions of a thread and round
    SUMS = 10,           // that do not wait for each other
};

#if defined(__AVX512VNNI__)
typedef __m512i Codes;
#define ADD_PRODUCTS(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
#elif defined(__AVXVNNI__)
typedef __m256i Codes;
#define ADD_PRODUCTS(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
#elif defined(__AVX2__)
typedef __m256i Codes;
#define ADD_PRODUCTS(sum, a, b) \
    _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))
#else
#error "no int8 dot products are known for this processor"
#endif

typedef int64_t Words __attribute__((vector_size(64)));

static pthread_barrier_t barrier;
static int num_threads;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static void read_all(const Words *words, int64_t size) {
    Words sums[4] = {0};
    for (int64_t i = 0; i < size; i += 4)
        for (int part = 0; part < 4; part++) sums[part] ^= words[i + part];
    for (int part = 0; part < 4; part++) __asm__ volatile("" : : "m"(sums[part]));
}

static void multiply(void) {
    Codes sums[SUMS], a, b;
    _Pragma("GCC unroll 16") for (int s = 0; s < SUMS; s++) sums[s] = (Codes){0};
    memset(&a, 1, sizeof a);
    memset(&b, 1, sizeof b);
    for (int64_t i = 0; i < PRODUCTS / SUMS; i++)
        _Pragma("GCC unroll 16") for (int s = 0; s < SUMS; s++) {
            __asm__ volatile("" : "+x"(a));  // or every round would add the same products
            sums[s] = ADD_PRODUCTS(sums[s], a, b);
        }
    // Written out too: an array that is indexed would lie in memory, and every product would be stored.
    _Pragma("GCC unroll 16") for (int s = 0; s < SUMS; s++) __asm__ volatile("" : : "x"(sums[s]));
}

// best[0]: seconds in which all threads read the buffer; best[1]: in which they multiply.
static void *run(void *best) {
    const int64_t size = BUFFER / num_threads / sizeof(Words) / 4 * 4;
    Words *words = aligned_alloc(sizeof(Words), size * sizeof(Words));
    if (words == NULL) exit(1);
    memset(words, 1, size * sizeof(Words));
    for (int round = 0; round < ROUNDS; round++)
        for (int what = 0; what < 2; what++) {
            pthread_barrier_wait(&barrier);
            const double start = now();
            if (what == 0) read_all(words, size);
            else multiply();
            pthread_barrier_wait(&barrier);
            const double seconds = now() - start;
            if (best != NULL && seconds < ((double *)best)[what]) ((double *)best)[what] = seconds;
        }
    free(words);
    return NULL;
}

int main(int count, char **arguments) {
    num_threads = count == 2 ? atoi(arguments[1]) : 0;
    if (num_threads < 1) return 2;
    pthread_barrier_init(&barrier, NULL, num_threads);
    double best[2] = {1e9, 1e9};
    for (int other = 1; other < num_threads; other++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, run, NULL) != 0) return 1;
    }
    run(best);
    printf("%.0f %.0f\n", BUFFER / best[0], (double)PRODUCTS * num_threads * sizeof(Codes) / best[1]);
    return 0;
}
