/* A pool of threads for the C kernels of packages. */
#ifndef CORE_THREADS_H
#define CORE_THREADS_H

#include <stdint.h>

static inline int64_t at_most(int64_t value, int64_t limit) {
    return value < limit ? value : limit;
}

/* Calls work(of, index) for every index below count, on up to `threads` threads with this one. */
void run_parallel(void (*work)(const void *of, int64_t index), const void *of, int64_t count,
                  int threads);

#endif
