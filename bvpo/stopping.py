"""What ends a fit from outside: Ctrl-C and SIGTERM, a full disk, a dead process. A message, and no traceback."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import lightning as L

from bvpo import ranks
from bvpo.checkpoints import StepCheckpoint
from bvpo.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARENT = "BVPO_PARENT"  # in the environment: the process whose own those are that it starts meanwhile
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Stopped(BaseException):
    """The process was asked to stop. Like KeyboardInterrupt no Exception, so that nothing takes it for an error.

    Args:
        number: Of the signal.
        step: Optimizer steps that were taken, where a step was brought to its end.
        saved: Whether `last.ckpt` is of that step.
    """

    def __init__(self, number: int, step: int | None = None, saved: bool = True) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        place = "" if step is None else f" behind optimizer step {step}, {'with' if saved else 'without'} a checkpoint"
        rest = "--ckpt_path last goes on from the newest checkpoint" if saved else "--checkpoint.save_last is false"
        super().__init__(f"stopped by {name}{place}; {rest}")
        self.exit_code = 128 + number


def outside_cause(error: BaseException | None) -> str | None:
    """What to tell the user where the cause lies outside of this program: a full disk, a killed process.

    PyTorch raises the death of a process wherever the program happens to be, so it may lie behind another error.
    """
    while error is not None:
        text = str(error).strip()
        if isinstance(error, OSError) and error.errno in FULL:
            file = error.filename or "a file of the run"
            return f"{file} cannot be written: {error.strerror}. Make room, and go on with --ckpt_path last"
        if text.startswith(("DataLoader worker", "One of the subprocesses has abruptly died")) or _lost_batch(error):
            return (
                f"a process that prepares rows has died ({text.partition(chr(10))[0].rstrip('. ')}): often memory is "
                "short. Lower --data.workers, and go on with --ckpt_path last"
            )
        error = error.__cause__ or error.__context__
    return None


def _lost_batch(error: BaseException) -> bool:
    """Whether a batch could not be taken over from the process that had prepared it, because that is no more."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, OSError | EOFError) and "torch.multiprocessing.reductions" in modules


@contextmanager
def own_processes() -> Iterator[None]:
    """Processes that are started in the block, and call `die_with_parent`, end with this one."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)


def die_with_parent() -> None:
    """Let the system kill this process when the one that started it in `own_processes` is gone, however it went.

    They would wait for it in a collective operation, and hold their memory, for as long as the backend waits. On Linux.
    Raises UserError where the other one is gone already.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        raise UserError(f"process {parent}, which has started this one, is gone")


class StopSignals(L.Callback):
    """Handles SIGINT and SIGTERM inside a `with` block; as a callback, it lets a fit come to the end of its step.

    Outside of training steps, and when a second signal comes, the process stops at once. Processes that were forked
    from this one, such as those that prepare batches, ignore the signals: the terminal sends Ctrl-C to all of them.

    Attributes:
        ended: Whether the fit has come to its end, measurements apart.
    """

    def __init__(self) -> None:
        self.ended = False
        self._received: int | None = None
        self._deferred = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _install(self) -> None:
        for number in self._before or ():
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self._deferred and self._received is None:
            self._received = number
        else:
            raise Stopped(number)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._total_steps = pl_module.total_steps

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._deferred:
            self._install()  # in place of Lightning's handler, which stops between the microbatches of a step
            self._deferred = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = trainer.global_step >= self._total_steps
        if not batch.closes_step:
            return
        self._received = ranks.largest([self._received or 0])[0] or None  # a signal may have reached one process alone
        if not (done or self._received):
            return
        own = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, StepCheckpoint)]
        for callback in own:
            callback.end_step(trainer)
        saved = [callback.save(trainer) for callback in own]
        if self._received:
            raise Stopped(self._received, trainer.global_step, any(saved))
        self._deferred = False  # only measurements follow

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self._received is not None:  # validation may be long: the checkpoint before it has to do
            raise Stopped(self._received)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.should_stop:
            self._let_go()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._let_go()
        self.ended = True

    def _let_go(self) -> None:
        """Only measurements follow, and they may be long."""
        self._deferred = False
        if self._received is not None:
            raise Stopped(self._received)
