"""Runs the replays of a sweep on all cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from multiprocessing import resource_tracker

from cache.tune import Laboratory, Score, Task
from offload.events import LoadProgress

_STAGE = "replaying"
_laboratory: Laboratory | None = None  # of a worker process, which serves one sweep


def run_sweep(
    laboratory: Laboratory, jobs: int | None, on_event: Callable[[LoadProgress], None], *, aside: bool = False
) -> dict[Task, Score]:
    """The scores of all tasks; ``jobs`` None takes as many processes as the process may use cores.

    With ``aside`` this process has something else to do meanwhile: half of the cores are used, at a low priority, and
    nothing is replayed in this process. After Ctrl-C, and after any error, one that ``on_event`` raises included, no
    process is left.
    """
    tasks = laboratory.tasks()
    if jobs is None:
        jobs = max(1, _cores() // 2) if aside else _cores()
    jobs = min(jobs, len(tasks))
    scores: dict[Task, Score] = {}

    def took(task: Task, score: Score) -> None:
        scores[task] = score
        on_event(LoadProgress(_STAGE, len(scores), len(tasks), "steps"))

    on_event(LoadProgress(_STAGE, 0, len(tasks), "steps"))
    if jobs <= 1 and not aside:
        for task in tasks:
            took(task, laboratory.run(task))
        return scores
    # fresh processes: a fork would copy the locks of the progress bar's thread in whatever state they are
    with _interrupts_wait():
        pool = multiprocessing.get_context("spawn").Pool(jobs, _start_worker, (laboratory, aside))
    with pool:
        for task, score in pool.imap_unordered(_run, tasks):
            took(task, score)
    return scores


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold SIGINT back. Processes that are started meanwhile never get it: Ctrl-C goes to the whole group, and each of
    them would complain about it; it is for the parent to end them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    with redirect_stderr(sys.__stderr__):  # a full-screen program has another in its place, without a descriptor
        resource_tracker.ensure_running()  # whose start would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(laboratory: Laboratory, aside: bool) -> None:
    global _laboratory
    _laboratory = laboratory
    if aside:
        os.nice(10)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the screen is somebody else's


def _run(task: Task) -> tuple[Task, Score]:
    assert _laboratory is not None
    return task, _laboratory.run(task)
