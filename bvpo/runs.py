"""Run folders: `ROOT/version_N` holds one run's resolved config, metrics.csv, TensorBoard events and checkpoints."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from bvpo.checkpoints import LAST, PREVIOUS, remove_partial_files, replacing, write_whole
from bvpo.errors import UserError
from bvpo.run_log import METRICS, EventLogger, MetricsLogger, read_table
from bvpo.sharded_checkpoints import read_common

FINISHED = "finished.json"


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
    """Of the run folders. Raises UserError where `root` may not be read."""
    try:
        names = [path.name.removeprefix("version_") for path in root.glob("version_*") if path.is_dir()]
    except OSError as error:
        raise UserError(f"{root}: runs cannot be looked for there: {error.strerror}") from error
    return [int(name) for name in names if name.isdigit()]


def lock_run(folder: Path) -> TextIO:
    """Keep other processes out of a run's folder for as long as the file that is returned is open.

    The system lets go of it when this process ends, however it ends. Raises UserError where another one has it, or
    nothing can be written in the folder.
    """
    with _writing(folder):
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
    with _writing(folder):
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
    return file


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises UserError where a run's folder takes no file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written in: {error.strerror or error}. A run writes its lock, log and checkpoints "
            "there: mend that and start again, or start a new run with another --trainer.default_root_dir"
        ) from error


def find_start(root: Path, ckpt_path: str | None, limits: Mapping[str, Any]) -> Start:
    """Where `--ckpt_path` says to start.

    `last` goes on in the newest run's folder: from its last checkpoint, or from the start where a kill came before the
    first one. A run that was killed after its last step, in the measurements that follow, goes on from the checkpoint
    before, so that these are made.

    Args:
        limits: What ends the run, as `mark_finished` was given it.

    Raises:
        UserError: There is no such checkpoint, it cannot be read, or it has taken more steps than are asked for.
    """
    if ckpt_path is None:
        return Start()
    limit = limits["max_steps"]
    if ckpt_path != "last":
        path = Path(ckpt_path)
        if not os.path.exists(path):  # `Path.exists` raises for names too long and folders that may not be read
            raise UserError(f"--ckpt_path {ckpt_path}: there is no such checkpoint, or it may not be read")
        step = read_common(path)["global_step"]
        if 0 <= limit <= step:
            raise UserError(f"--ckpt_path {ckpt_path}: has taken {step} optimizer steps: raise max_steps, now {limit}")
        return Start(path, step=step)
    version = max(_versions(root), default=None)
    if version is None:
        return Start(said=f"--ckpt_path last: there is no run under {root} yet; this one starts from the start")
    folder = root / f"version_{version}"
    mark, torn, before_end = _mark_of(folder), "", False
    if mark is None:
        mark, torn = {}, f"; {FINISHED} in it cannot be read and counts as absent"
    for path in (folder / "checkpoints" / LAST, folder / "checkpoints" / PREVIOUS):
        if not path.exists():
            continue
        state = read_common(path)
        step = state["global_step"]
        ended = mark.get("step") == step
        if ended and (mark.get("limits") == limits or 0 <= limit <= step):
            said = f"{folder}: finished, {step} optimizer steps; nothing is left to do"
            return Start(path, version, step, True, said)
        if 0 <= limit < step:
            said = f"{folder}: has taken {step} optimizer steps, and max_steps is {limit}: nothing is done"
            return Start(path, version, step, True, said)
        at_end = state.get("stopped") or step == limit or (step == state.get("total_steps") and limit < step)
        if ended or before_end or not at_end:
            said = f"{folder}: goes on behind optimizer step {step} ({path.name}){torn}"
            return Start(path, version, step, said=said)
        before_end = True
    kept = f"; its log so far is kept in {aside.name}" if (aside := _aside(folder)) else ""
    said = f"{folder}: has no checkpoint from before its end yet; it starts from the start{kept}{torn}"
    return Start(version=version, said=said)


def mark_finished(folder: Path, step: int, limits: Mapping[str, Any]) -> None:
    """Note that a run has come to its end, measurements included, with its `max_steps`, `max_epochs`, `max_time`."""
    with replacing(folder / FINISHED) as file:
        write_whole(file, json.dumps({"step": step, "limits": limits}).encode())


def note_ranks(folder: Path, ranks: int) -> None:
    """Note how many processes train in a run's folder; `devices: auto` in its config.yaml does not say."""
    with _writing(folder), replacing(folder / "ranks.json") as file:
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
    with _writing(folder):
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


def read_config(path: Path) -> dict[str, Any]:
    """A run's resolved options, as `ConfigSaver` wrote them. Raises UserError where the file is damaged."""
    try:
        options = yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError):
        options = None
    if not isinstance(options, dict) or not options:
        raise UserError(f"{path}: expected the run's options: the file is damaged; put a copy of it there")
    return options


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
