"""One fit of a grid: an ordinary `python -m bvpo.fit` in a process of its own, alone in its folder.

It imports little: the process that waits for the fit costs no memory to speak of.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission

LOG = "log.txt"
ATTEMPT = "$ "  # starts the line of a log that says what was started


class CellJob:
    """What submitit runs: the fit, with what it prints in the folder's log. Picklable.

    A fit that outlived a killed grid still holds its folder's lock; the next one waits for it and then finds it done.

    Args:
        folder: Of the fit's runs.
        arguments: Of `bvpo.fit`.
        visible_gpus: CUDA_VISIBLE_DEVICES as the grid's own process has it; submitit's local processes would hide all.
    """

    def __init__(self, folder: Path, arguments: list[str], visible_gpus: str | None) -> None:
        self.folder, self.arguments, self.visible_gpus = folder, arguments, visible_gpus
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the fit to its end. Returns its exit code, negative the number of the signal that killed it."""
        signal.signal(signal.SIGTERM, self._stop)
        rank = JobEnvironment().global_rank  # a Slurm job may start the ranks of one fit
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / (LOG if rank == 0 else f"log_{rank}.txt")
        with (self.folder / f"lock_{rank}").open("ab") as lock, log.open("ab", buffering=0) as output:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._fit(lock, output)

    def _fit(self, lock: BinaryIO, output: BinaryIO) -> int:
        command = [sys.executable, "-m", "bvpo.fit", *self.arguments]
        output.write(f"{ATTEMPT}{time.strftime('%F %T')} {' '.join(command[1:])}\n".encode())
        self._process = process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=self._environment(),
            pass_fds=[lock.fileno()],  # the lock lives as long as the fit does, whatever becomes of this process
            start_new_session=True,  # no Ctrl-C from the terminal: it is told to stop once, from here
        )
        try:
            return process.wait()
        except BaseException:
            self._stop(signal.SIGTERM, None)
            process.wait()
            raise

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM: the fit ends its step and writes a checkpoint."""
        if self._process is None:
            raise SystemExit(128 + number)
        self._process.send_signal(number)

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if environment.get("SUBMITIT_EXECUTOR") == "local":
            environment.pop("CUDA_VISIBLE_DEVICES", None)
            if self.visible_gpus is not None:
                environment["CUDA_VISIBLE_DEVICES"] = self.visible_gpus
        return environment

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again where Slurm takes the machine away."""
        return DelayedSubmission(self)


def locked(path: Path) -> bool:
    """Whether a fit holds this lock."""
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def last_words(log: Path, lines: int = 8) -> str:
    """The end of the newest attempt's output, from its last `error` line on where it has one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65_536))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    said = text.splitlines()
    attempts = [number for number, line in enumerate(said) if line.startswith(ATTEMPT)]
    said = [line for line in said[attempts[-1] + 1 if attempts else 0 :] if line.strip()]
    errors = [number for number, line in enumerate(said) if line.startswith("error")]
    return "\n".join(said[errors[-1] :] if errors else said[-lines:])
