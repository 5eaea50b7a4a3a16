"""The fits of a grid on their way: which are finished, which run, what failed and why.

Fits are started through submitit, as processes here or as Slurm jobs. What is finished is read from the run folders, so
nothing else has to survive a kill.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import submitit
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from bvpo.cell import LOG, CellJob, last_words, locked
from bvpo.checkpoints import replacing, write_whole
from bvpo.errors import UserError
from bvpo.grid import Fit, Grid
from bvpo.run_log import read_table
from bvpo.runs import changed_options

POLL = 0.5  # seconds
LONG = 60 * 24 * 365  # minutes: submitit's local processes have a limit, and two minutes by default
DAY = 60 * 24  # minutes that a Slurm job gets where nothing is said


# ---------------------------------------------------------------------- what the folders say


def newest_run(folder: Path) -> Path | None:
    """The newest `version_N` of a fit's folder."""
    numbers = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    number = max((int(own) for own in numbers if own.isdigit()), default=None)
    return None if number is None else folder / f"version_{number}"


def finished_run(fit: Fit) -> Path | None:
    """The run folder of a fit that has come to its end."""
    run = newest_run(fit.folder)
    return run if run is not None and (run / "finished.json").exists() else None


def logged_steps(fit: Fit) -> int:
    """Optimizer steps in the newest run's log, looked up in the end of the file."""
    run = newest_run(fit.folder)
    with suppress(OSError, ValueError):
        if run is not None:
            with (run / "metrics.csv").open("rb") as file:
                place = file.readline().decode().strip().split(",").index("step")
                file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - 65_536))
                lines = file.read().rpartition(b"\n")[0].splitlines()
                return int(float(lines[-1].split(b",")[place])) + 1 if lines else 0
    return 0


def check_settings(grid: Grid) -> None:
    """Note each cell's settings in its folder.

    Raises:
        UserError: Fits with other settings run there or have taken a step; or the settings cannot be written.
    """
    for cell in grid.cells:
        path = grid.output / cell.folder / "settings.yaml"
        try:
            changed = changed_options(path, cell.settings)
            if changed and any(map(_has_begun, path.parent.glob("seed_*"))):
                raise UserError(
                    f"{path.parent}: has fits of cell {cell.name} with other settings ({'; '.join(changed[:5])}): "
                    "delete the folder, or give another --output"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            if changed or not path.exists():
                with replacing(path) as file:
                    write_whole(file, cell.settings.encode())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _has_begun(folder: Path) -> bool:
    """Whether a fit runs in its folder, or has logged a step or written a checkpoint there."""
    if any(map(locked, folder.glob("lock_*"))):
        return True
    logs = [path for path in folder.glob("version_*/metrics.csv") if read_table(path)[1]]
    return bool(logs or [*folder.glob("version_*/finished.json"), *folder.glob("version_*/checkpoints/*")])


# ---------------------------------------------------------------------- running


def time_left(elapsed: float, done: float, to_do: float) -> str:
    """`1 h 05 min` for what is to do, at the rate of what was done; a dash where nothing was yet."""
    if not done > 0:
        return "—"
    minutes, seconds = divmod(round(elapsed * to_do / done), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"


class GridRun:
    """A grid's fits on their way: what waits, what runs, what failed and why.

    Args:
        executor: submitit's.
        jobs: Fits at once.
    """

    def __init__(self, grid: Grid, executor: submitit.Executor, jobs: int, console: Console) -> None:
        self.grid, self.executor, self.jobs, self.console = grid, executor, jobs, console
        fits = grid.fits
        self.waiting = [fit for fit in fits if finished_run(fit) is None]
        self.running: dict[Fit, submitit.Job[int]] = {}
        self.failed: dict[Fit, str] = {}
        self.total, self.done = len(fits), len(fits) - len(self.waiting)
        self._warm = {fit.cell.caches for fit in fits if fit not in self.waiting}  # computed by an earlier fit
        self._before = self.done + sum(map(self._fraction, self.waiting))
        self._started = time.monotonic()

    def run(self) -> None:
        """Run what is not finished. Whatever ends it early ends the fits that run, too."""
        with Progress(
            TextColumn("fits"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        ) as bar:
            task = bar.add_task("", total=self.total, said="")
            try:
                while self.waiting or self.running:
                    self._collect()
                    self._start()
                    bar.update(task, completed=self._progress(), said=self._said())
                    time.sleep(POLL)
                bar.update(task, completed=self._progress(), said=self._said())
            except BaseException:
                for job in self.running.values():
                    _stop(job)
                raise

    def _start(self) -> None:
        while len(self.running) < self.jobs:
            fit = next((fit for fit in self.waiting if not self._needs_others_cache(fit)), None)
            if fit is None:
                return
            self.waiting.remove(fit)
            job = CellJob(fit.folder, fit.arguments, os.environ.get("CUDA_VISIBLE_DEVICES"))
            before = signal.signal(
                signal.SIGINT, signal.SIG_IGN
            )  # inherited: the terminal's Ctrl-C is for this process
            try:
                self.running[fit] = self.executor.submit(job)
            finally:
                signal.signal(signal.SIGINT, before)

    def _needs_others_cache(self, fit: Fit) -> bool:
        """Whether another fit is just about to compute the tokenized rows and log-probabilities that this one needs."""
        same = [other for other in self.running if other.cell.caches == fit.cell.caches]
        if any(logged_steps(other) for other in same):
            self._warm.add(fit.cell.caches)
        return bool(same) and fit.cell.caches not in self._warm

    def _collect(self) -> None:
        for fit, job in list(self.running.items()):
            if not job.done():
                continue
            del self.running[fit]
            if finished_run(fit) is None:
                self.failed[fit] = _cause(fit, job)
                self._say(f"failed: {fit.name}: {self.failed[fit]}")
            else:
                self.done += 1
                self._say(f"finished: {fit.name}")

    def _fraction(self, fit: Fit) -> float:
        return min(logged_steps(fit) / fit.cell.steps, 1.0) if fit.cell.steps else 0.0

    def _progress(self) -> float:
        return self.done + len(self.failed) + sum(map(self._fraction, [*self.running, *self.waiting]))

    def _said(self) -> str:
        progress = self._progress()
        left = time_left(time.monotonic() - self._started, progress - self._before, self.total - progress)
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"{self.done} of {self.total}{failed}, {left} left"

    def _say(self, what: str) -> None:
        self.console.print(f"{escape(what)} [dim]({escape(self._said())})[/dim]", highlight=False, soft_wrap=True)


def _stop(job: submitit.Job[int]) -> None:
    """Tell a fit to end its step and write a checkpoint."""
    if isinstance(job, submitit.LocalJob):
        with suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)
    else:
        job.cancel(check=False)


def _cause(fit: Fit, job: submitit.Job[int]) -> str:
    """Why a fit has not come to its end: its last words, or how its process ended."""
    said = last_words(fit.folder / LOG)
    code = None
    if job.paths.result_pickle.exists():
        with suppress(Exception):  # submitit raises what the job raised
            code = job.result()
    if code is not None and code < 0:
        said += f"\nkilled by {signal.Signals(-code).name}, as the system does where memory is short"
    elif not said:
        said = (job.stderr() or "its process left no message").strip()[-2000:]
    return f"{said.strip()} ({fit.folder / LOG})"


def make_executor(folder: Path, slurm: Mapping[str, Any] | None) -> submitit.Executor:
    """Local processes, or Slurm with submitit's own parameters. Raises UserError where there is no Slurm."""
    try:
        executor = submitit.AutoExecutor(folder, cluster="local" if slurm is None else "slurm")
        minutes = LONG if slurm is None else DAY
        executor.update_parameters(**{"timeout_min": minutes, "name": "bvpo", **(slurm or {})})
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        raise UserError(f"--slurm: {str(error).splitlines()[0]}") from error
    return executor
