"""Optimizer steps of several cases, each in a process of its own, that take turns in a new random order each round.

A case's function runs in its process and brackets every step with `begin`, which waits until it is asked for, and
`end`. So training loops that own their process (Lightning's, transformers') are timed as they are, side by side.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from multiprocessing.connection import Connection
from statistics import fmean
from typing import Any, TypeVar, cast

import torch
from kinds_of_work import seconds_by_kind
from torch.profiler import ProfilerActivity, profile

CUDA = torch.cuda.is_available()
COUNTED = 3  # steps whose kinds of work are averaged: page faults fall on whatever comes first
PRELOADED = ["bvpo.module", "trl.trainer.dpo_trainer"]  # imported once for all processes, where they are there


@dataclass(frozen=True)
class Step:
    """Seconds of one step, and of a counted one what it allocated and where its time went.

    Attributes:
        peak: Bytes: the peak of what PyTorch allocated. What was allocated before the step (weights, the optimizer's
            moments) is not in it. It counts PyTorch's allocator, not the process: neither libraries' scratch nor freed
            pages that the C library keeps.
        kinds: Seconds by kind of work.
    """

    cpu: float
    wall: float
    peak: int | None = None
    kinds: dict[str, float] | None = None

    @property
    def seconds(self) -> float:
        """A GPU's work is no CPU time."""
        return self.wall if CUDA else self.cpu


def mean_of(kinds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Seconds by kind of work, of several steps."""
    return {kind: fmean(own[kind] for own in kinds) for kind in kinds[0]}


class Turns:
    """The child's end of the line."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.ready = pipe, False

    def begin(self) -> None:
        """Wait until a step is asked for."""
        if CUDA:
            torch.cuda.empty_cache()  # the other processes' steps want the room
        if not self.ready:
            self.pipe.send("ready")
            self.ready = True
        self.counted = self.pipe.recv()
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.allocated = torch.cuda.memory_allocated()
        if self.counted:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
            self.profiler = profile(activities=activities, profile_memory=not CUDA)
            self.profiler.start()
        self.started = time.process_time(), time.perf_counter()

    def end(self) -> None:
        """Send the step's figures."""
        if CUDA:
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - self.started[0], time.perf_counter() - self.started[1]
        peak = kinds = None
        if self.counted:
            self.profiler.stop()
            peak = torch.cuda.max_memory_allocated() - self.allocated if CUDA else self._peak()
            kinds = seconds_by_kind(self.profiler, wall if CUDA else cpu)
        self.pipe.send(Step(cpu, wall, peak, kinds))

    def _peak(self) -> int:
        """On a CPU the profiler alone sees what is allocated."""
        results = cast(Any, self.profiler.profiler).kineto_results
        events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
        return int(max(accumulate(event.nbytes() for event in events)))


Case = TypeVar("Case")
Run = Callable[[Case, Turns], None]  # steps of a case without an end; at a module's top level


def _work(run: Run[Case], case: Case, threads: int, scratch: str, pipe: Connection) -> None:
    """The child. What packages print goes nowhere: the benchmark's table is the output."""
    tempfile.tempdir = scratch
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        run(case, Turns(pipe))
    except Exception:
        pipe.send(traceback.format_exc())


class Worker:
    """The parent's end of the line. Every method raises RuntimeError, with the child's traceback, where that failed."""

    def __init__(self, run: Run[Case], case: Case, threads: int, scratch: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(run, case, threads, scratch, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._receive()

    def step(self, counted: bool = False) -> Step:
        """One step; `counted`: with its memory and its kinds of work, which costs time."""
        self.pipe.send(counted)
        return cast(Step, self._receive())

    def _receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            answer = "its process has died"
        if isinstance(answer, str) and answer != "ready":
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        self.process.kill()  # Lightning takes SIGTERM for a request
        self.process.join()


def measure(
    run: Run[Case], cases: Sequence[Case], repeats: int, threads: int, say: Callable[[str], None]
) -> dict[Case, list[Step]]:
    """Timed steps of each case, one a round, and at the end of each list a counted one.

    Args:
        repeats: Rounds, after one that warms up.
        threads: PyTorch's, in each process.
        say: Told of a case that cannot run; it is left out.
    """
    os.environ["PYTHONWARNINGS"] = "ignore"  # children are ended by force, and leave locks behind
    rng, workers = random.Random(0), dict[Case, Worker]()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for case in cases:
                try:
                    workers[case] = Worker(run, case, threads, scratch)
                except RuntimeError as error:
                    say(f"{case} cannot run and is left out:\n{error}")
            steps: dict[Case, list[Step]] = {case: [] for case in workers}
            for number in range(-1, repeats):
                for case in rng.sample(list(workers), len(workers)):
                    step = workers[case].step()
                    if number >= 0:
                        steps[case].append(step)
            for case, worker in workers.items():
                counted = [worker.step(counted=True) for _ in range(COUNTED)]
                steps[case].append(replace(counted[-1], kinds=mean_of([step.kinds or {} for step in counted])))
        finally:
            for worker in workers.values():
                worker.close()
    return steps
