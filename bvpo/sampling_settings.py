"""What sampled responses depend on, written down beside them, so that one folder never mixes two samplings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from bvpo.errors import UserError
from bvpo.policy import WEIGHTS, resolve_model
from bvpo.prompts import Prompt

SETTINGS = "settings.json"
PIECES, PIECE = 256, 1 << 14  # of a large file of weights, these many of so many bytes enter its hash


class PromptDigest:
    """What is noted of a list of prompts, which is given one by one: hashes of the texts and of the ids they become."""

    def __init__(self) -> None:
        self.count, self._texts, self._ids = 0, hashlib.sha256(b"["), hashlib.sha256()

    def add(self, prompt: Prompt, ids: Sequence[Sequence[int]]) -> None:
        """The next prompt, with its ids in each mode."""
        text = json.dumps([prompt.id, prompt.conversation])
        self._texts.update(f"{', ' if self.count else ''}{text}".encode())
        self._ids.update(json.dumps(ids).encode())
        self.count += 1

    def settings(self) -> dict[str, Any]:
        """Of the prompts so far."""
        texts = self._texts.copy()
        texts.update(b"]")
        return {"prompts": texts.hexdigest(), "prompt_count": self.count, "prompt_ids": self._ids.hexdigest()}


def agree(folder: Path, settings: Mapping[str, Any], begun: Mapping[str, Any]) -> dict[str, Any]:
    """What is written down. Raises UserError where the folder's responses were made with other settings.

    Args:
        begun: Those of the first prompts of the list, as many as the folder has been sampled for: more may follow.
    """
    found = read_settings(folder)
    own = {**settings, **begun, "prompt_count": settings.get("prompt_count")}  # words name the length of whole lists
    if differing := differences(found, own):
        raise UserError(
            f"{folder} holds responses that were sampled with other settings: {'; '.join(differing)}. "
            "Give these again, another output, or delete the folder"
        )
    return found


def settle(folder: Path, settings: Mapping[str, Any], begun: Mapping[str, Any]) -> set[str]:
    """Write down what is not written down yet.

    Returns:
        The names of what was added to a folder that had settings.

    Raises:
        UserError: As `agree`; or they cannot be written.
    """
    found = agree(folder, settings, begun)
    whole = {**settings, **found, **{name: settings[name] for name in begun}}
    if whole != found:
        write_settings(folder, whole)
    return whole.keys() - found.keys() if found else set()


def differences(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """In words, where settings differ from those found; one that was not written down is none, and nor is the date."""
    differing = {name: found[name] for name, value in settings.items() if name in found and found[name] != value}
    differing.pop("date", None)
    words = []
    before, count = differing.pop("prompt_count", settings.get("prompt_count")), settings.get("prompt_count")
    template, ids = differing.pop("template_sha", None), differing.pop("prompt_ids", None)
    if differing.pop("prompts", None):
        words.append(f"prompts was a list of {before}, is another one of {count} (file, limit, max_prompt_tokens)")
    elif template:
        words.append("the policy's chat template is another")
    elif ids:
        words.append(
            "the same prompts have other token ids: another tokenizer, or a chat template that writes the time"
        )
    if "weights" in differing:
        files = {name for name, _ in differing.pop("weights").items() ^ settings["weights"].items()}
        words.append(f"the policy's folder holds other files than it did: {', '.join(sorted(files))}")
    return words + [f"{name} was {value!r}, is {settings[name]!r}" for name, value in differing.items()]


def read_settings(folder: Path) -> dict[str, Any]:
    """What a folder's records were made with; {} where nothing is written down. Raises UserError for a damaged file."""
    path = folder / SETTINGS
    text = ""
    try:
        text = path.read_text()
        found = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):  # what cannot be a folder is refused where it is written to
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or not _sound(found):
        raise UserError(
            f"{path}: expected the settings of the records beside it, found {text[:40]!r}: the file is damaged; delete "
            "it if these records were made with the settings given now, and the folder if not"
        )
    return found


def _sound(found: Mapping[str, Any]) -> bool:
    """Whether date and weights are what they are when this package has written them, or absent."""
    date, weights = found.get("date"), found.get("weights", {})
    try:
        datetime.fromisoformat(date or "2000-01-01")
    except (TypeError, ValueError):
        return False
    return isinstance(weights, dict) and all(isinstance(value, str) for value in weights.values())


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Replace them at once, or not at all. Raises UserError where they cannot be written."""
    path = folder / SETTINGS
    own = path.with_suffix(f".{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with own.open("w") as file:
            file.write(json.dumps(settings, indent=1))
            file.flush()
            os.fsync(file.fileno())
        own.replace(path)
    except OSError as error:
        with suppress(OSError):
            own.unlink()
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def model_files(policy: str) -> dict[str, str]:
    """The configuration and weights in a policy's folder, each with a hash of its size and content; {} of a Hub id.

    Of a file above 4 MiB, 256 pieces of 16 KiB enter, evenly spaced, the first and the last among them. Times do not:
    shards run on machines with copies.
    """
    folder = Path(resolve_model(policy))
    if not folder.is_dir():
        return {}
    names = ("config.json", "adapter_config.json", *WEIGHTS)
    return {path.name: _content(path) for path in sorted({path for name in names for path in folder.glob(name)})}


def _content(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= PIECES * PIECE:
            digest.update(file.read())
        else:
            for number in range(PIECES):
                file.seek((size - PIECE) * number // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]
