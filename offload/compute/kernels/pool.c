#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#define MOST_WORKERS 255
#define SPINS 3000 /* looks for more work before going to sleep: some 50 microseconds, about the time between two pieces */

/* The piece of work: its number in the upper half of `state`, in the lower how many of its parts nobody has taken. A part
 * is taken by lowering that while the number is unchanged; a new piece starts only when all parts of the old one are
 * done. So what whoever took a part reads afterwards belongs to it. */
static _Atomic uint64_t state;
static _Atomic int parts_of, workers_of, done;
static void (*_Atomic work_of)(void *, int);
static void *_Atomic context_of;

static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t awake = PTHREAD_COND_INITIALIZER;
static _Atomic int sleepers;
static atomic_flag taken = ATOMIC_FLAG_INIT; /* by the thread whose work it is, who alone writes what is above and below */
static int workers;

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Takes parts of the piece `turn` until none is left, or another piece has begun. */
static void take_parts(uint32_t turn) {
  uint64_t now = atomic_load(&state);
  while (now >> 32 == turn && (uint32_t)now) {
    if (!atomic_compare_exchange_weak(&state, &now, now - 1)) continue;
    void (*work)(void *, int) = atomic_load(&work_of);
    work(atomic_load(&context_of), atomic_load(&parts_of) - (int)(uint32_t)now);
    atomic_fetch_add(&done, 1);
    now = atomic_load(&state);
  }
}

static uint32_t next_turn(uint32_t seen) { /* waits for a piece other than `seen` */
  uint32_t turn;
  for (int i = 0; i < SPINS; i++) {
    if ((turn = (uint32_t)(atomic_load(&state) >> 32)) != seen) return turn;
    relax();
  }
  pthread_mutex_lock(&sleep_lock);
  atomic_fetch_add(&sleepers, 1);
  while ((turn = (uint32_t)(atomic_load(&state) >> 32)) == seen) pthread_cond_wait(&awake, &sleep_lock);
  atomic_fetch_sub(&sleepers, 1);
  pthread_mutex_unlock(&sleep_lock);
  return turn;
}

static void *worker(void *number) {
  uint32_t seen = 0;
  for (;;) {
    seen = next_turn(seen);
    if ((int)(intptr_t)number < atomic_load(&workers_of)) take_parts(seen);
  }
  return NULL;
}

static void after_fork(void) { /* the child has none of the threads */
  workers = 0;
  atomic_flag_clear(&taken);
  atomic_store(&sleepers, 0);
  pthread_mutex_init(&sleep_lock, NULL);
  pthread_cond_init(&awake, NULL);
}

static void start_workers(int wanted) {
  static int watched;
  if (!watched) watched = !pthread_atfork(NULL, NULL, after_fork);
  for (; workers < wanted && workers < MOST_WORKERS; workers++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)workers)) return; /* fewer are slower, not wrong */
    pthread_detach(thread);
  }
}

void pool_run(int threads, int parts, void (*work)(void *context, int part), void *context) {
  if (threads < 2 || parts < 2 || atomic_flag_test_and_set(&taken)) { /* taken: another thread computes, too */
    for (int part = 0; part < parts; part++) work(context, part);
    return;
  }
  start_workers(threads - 1);
  const uint32_t turn = (uint32_t)(atomic_load(&state) >> 32) + 1;
  atomic_store(&done, 0);
  atomic_store(&work_of, work);
  atomic_store(&context_of, context);
  atomic_store(&parts_of, parts);
  atomic_store(&workers_of, threads - 1);
  atomic_store(&state, (uint64_t)turn << 32 | (uint32_t)parts);
  if (atomic_load(&sleepers)) {
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&awake);
    pthread_mutex_unlock(&sleep_lock);
  }
  take_parts(turn);
  for (int spins = 0; atomic_load(&done) < parts; spins++)
    if (spins < SPINS) relax();
    else sched_yield(); /* its part is begun, but its thread has lost the processor */
  atomic_flag_clear(&taken);
}
