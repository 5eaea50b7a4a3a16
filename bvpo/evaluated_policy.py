"""The model of an evaluation: a run's last checkpoint becomes a Hugging Face folder, which every back end loads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from bvpo.benchmark import write_json
from bvpo.checkpoints import LAST
from bvpo.errors import UserError
from bvpo.export import export, read_trained


@dataclass(frozen=True)
class Checkpoint:
    """Which one the folder was made of.

    Attributes:
        step: Optimizer steps taken.
        content: SHA-256 of what tells it apart from others.
    """

    path: str
    step: int
    content: str


@dataclass(frozen=True)
class Policy:
    """The model.

    Attributes:
        path: What back ends load: a folder, a Hub id, or a built-in name.
        name: Short, and part of file names.
        checkpoint: Of a run; None where the model was given as one.
    """

    path: str
    name: str
    checkpoint: dict[str, Any] | None = None


def find_policy(choice: str, output: str, name: str | None = None) -> Policy:
    """The model behind `--policy`. A run's policy is exported into the output folder, once.

    Raises:
        UserError: The run has no checkpoint that can be exported, or the output folder's is another one.
    """
    path = Path(choice)
    parts = {part.name for part in path.iterdir()} if path.is_dir() else set[str]()
    is_run = "config.json" not in parts and not parts.isdisjoint({"checkpoints", "config.yaml"})
    if not is_run and path.suffix != ".ckpt":
        last = path.resolve().name if path.is_dir() else choice.rpartition("/")[2].rpartition(":")[2]
        return Policy(choice, name or last)
    file = path / "checkpoints" / LAST if is_run else path
    folder, noted, content = Path(output) / "policy", Path(output) / "policy.json", _content(file)
    if not noted.exists():
        write_json(noted, asdict(Checkpoint(str(file), read_trained(path).step, content)))
    checkpoint = _noted(noted, folder)
    if checkpoint.content != content:
        raise UserError(
            f"{output}: holds answers of {checkpoint.path} at step {checkpoint.step}, and {file} is another checkpoint "
            "by now: give another output, or delete the folder"
        )
    if not folder.exists():
        export(path, folder)
    run = file.parent.parent.name if file.parent.name == "checkpoints" else file.stem
    return Policy(str(folder), name or f"{run or file.stem}-step_{checkpoint.step}", asdict(checkpoint))


def _noted(path: Path, folder: Path) -> Checkpoint:
    """Which checkpoint the folder was made of. Raises UserError where the file does not say."""
    try:
        found = json.loads(path.read_text())
        checkpoint = Checkpoint(found["path"], int(found["step"]), found["content"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: expected which checkpoint {folder} was made of: the file is damaged; delete both, they are made "
            "again, and responses of another checkpoint are noticed"
        ) from error
    return checkpoint


def _content(file: Path) -> str:
    """What tells checkpoints apart without reading them: a zip file's list of its records, with a CRC-32 of each; of a
    sharded run's folder, its files with their sizes and times."""
    if file.is_dir():
        parts = sorted((part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in file.iterdir())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    try:
        with ZipFile(file) as records:
            listed = [(record.filename, record.CRC, record.file_size) for record in records.infolist()]
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such checkpoint; give a run folder or a checkpoint file") from error
    except (OSError, BadZipFile) as error:
        raise UserError(f"{file}: cannot be read as a checkpoint: {error}; is it complete?") from error
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
