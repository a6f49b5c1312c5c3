// Runs operations one after the other on a few threads.
//
// An operation is cut into tasks, and the next one begins when all are done, not when all threads have come: on a
// machine that also does other things, a thread that is not running holds nobody up unless it has begun a task.
// Such a thread may even be behind by a whole run. It finds that every task is taken: a finished run's counters are
// closed before what the operations read may change.

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include "kernels.h"

enum {
    SPINS = 1000,  // some 20 µs of looking before a thread makes way
    RUNS = 4,      // as many behind as a thread may be before it is waited for
};

static const int64_t CLOSED = INT64_MAX / 2;

typedef struct {
    Operation *operation;
    const void *words;
} Call;

typedef struct {
    const Call *calls;
    int64_t size;
    Counters *counters;
    int64_t capacity, active;  // threads inside
} Run;

typedef struct {
    int64_t num_threads, generation, sleepers;
    Run runs[RUNS], *current;
    int64_t call;                             // which one of the run the thread that runs calls is at
    pthread_mutex_t mutex, running, growing;  // running: held by who runs calls; growing: while counters move
    pthread_cond_t posted;
} Pool;

INLINE void pause_briefly(int64_t *spins) {
    if (++*spins % SPINS == 0) sched_yield();
#ifdef __x86_64__
    else _mm_pause();
#endif
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

// at: where to say which call it is at, or null
static void work(const Run *run, Team team, double *seconds, int64_t *at) {
    double start = seconds == NULL ? 0 : now();
    for (int64_t i = 0; i < run->size; i++) {
        if (at != NULL) __atomic_store_n(at, i, __ATOMIC_RELAXED);
        team.counters = run->counters + i;
        team.taken = 0;
        if (__atomic_load_n(&team.counters->next, __ATOMIC_RELAXED) >= CLOSED) return;
        run->calls[i].operation(run->calls[i].words, &team);
        if (team.taken != 0) __atomic_fetch_add(&team.counters->done, team.taken, __ATOMIC_RELEASE);
        int64_t spins = 0;
        while (__atomic_load_n(&team.counters->done, __ATOMIC_ACQUIRE) < team.total) pause_briefly(&spins);
        if (seconds != NULL) {
            const double end = now();
            seconds[i] += end - start;
            start = end;
        }
    }
}

static void *serve(void *argument) {
    Pool *pool = argument;
    int64_t seen = 0;
    for (;;) {
        for (int64_t spins = 0; spins < SPINS && __atomic_load_n(&pool->generation, __ATOMIC_SEQ_CST) == seen;)
            pause_briefly(&spins);
        if (__atomic_load_n(&pool->generation, __ATOMIC_SEQ_CST) == seen) {
            pthread_mutex_lock(&pool->mutex);
            __atomic_fetch_add(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
            while (__atomic_load_n(&pool->generation, __ATOMIC_SEQ_CST) == seen)
                pthread_cond_wait(&pool->posted, &pool->mutex);
            __atomic_fetch_sub(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
            pthread_mutex_unlock(&pool->mutex);
        }
        seen = __atomic_load_n(&pool->generation, __ATOMIC_SEQ_CST);
        Run *run = __atomic_load_n(&pool->current, __ATOMIC_SEQ_CST);
        if (run == NULL) continue;
        // Whoever reuses a run's memory waits until it is neither current nor active.
        __atomic_fetch_add(&run->active, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&pool->current, __ATOMIC_SEQ_CST) == run)
            work(run, (Team){pool->num_threads, NULL, 0, 0}, NULL, NULL);
        __atomic_fetch_sub(&run->active, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

// A pool that lives as long as the process; null if the system gives no threads.
void *create_pool(int64_t num_threads) {
    Pool *pool = calloc(1, sizeof *pool);
    pool->num_threads = num_threads;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_mutex_init(&pool->running, NULL);
    pthread_mutex_init(&pool->growing, NULL);
    pthread_cond_init(&pool->posted, NULL);
    for (int64_t thread = 1; thread < num_threads; thread++) {
        pthread_t id;
        if (pthread_create(&id, NULL, serve, pool) != 0) return NULL;
        pthread_detach(id);
    }
    return pool;
}

// Waits until no thread reads a run's calls any more.
void drain_pool(Pool *pool) {
    __atomic_store_n(&pool->current, NULL, __ATOMIC_SEQ_CST);
    int64_t spins = 0;
    for (int64_t i = 0; i < RUNS; i++)
        while (__atomic_load_n(&pool->runs[i].active, __ATOMIC_SEQ_CST) != 0) pause_briefly(&spins);
}

// seconds: [size], to which each call's duration is added, or null. Who comes while another runs calls waits.
void run_calls(Pool *pool, const Call *calls, int64_t size, double *seconds) {
    pthread_mutex_lock(&pool->running);
    Run *run = &pool->runs[pool->generation % RUNS];
    int64_t spins = 0;
    while (__atomic_load_n(&run->active, __ATOMIC_SEQ_CST) != 0) pause_briefly(&spins);
    if (run->capacity < size) {
        pthread_mutex_lock(&pool->growing);
        free(run->counters);
        run->counters = aligned_alloc(sizeof(Counters), (size_t)size * sizeof(Counters));
        run->capacity = size;
        pthread_mutex_unlock(&pool->growing);
    }
    memset(run->counters, 0, (size_t)size * sizeof(Counters));
    run->calls = calls;
    run->size = size;
    __atomic_store_n(&pool->current, run, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&pool->generation, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool->sleepers, __ATOMIC_SEQ_CST) != 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->posted);
        pthread_mutex_unlock(&pool->mutex);
    }
    work(run, (Team){pool->num_threads, NULL, 0, 0}, seconds, &pool->call);
    // Both: a thread that is behind may count more tasks than there were, and must not wait for them.
    for (int64_t i = 0; i < size; i++) {
        __atomic_store_n(&run->counters[i].next, CLOSED, __ATOMIC_SEQ_CST);
        __atomic_store_n(&run->counters[i].done, CLOSED, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&pool->running);
}

// A number that is another one when a task has been taken meanwhile. Any thread may ask.
int64_t pool_progress(Pool *pool) {
    pthread_mutex_lock(&pool->growing);
    const int64_t generation = __atomic_load_n(&pool->generation, __ATOMIC_SEQ_CST);
    const int64_t call = __atomic_load_n(&pool->call, __ATOMIC_RELAXED);
    const Run *run = &pool->runs[(generation + RUNS - 1) % RUNS];
    const int64_t taken = call < run->capacity ? __atomic_load_n(&run->counters[call].next, __ATOMIC_RELAXED) : 0;
    pthread_mutex_unlock(&pool->growing);
    return (generation << 40) + (call << 24) + (taken & 0xffffff);
}
