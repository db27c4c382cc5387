/* A pool of threads that callers share: each takes the next piece of the oldest unfinished work. */
#include "threads.h"

#include <pthread.h>
#include <stddef.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

enum { MOST_THREADS = 256, STACK_BYTES = 2 << 20 };

struct work {
    void (*call)(const void *of, int64_t index);
    const void *of;
    int64_t next, count;
    int helpers, most_helpers;
    unsigned rounding;
    struct work *after;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t offered = PTHREAD_COND_INITIALIZER, finished = PTHREAD_COND_INITIALIZER;
static struct work *first;
static int started, registered;

/* Whether tiny numbers become zero is a setting of each thread; helpers take that of the caller. */
static unsigned rounding(void) {
#if defined(__SSE__)
    return _mm_getcsr();
#else
    return 0;
#endif
}

static void set_rounding(unsigned mode) {
#if defined(__SSE__)
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}

static void take_pieces(struct work *work) {
    int64_t index;
    while ((index = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count)
        work->call(work->of, index);
}

static struct work *open_work(void) {
    for (struct work *work = first; work; work = work->after)
        if (work->helpers < work->most_helpers &&
            __atomic_load_n(&work->next, __ATOMIC_RELAXED) < work->count)
            return work;
    return NULL;
}

static void *help(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        struct work *work = open_work();
        if (!work) {
            pthread_cond_wait(&offered, &lock);
            continue;
        }
        work->helpers++;
        pthread_mutex_unlock(&lock);
        set_rounding(work->rounding);
        take_pieces(work);
        pthread_mutex_lock(&lock);
        if (--work->helpers == 0) pthread_cond_broadcast(&finished);
    }
    return NULL;
}

/* A child of fork() has none of the threads, and the locks as they happened to be. */
static void forget(void) {
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&offered, NULL);
    pthread_cond_init(&finished, NULL);
    first = NULL;
    started = 0;
}

/* Where no thread can be started, those that are there do the work. */
static void start_helpers(int wanted) {
    pthread_attr_t attributes;
    pthread_t thread;
    if (!registered) registered = pthread_atfork(NULL, NULL, forget) == 0;
    if (!registered || pthread_attr_init(&attributes)) return;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (started < wanted && !pthread_create(&thread, &attributes, help, NULL)) started++;
    pthread_attr_destroy(&attributes);
}

static void remove_work(struct work *work) {
    struct work **place = &first;
    while (*place != work) place = &(*place)->after;
    *place = work->after;
}

void run_parallel(void (*call)(const void *, int64_t), const void *of, int64_t count, int threads) {
    threads = (int)at_most(threads, at_most(count, MOST_THREADS));
    if (threads <= 1) {
        for (int64_t index = 0; index < count; index++) call(of, index);
        return;
    }
    struct work work = {call, of, 0, count, 0, threads - 1, rounding(), NULL};
    pthread_mutex_lock(&lock);
    start_helpers(threads - 1);
    struct work **end = &first;
    while (*end) end = &(*end)->after;
    *end = &work;
    pthread_cond_broadcast(&offered);
    pthread_mutex_unlock(&lock);
    take_pieces(&work);
    pthread_mutex_lock(&lock);
    remove_work(&work);
    while (work.helpers) pthread_cond_wait(&finished, &lock);
    pthread_mutex_unlock(&lock);
}
