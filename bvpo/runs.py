"""Run folders: `ROOT/version_N` holds one run's resolved config, metrics.csv, TensorBoard events and checkpoints."""

from __future__ import annotations

import csv
import fcntl
import io
import itertools
import json
import logging
import os
import platform
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from bvpo.checkpoints import LAST, PREVIOUS, remove_partial_files, replacing, write_whole
from bvpo.errors import UserError
from bvpo.sharded_checkpoints import read_common

FINISHED, METRICS = "finished.json", "metrics.csv"


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: What it goes on from; None: from the policy as it is.
        version: Of the folder that it goes on in; None: of a new one.
        step: Optimizer steps that the checkpoint has taken.
        finished: Nothing is left to do.
        said: The line that tells the user.
    """

    checkpoint: Path | None = None
    version: int | None = None
    step: int = 0
    finished: bool = False
    said: str | None = None


def claim_version(root: Path) -> int:
    """Make the next `version_N` folder under `root` and return N. Two starts at once get two folders.

    Raises UserError where `root` is a file, or no folder can be made in it.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:  # only rank 0 writes logs, and checkpoint paths are broadcast from it
        return 0
    version = max(_versions(root), default=-1) + 1
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):
                (root / f"version_{version}").mkdir()
                return version
            version += 1
    except OSError as error:
        raise UserError(
            f"{root}: no folder for a run can be made there: {error.strerror}. Give another --trainer.default_root_dir"
        ) from error


def _versions(root: Path) -> list[int]:
    names = [path.name.removeprefix("version_") for path in root.glob("version_*") if path.is_dir()]
    return [int(name) for name in names if name.isdigit()]


def lock_run(folder: Path) -> TextIO:
    """Keep other processes out of a run's folder for as long as the file that is returned is open.

    The system lets go of it when this process ends, however it ends. Raises UserError where another one has it.
    """
    file = (folder / "lock").open("a+")
    os.register_at_fork(after_in_child=file.close)  # processes that prepare batches outlive a killed one, by seconds
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        other = file.read().strip() or "unknown"
        raise UserError(
            f"{folder}: another process is training in this folder (process {other}); wait for its end or stop it, or "
            "start a new run, without --ckpt_path"
        ) from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}")
    file.flush()
    return file


def find_start(root: Path, ckpt_path: str | None, limits: Mapping[str, Any]) -> Start:
    """Where `--ckpt_path` says to start.

    `last` goes on in the newest run's folder: from its last checkpoint, or from the start where a kill came before the
    first one. A run that was killed after its last step, in the measurements that follow, goes on from the checkpoint
    before, so that these are made.

    Args:
        limits: What ends the run, as `mark_finished` was given it.

    Raises:
        UserError: There is no such checkpoint, or it cannot be read.
    """
    if ckpt_path is None:
        return Start()
    if ckpt_path != "last":
        path = Path(ckpt_path)
        if not path.exists():
            raise UserError(f"--ckpt_path {ckpt_path}: there is no such checkpoint")
        return Start(path, step=read_common(path)["global_step"])
    version = max(_versions(root), default=None)
    if version is None:
        return Start(said=f"--ckpt_path last: there is no run under {root} yet; this one starts from the start")
    folder = root / f"version_{version}"
    mark, torn = _mark_of(folder), ""
    if mark is None:
        mark, torn = {}, f"; {FINISHED} in it cannot be read and counts as absent"
    for path in (folder / "checkpoints" / LAST, folder / "checkpoints" / PREVIOUS):
        if not path.exists():
            continue
        state = read_common(path)
        step = state["global_step"]
        ended = mark.get("step") == step
        if ended and (mark.get("limits") == limits or 0 <= limits["max_steps"] <= step):
            return Start(
                path, version, step, True, f"{folder}: finished, {step} optimizer steps; nothing is left to do"
            )
        if ended or step != state.get("total_steps") or limits["max_steps"] > step:
            said = f"{folder}: goes on behind optimizer step {step} ({path.name}){torn}"
            return Start(path, version, step, said=said)
    kept = f"; its log so far is kept in {aside.name}" if (aside := _aside(folder)) else ""
    said = f"{folder}: has no checkpoint from before its end yet; it starts from the start{kept}{torn}"
    return Start(version=version, said=said)


def mark_finished(folder: Path, step: int, limits: Mapping[str, Any]) -> None:
    """Note that a run has come to its end, measurements included, with its `max_steps`, `max_epochs`, `max_time`."""
    with replacing(folder / FINISHED) as file:
        write_whole(file, json.dumps({"step": step, "limits": limits}).encode())


def note_ranks(folder: Path, ranks: int) -> None:
    """Note how many processes train in a run's folder; `devices: auto` in its config.yaml does not say."""
    with replacing(folder / "ranks.json") as file:
        write_whole(file, json.dumps({"ranks": ranks}).encode())


def noted_ranks(folder: Path) -> int | None:
    """The processes that `note_ranks` was given; None where the folder does not tell."""
    try:
        return int(json.loads((folder / "ranks.json").read_text())["ranks"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or a torn one
        return None


def _mark_of(folder: Path) -> dict[str, Any] | None:
    """What `mark_finished` noted; empty where it did not, None where its file is torn."""
    try:
        mark = json.loads((folder / FINISHED).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) else None


def _aside(folder: Path) -> Path | None:
    """Where the log of a run that starts over is kept: the first free `metrics_N.csv`; None where it has no rows."""
    path = folder / METRICS
    if not path.exists() or not read_table(path)[1]:
        return None
    return next(p for n in itertools.count(1) if not (p := folder / f"metrics_{n}.csv").exists())


def changed_options(saved: Path, config: str) -> list[str]:
    """`key: old → new` of what differs between a saved config and this one, both YAML; `ckpt_path` aside.

    Of a saved config that is torn, a line that says so.
    """
    if not saved.exists():
        return []
    try:
        old, new = (flat_options(yaml.safe_load(text) or {}) for text in (saved.read_text(), config))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return [f"not known: {saved} cannot be read"]
    keys = [key for key in old | new if key != "ckpt_path" and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in keys]


def flat_options(options: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        name, nested = f"{prefix}{key}", isinstance(value, dict) and value
        flat |= flat_options(value, f"{name}.") if nested else {name: value}
    return flat


def run_loggers(root: Path, version: int, resumed_at: int | None) -> list[Logger]:
    """TensorBoard and CSV in the run's folder; a resumed run keeps what was logged before its checkpoint's step."""
    folder = root / f"version_{version}"
    if resumed_at is not None:
        remove_partial_files(folder)
    if resumed_at == 0 and (aside := _aside(folder)):
        os.replace(folder / METRICS, aside)
    events = EventLogger(root, name="", version=version, default_hp_metric=False, purge_step=resumed_at)
    return [events, MetricsLogger(folder / METRICS, resumed_at or 0)]


class ConfigSaver(SaveConfigCallback):
    """Writes the run's resolved config, whole or not at all: a later start reads it."""

    def __init__(self, parser: Any, config: Any, config_filename: str = "config.yaml") -> None:
        super().__init__(parser, config, config_filename, save_to_log_dir=False)

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        folder = Path(getattr(trainer.logger, "log_dir", None) or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / self.config_filename) as file:
            write_whole(file, self.parser.dump(self.config, skip_none=False).encode())


class EventLogger(TensorBoardLogger):
    """TensorBoard events, handed to the system step by step: a killed run loses none."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)  # type: ignore[arg-type]
        self.experiment.flush()


class MetricsLogger(Logger):
    """`metrics.csv`: a row a call, a column a log key, in alphabetical order.

    A row is appended in one write. A new key takes another header, so the file is written anew and renamed into its
    place. A kill leaves the rows that were logged; a torn last row is cut off when the run goes on.

    Args:
        path: Of the file.
        resumed_at: Rows of this step and later ones come again: what the file has of them is dropped.
    """

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        if path.exists():
            columns, rows = read_table(path)
            self._write(columns, [row for row in rows if int(row["step"]) < resumed_at])

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        return str(self.path.parent.parent)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row. Raises UserError where the disk does not take it; the rows before it remain."""
        assert step is not None
        row = {key: float(value) for key, value in metrics.items()} | {"step": step}
        try:
            if new := row.keys() - set(self._columns):
                rows = read_table(self.path)[1] if self._columns else []
                self._write(sorted([*self._columns, *new]), [*rows, row])
            else:
                self._append(_csv(self._columns, [row]))
        except OSError as error:
            raise UserError(
                f"{self.path}: step {step} cannot be logged: {error.strerror}. What is in the file is kept: make room "
                "and go on with --ckpt_path last"
            ) from error

    def _append(self, line: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                write_whole(file, line)
            except BaseException:
                file.truncate(end)
                raise

    def _write(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            write_whole(file, _csv(columns, rows, header=True))
        self._columns = columns

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Wait until the disk has the rows too, not only the checkpoint that stands for them."""
        with suppress(OSError), self.path.open("ab") as file:
            os.fsync(file.fileno())


def _csv(columns: list[str], rows: list[dict[str, Any]], header: bool = False) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def whole_lines(path: Path) -> str:
    """A table's text; what stands behind the last line break was torn by a kill."""
    return path.read_bytes().rpartition(b"\n")[0].decode()


def read_table(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and whole rows, as text."""
    reader = csv.DictReader(io.StringIO(whole_lines(path), newline=""))
    rows = list(reader)
    return list(reader.fieldnames or []), rows


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
        r"The dirpath has changed from",  # a checkpoint of another run, or of a folder that was moved
        r"Checkpoint directory .* exists and is not empty",  # the run goes on in it
        r"Total length of `list` across ranks is zero",  # no validation rows
        r"The '.*_dataloader' does not have many workers",  # rows are tokenized beforehand
        r"You defined a `validation_step` but have no",
    ):
        warnings.filterwarnings("ignore", message)
