// Turns of processes that exchange through memory which all have mapped.
//
// Each process has a counter there, and two places for what it hands over, which it uses by turns. It fills a place,
// counts up, and waits until all others have counted as far: then all places of that turn may be read. One that is
// ahead fills its other place; it comes back to the first only when all have counted on, which they do after reading.

#include <sched.h>
#include <time.h>

#include "kernels.h"

enum {
    LOOKS = 1000,   // some 20 µs before a process makes way for others
    YIELDS = 1000,  // before it sleeps
};

static const int64_t NAP = 50000;  // ns

typedef struct {
    int64_t turn, padding[7];  // a cache line
} Counter;

void begin_turn(Counter *counters, int64_t rank, int64_t turn) {
    __atomic_store_n(&counters[rank].turn, turn, __ATOMIC_RELEASE);
}

// Whether all have come to the turn; waits for that, but not for many times NAP.
int64_t await_turn(const Counter *counters, int64_t size, int64_t turn, int64_t naps) {
    int64_t looks = 0;
    for (int64_t rank = 0; rank < size; rank++)
        while (__atomic_load_n(&counters[rank].turn, __ATOMIC_ACQUIRE) < turn) {
            if (++looks % LOOKS) {
#ifdef __x86_64__
                _mm_pause();
#endif
            } else if (looks < (int64_t)LOOKS * YIELDS) {
                sched_yield();
            } else {
                if (naps-- == 0) return 0;
                nanosleep(&(struct timespec){0, NAP}, NULL);
                looks -= LOOKS;
            }
        }
    return 1;
}
