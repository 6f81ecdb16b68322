/* Shares the parts of a piece of work among threads that wait for it. */
#pragma once

/* Calls work(context, part) for every part from 0 to parts - 1, by the calling thread and up to threads - 1 others, and
 * returns when all are done. The calling thread does what the others do not take, so that it never waits for one that the
 * system has not given a processor yet: OpenMP's barriers wait for every thread at each of the hundred pieces of a token,
 * which made decoding ten times slower beside other programs. Any thread may call; one at a time is helped. */
void pool_run(int threads, int parts, void (*work)(void *context, int part), void *context);
