"""Checkpoints that survive kills, full disks and bad storage: one file each, whole or not there.

Sharded runs write folders: see `sharded_checkpoints`.

A checkpoint is written beside its place, synced to the disk and then renamed into it, so a kill at any moment leaves
the file that was there before. Storage may still break a file that was written well, so the checkpoint before the last
one is kept too, as `previous.ckpt`; that takes room for three while one is written. A sidecar with a checksum could not
be renamed together with its checkpoint; PyTorch's format holds a CRC-32 of each of its records, and these are verified
before a file is loaded. Loading never runs code that a file brings along.
"""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from bvpo import ranks
from bvpo.errors import UserError

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
PARTIAL = ".partial"  # ends the name of a file that is being written


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, and is removed where it does not end well.

    Its content is on the disk before it has the name, and the name is on the disk afterwards.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def write_whole(file: BinaryIO, data: Any) -> None:
    """Write all of some bytes: an unbuffered file takes what there is room for, and fails at the next write only."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[file.write(view) :]


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names."""
    with suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(path: Path, target: Path) -> None:
    """Rename a file or a folder over another one."""
    if path.is_dir() or target.is_dir():
        remove(target)
    os.replace(path, target)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed writers have left in a folder and below."""
    for path in list(folder.rglob(f"*{PARTIAL}")):
        remove(path)


class _Sink:
    """Hands PyTorch's writes on. PyTorch turns an error of the file into one of its own; here the cause is kept."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            write_whole(self._file, data)
            return len(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Nothing waits: the file is unbuffered."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes and reads one-file checkpoints; Lightning calls it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Raises UserError where the disk does not take the file; what stood there before remains."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                sink = _Sink(file)
                try:
                    torch.save(checkpoint, cast(Any, sink))
                except RuntimeError:
                    if sink.error is None:
                        raise
                    raise sink.error from None
                os.fsync(file.fileno())
                if path.name == LAST and path.exists():
                    move(path, path.with_name(PREVIOUS))  # until the next rename, `previous` is the newest
        except OSError as error:
            raise _cannot_write(path, checkpoint, error) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises UserError where the file is broken, or no checkpoint that a fit can go on from."""
        checkpoint = read_checkpoint(Path(path))
        if "optimizer_states" not in checkpoint or "loops" not in checkpoint:
            raise UserError(f"{path}: holds weights alone; a fit goes on from a checkpoint with the optimizer's state")
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink(missing_ok=True)


def _cannot_write(path: Path, checkpoint: dict[str, Any], error: OSError) -> UserError:
    try:
        free = f", {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free"
    except OSError:
        free = ""
    good = next((p for p in (path, path.with_name(PREVIOUS)) if p.exists()), None)
    kept = "no earlier checkpoint exists" if good is None else f"{good.name} is the last good one and is still there"
    return UserError(
        f"{path}: the checkpoint cannot be written: {error.strerror or error}. It needs about "
        f"{_tensor_bytes(checkpoint) / 1e6:,.1f} MB{free}; {kept}. Make room and go on with --ckpt_path last"
    )


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors of nested containers."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_tensor_bytes(v) for v in value.values())
    return sum(_tensor_bytes(v) for v in value) if isinstance(value, list | tuple) else 0


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint, on the CPU, after its checksums were found right.

    Args:
        mmap: Read tensors from the file when they are used, instead of into memory.

    Raises:
        UserError: The file is truncated, altered, or no checkpoint of a fit.
    """
    if path.is_dir():
        raise UserError(f"{path}: is the folder of a sharded run's checkpoint; go on with the strategy that wrote it")
    try:
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()
        if broken is not None:
            raise ValueError(f"record {broken} is not what was written")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever zip, pickle or the file system raises
        cause = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({cause}); is it complete? {_another(path)}"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "global_step"} <= checkpoint.keys():
        raise UserError(f"{path}: cannot be read as a checkpoint of a fit (no state_dict or global_step in it)")
    return checkpoint


def _another(path: Path) -> str:
    other = path.with_name(PREVIOUS)
    return f"Give another one: --ckpt_path {other}" if path.name == LAST and other.exists() else "Give another one"


class StepCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with a schedule of its own: at the boundaries of optimizer steps, and nowhere else.

    In the middle of a step the loader has served rows that no weights know of. So a stop, whoever asks for one by
    `should_stop`, waits for the step's last microbatch, as signals do.

    `last.ckpt` is written every `every_n_train_steps`, `every_n_epochs` or `train_time_interval` (Lightning, in manual
    optimization, goes by the first alone), and at the end; before its step's validation, which a resumed run makes.
    The best ones by a monitor are written behind the validation that has scored them.
    """

    goes_on_from: Path | None = None  # becomes last.ckpt: a later one has to be made again
    _total_steps = 0
    _step_of_last = _step_of_top = 0  # whose checkpoints were written last; none is needed before the first step
    _in_step = False
    _stop_asked = False
    _stopped = False  # the run ends behind this step because that was asked for: only measurements follow
    _validation_due = False  # at this step's end; until the next step begins, also when it is done

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises UserError where the processes would go on from different checkpoints."""
        super().setup(trainer, pl_module, stage)
        if len(found := set(ranks.gather_objects(str(self.goes_on_from)))) > 1:
            raise UserError(
                f"the processes found different checkpoints to go on from ({', '.join(sorted(found))}): they need one "
                "default_root_dir, on a file system that all machines share"
            )
        if self.goes_on_from is not None and trainer.is_global_zero and self.goes_on_from.name != LAST:
            move(self.goes_on_from, self.goes_on_from.with_name(LAST))
        ranks.barrier()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Raises UserError where epochs end, or scores come, in the middle of a step."""
        super().on_train_start(trainer, pl_module)
        self._total_steps, self._stop_asked, self._stopped = pl_module.total_steps, False, False
        self._check_cut(trainer, pl_module.accumulate)
        if self._validation_due:
            pl_module.on_train_start()  # Lightning calls it behind the callbacks, and the validation needs the windows
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.restarting = False
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def _check_cut(self, trainer: Any, accumulate: int) -> None:
        batches, every = trainer.num_training_batches, trainer.val_check_batch
        if trainer.fast_dev_run:
            return
        if batches < len(trainer.train_dataloader) and batches % accumulate:
            raise UserError(
                f"--trainer.limit_train_batches ends an epoch behind microbatch {batches}, in the middle of an "
                f"optimizer step of {accumulate} (model.accumulate): give a multiple of it"
            )
        if self.monitor is not None and every != batches and (accumulate > 1 if every is None else every % accumulate):
            raise UserError(
                f"--checkpoint.monitor {self.monitor}: --trainer.val_check_interval validates in the middle of an "
                f"optimizer step of {accumulate} microbatches (model.accumulate), where no checkpoint can be written: "
                "give a multiple of it"
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._in_step, self._validation_due = True, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._hold_stop(trainer)
        if not batch.closes_step:
            return
        self.end_step(trainer)
        if self._due(trainer) and not self._off(trainer):
            if self.monitor is None and self._step_of_top != trainer.global_step:
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
                self._step_of_top = trainer.global_step
            self.save(trainer)
        ends = trainer.global_step >= self._total_steps  # only measurements follow
        if ends or self._stopped:
            self.save(trainer)
        trainer.should_stop = self._stop_asked

    def end_step(self, trainer: L.Trainer) -> None:
        """Note that a step has ended: `save` may be called from here on, also before this callback's own turn."""
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        self._hold_stop(trainer)  # it would make a validation due that a run without the stop does not have
        self._in_step, self._validation_due = False, loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        self._stopped = self._stop_asked and loop._can_stop_early

    def _hold_stop(self, trainer: L.Trainer) -> None:
        self._stop_asked |= trainer.should_stop
        trainer.should_stop = False

    def _due(self, trainer: L.Trainer) -> bool:
        """Whether the schedule asks for a checkpoint behind this step."""
        if self._train_time_interval is not None:
            assert self._last_time_checked is not None
            elapsed = time.monotonic() - self._last_time_checked
            due = ranks.of_first(elapsed >= self._train_time_interval.total_seconds())
            self._last_time_checked += elapsed if due else 0.0
            return due
        if self._every_n_epochs:
            return trainer.is_last_batch and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        return self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0

    def _off(self, trainer: Any) -> bool:
        return bool(trainer.fast_dev_run) or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The epoch's last step has had its checkpoint."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._off(trainer):
            return
        if self._in_step:
            self._hold_stop(trainer)
        elif self.monitor is not None:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not self._in_step:
            super().on_exception(trainer, pl_module, exception)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"total_steps": self._total_steps, "stopped": self._stopped}
        checkpoint["validation_due"] = self._validation_due

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._validation_due = checkpoint.get("validation_due", False)
        if self.goes_on_from is not None:
            self._step_of_last = checkpoint["global_step"]

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """What checkpoints are scored and named by; the step is the one whose weights they hold."""
        counts = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
        return super()._monitor_candidates(trainer) | counts

    def save(self, trainer: L.Trainer) -> bool:
        """Write `last.ckpt`, unless it is of this step already. Returns whether it is there."""
        if self.save_last and not self._off(trainer) and self._step_of_last != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._step_of_last = trainer.global_step
        return bool(self.save_last) and self._step_of_last > 0
