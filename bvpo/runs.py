"""Run folders: `ROOT/version_N` holds one run's resolved config, metrics.csv, TensorBoard events and checkpoints."""

from __future__ import annotations

import csv
import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from bvpo.errors import UserError


def claim_version(root: Path) -> int:
    """Make the next `version_N` folder under `root` and return N. Two starts at once get two folders."""
    if getattr(rank_zero_only, "rank", 0) != 0:  # only rank 0 writes logs, and checkpoint paths are broadcast from it
        return 0
    root.mkdir(parents=True, exist_ok=True)
    version = max(_versions(root), default=-1) + 1
    while True:
        try:
            (root / f"version_{version}").mkdir()
            return version
        except FileExistsError:
            version += 1


def _versions(root: Path) -> list[int]:
    names = [path.name.removeprefix("version_") for path in root.glob("version_*") if path.is_dir()]
    return [int(name) for name in names if name.isdigit()]


def find_checkpoint(root: Path, ckpt_path: str) -> tuple[Path, int | None]:
    """The checkpoint to go on from, and the version whose folder the run goes on in (None: a new one).

    `last` is the newest run's last checkpoint, and the run goes on in that folder.

    Raises:
        UserError: There is no such checkpoint.
    """
    if ckpt_path != "last":
        path = Path(ckpt_path)
        if not path.exists():
            raise UserError(f"--ckpt_path {ckpt_path}: there is no such checkpoint")
        return path, None
    for version in sorted(_versions(root), reverse=True):
        path = root / f"version_{version}" / "checkpoints" / "last.ckpt"
        if path.exists():
            return path, version
    raise UserError(f"--ckpt_path last: no run under {root} has a checkpoint yet; leave the option out to start one")


def checkpoint_step(path: Path) -> int:
    """Optimizer steps taken before the checkpoint was written. Raises UserError where it cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(state["global_step"])
    except Exception as error:  # whatever zip, pickle or the file system raises
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}); is it complete? Give another one"
        ) from error


def run_loggers(root: Path, version: int, resumed_at: int | None) -> list[Logger]:
    """TensorBoard and CSV in the run's folder; a resumed run keeps what was logged before its checkpoint's step."""
    tensorboard = TensorBoardLogger(root, name="", version=version, default_hp_metric=False, purge_step=resumed_at)
    kept = [] if resumed_at is None else _rows_before(root / f"version_{version}" / "metrics.csv", resumed_at)
    table = CSVLogger(root, name="", version=version, flush_logs_every_n_steps=1)
    if kept:
        table.experiment.metrics.extend(kept)  # reopening the folder has deleted the file
        table.save()
    return [tensorboard, table]


def _rows_before(path: Path, step: int) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"])} for row in rows if row["step"] < step]


def quiet_lightning() -> None:
    """Hide what says nothing about the run: hardware tips, and warnings that are other packages' to mend."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # lengths are ours to check
    for message in (
        r"[\s\S]*was deprecated in v4\.49",  # jsonargparse, called by LightningCLI
        r"[\s\S]*JsonargparseDeprecationWarning",
        r".*treespec, LeafSpec",  # torch, called by Lightning
        r"LightningCLI's args parameter",  # `main` is given its arguments by tests and notebooks
        r"Experiment logs directory .* exists",  # claimed by this process; a resumed run's rows are kept
        r"Total length of `list` across ranks is zero",  # no validation rows
        r"The '.*_dataloader' does not have many workers",  # rows are tokenized beforehand
        r"You defined a `validation_step` but have no",
    ):
        warnings.filterwarnings("ignore", message)
