// Threads of the OpenMP runtime that the process has loaded (torch's), so that both share one pool.
//
// The runtime is called by its own functions, as weak symbols: any compiler will do, with or without OpenMP of its own, and
// a library that finds no runtime when it is loaded works with one thread.

#pragma once

#ifdef __ELF__
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) __attribute__((weak));
extern void GOMP_barrier(void) __attribute__((weak));

// Call `work` on `threads` threads at once; returns when all are done.
static inline void in_parallel(void (*work)(void *), void *data, int threads) {
  if (GOMP_parallel && GOMP_barrier && threads > 1) GOMP_parallel(work, data, threads, 0);
  else work(data);
}

// Wait until all threads of `in_parallel` are here; one alone does not wait.
static inline void wait_for_all(void) {
  if (GOMP_parallel && GOMP_barrier) GOMP_barrier();
}
#else
static inline void in_parallel(void (*work)(void *), void *data, int threads) { (void)threads, work(data); }

static inline void wait_for_all(void) {}
#endif

// The next `step` items of a loop that threads share, from what this returns on.
static inline long take(long *next, long step) { return __atomic_fetch_add(next, step, __ATOMIC_RELAXED); }
