"""What scores an answer: reward models, exact checkers, and a cache of their scores.

Preferences are about answers (arXiv 2510.05095), so a reward is given the conversation and the answer and never the
trace. A score is comparable with scores of the same reward only; None means that there is none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bvpo.errors import UserError
from bvpo.math_check import check_all
from bvpo.maths import RULES, right_answer, to_compare
from bvpo.reward_models import load_config, load_network, load_tokenizer, on_device, render_answered
from bvpo.tasks import Question, is_correct
from bvpo.traces import Conversation, check_conversation, check_text

Score = float | None
CACHED = re.compile(rb'\{"key": "(\w+)", "score": ([^}]+)\}')


@dataclass(frozen=True)
class Item:
    """What is scored.

    Args:
        conversation: Up to the user's turn.
        answer: What the model replied, without its trace.
        reference: The prompt row's own gold answer, which exact checkers compare with.
    """

    conversation: Conversation
    answer: str
    reference: str | None = None


class Reward(ABC):
    """What `--reward` takes: scores answers, higher is better. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What rows carry as `reward_model`."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Everything beside the item that a score depends on, as text; found without loading a model.

        Ask for it before anything expensive: it raises UserError where the reward cannot be had, as far as that is
        seen without its weights.
        """

    @abstractmethod
    def scores(self, items: Sequence[Item], progress: str | None = None) -> list[Score]:
        """One score an item, in their order; None where an item cannot be scored.

        Args:
            progress: The progress bar's label; None shows no bar.

        Raises:
            UserError: The reward cannot be had, or a conversation is none.
        """


def reward(choice: str | Reward) -> Reward:
    """A reward given by name: `builtin:tasks`, `math`, or the Hub id or folder of a reward model."""
    if isinstance(choice, Reward):
        return choice
    if choice in NAMED:
        return NAMED[choice]()
    if choice.startswith("builtin:"):
        raise UserError(f"there is no built-in reward {choice!r}; give {', '.join(NAMED)}, or a reward model")
    return SequenceRewardModel(choice)


# ---------------------------------------------------------------------- reward models


@dataclass(frozen=True)
class SequenceRewardModel(Reward):
    """A sequence classifier of one label, or ArmoRM; its logit for the whole conversation is the score.

    The conversation goes through the reward model's own chat template, which also writes BOS. A score does not depend
    on the batch beyond rounding. What the head of the model computes is in fp32: around 10, bfloat16 has steps of 1/16,
    and equal scores make no pair. An answer has no score, and is counted in a warning, where the conversation is too
    long or the template does not render the answer whole.

    Args:
        model: Hub id or folder.
        batch_size: Conversations scored at once; batches hold conversations of similar length.
        max_length: Longer conversations, in tokens, have no score. The model's own limit applies too.
        dtype: Of the model's body.
        device: As torch names it; null takes the GPU where there is one.
        trust_remote_code: Run the code that comes with the model.
    """

    model: str
    batch_size: int = 16
    max_length: int = 4096
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for field in ("batch_size", "max_length"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} must be ≥ 1, got {getattr(self, field)}")

    @property
    def name(self) -> str:
        return self.model

    @property
    def fingerprint(self) -> str:
        """Settings and, of a folder, the files' sizes and times. A Hub id stands for itself.

        Raises UserError where the folder is none, or its tokenizer or configuration is not a reward model's.
        """
        _ = self._config, self._tokenizer
        files = sorted(path for path in Path(self.model).glob("*") if path.is_file())
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return json.dumps([self.max_length, self.dtype, self.trust_remote_code, stamps])

    def scores(self, items: Sequence[Item], progress: str | None = None) -> list[Score]:
        sequences = self._encode(items)
        unique = sorted({ids for ids in sequences if ids is not None}, key=len)  # rounding may not part equal answers
        values: dict[tuple[int, ...], float] = {}
        with tqdm(total=len(unique), desc=progress, disable=progress is None, unit="answer", leave=False) as bar:
            for start in range(0, len(unique), self.batch_size):
                batch = unique[start : start + self.batch_size]
                logits = self._network(batch)
                if not logits.isfinite().all():
                    raise UserError(f"{self.model}: a score is not finite in {self.dtype}; take another dtype")
                values.update(zip(batch, logits.tolist(), strict=True))
                bar.update(len(batch))
        return [None if ids is None else values[ids] for ids in sequences]

    def _encode(self, items: Sequence[Item]) -> list[tuple[int, ...] | None]:
        """Token ids of the items; None of those that cannot be scored. The template writes all special tokens."""
        sequences: list[tuple[int, ...] | None] = []
        unscored = Counter[str]()
        for number, item in enumerate(items, 1):
            check_conversation(item.conversation)
            check_text(item.answer, f"answer {number}")
            text = render_answered(self._tokenizer, item.conversation, item.answer)
            ids = tuple(self._tokenizer(text, add_special_tokens=False).input_ids)
            cut, overlong = item.answer.strip() not in text, len(ids) > self._limit
            sequences.append(None if cut or overlong else ids)
            if cut or overlong:
                unscored["cut by the chat template" if cut else f"longer than {self._limit} tokens"] += 1
        if unscored:
            reasons = ", ".join(f"{count} {reason}" for reason, count in unscored.items())
            warnings.warn(f"{self.model}: of {len(items)} answers have no score: {reasons}", stacklevel=3)
        return sequences

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model, self.trust_remote_code)

    @cached_property
    def _config(self) -> Any:
        return load_config(self.model, self.trust_remote_code)

    @cached_property
    def _limit(self) -> int:
        own = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return min(self.max_length, own or self.max_length)

    @cached_property
    def _network(self) -> nn.Module:
        network = load_network(self.model, self._config, getattr(torch, self.dtype), self.trust_remote_code)
        return on_device(network, self.device)


# ---------------------------------------------------------------------- exact checkers


@dataclass(frozen=True)
class TaskAnswer(Reward):
    """1.0 where the answer states the reference as its result, as the built-in tasks want it, else 0.0.

    The right result comes from the row: nothing is guessed from the wording of the instruction.
    """

    @property
    def name(self) -> str:
        return "builtin:tasks"

    @property
    def fingerprint(self) -> str:
        return "1"

    def scores(self, items: Sequence[Item], progress: str | None = None) -> list[Score]:
        return [
            None if item.reference is None else float(is_correct(Question("", "", item.reference), item.answer))
            for item in items
        ]


@dataclass(frozen=True)
class MathAnswer(Reward):
    """1.0 where the answer is mathematically equal to the reference, as `bvpo.evaluate` scores it too, else 0.0.

    There is no score where the reference is absent, or cannot be parsed and is not the same text. An answer that cannot
    be checked in time counts as wrong, and is counted in a warning.

    Args:
        timeout_seconds: For one answer.
        workers: Processes that check answers at the same time.
    """

    timeout_seconds: float = 10.0
    workers: int = 4

    def __post_init__(self) -> None:
        if self.timeout_seconds <= 0 or self.workers < 1:
            raise UserError(f"expected timeout_seconds > 0 and workers ≥ 1, got {self.timeout_seconds}, {self.workers}")

    @property
    def name(self) -> str:
        return "math"

    @property
    def fingerprint(self) -> str:
        return json.dumps([_math_verify_version(), self.timeout_seconds, RULES])

    def scores(self, items: Sequence[Item], progress: str | None = None) -> list[Score]:
        _math_verify_version()
        scores: list[Score] = [None] * len(items)
        asked: dict[int, tuple[str, str]] = {}
        for place, item in enumerate(items):
            if item.reference is None or not (gold := right_answer(item.reference)):
                continue
            pair = to_compare(gold, item.answer)
            scores[place] = 1.0 if pair is None else None
            asked |= {} if pair is None else {place: pair}
        places, expired = list(asked), 0
        done = check_all(list(asked.values()), self.timeout_seconds, self.workers)
        for index, correct, late in tqdm(
            done, progress, len(asked), disable=progress is None, unit="answer", leave=False
        ):
            scores[places[index]] = None if correct is None else float(correct)
            expired += late
        if expired:
            warnings.warn(
                f"math: {expired} of {len(items)} answers could not be checked within {self.timeout_seconds:g} s and "
                "count as wrong",
                stacklevel=2,
            )
        return scores


def _math_verify_version() -> str:
    try:
        return importlib.metadata.version("math-verify")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("answers are checked by math-verify, which is absent: pip install bvpo[math]") from error


NAMED: dict[str, Callable[[], Reward]] = {"builtin:tasks": TaskAnswer, "math": MathAnswer}


# ---------------------------------------------------------------------- a cache


def _is_score(text: bytes) -> bool:
    """Whether a cached value is a finite number or null."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return value is None or (type(value) in (int, float) and math.isfinite(value))


@dataclass(frozen=True)
class CachedReward(Reward):
    """Another reward's scores, kept in a file, so that scoring goes on where it was killed.

    The file is JSON Lines, one {key, score} an item, only ever appended to: a line that a kill has torn is left out,
    and no lock is needed, also not on a network's file system, where sqlite's are not to be trusted. A key is a hash of
    the reward's name and fingerprint and of the whole item.

    Args:
        reward: Scores what is in none of the folder's files.
        folder: All of its `scores*.jsonl` are read; it need not exist.
        part: Distinguishes the file that this process writes, where several machines share the folder.
        chunk: Items scored between two writes, which are lost by a kill.
    """

    reward: Reward
    folder: Path
    part: str = ""
    chunk: int = 1024

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UserError(f"chunk must be ≥ 1, got {self.chunk}")

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def fingerprint(self) -> str:
        return self.reward.fingerprint

    def scores(self, items: Sequence[Item], progress: str | None = None) -> list[Score]:
        fingerprint = self.fingerprint
        keys = [self._key(fingerprint, item) for item in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        with tqdm(total=len(new), desc=progress, disable=progress is None, unit="answer", leave=False) as bar:
            for start in range(0, len(new), self.chunk):
                part = list(new)[start : start + self.chunk]
                scores = self._checked(self.reward.scores([new[key] for key in part]), len(part))
                self._append(dict(zip(part, scores, strict=True)))
                bar.update(len(part))
        return [self._known[key] for key in keys]

    def _checked(self, scores: Any, expected: int) -> list[Score]:
        """What a reward gave, as floats, whatever numbers they were. Raises UserError where they are no scores."""
        found = list(scores) if isinstance(scores, Iterable) else []
        if len(found) != expected:
            raise UserError(
                f"reward {self.name}: gave {len(found)} scores to {expected} answers; `scores` must return one each, "
                "None for an answer that has none"
            )
        return [None if score is None else self._number(score) for score in found]

    def _number(self, score: Any) -> float:
        try:
            number = math.nan if isinstance(score, str) else float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"reward {self.name}: gave an answer the score {score!r:.80}, which is no finite number; return None "
                "where there is no score"
            )
        return number

    def _key(self, fingerprint: str, item: Item) -> str:
        content = json.dumps([self.name, fingerprint, asdict(item)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _known(self) -> dict[str, Score]:
        known: dict[str, Score] = {}
        for path in sorted(self.folder.glob("scores*.jsonl")):
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                if (entry := CACHED.fullmatch(line)) and _is_score(entry[2]):
                    known[entry[1].decode()] = json.loads(entry[2])
                elif entry or not line.startswith(b'{"key"'[: len(line)]):
                    raise UserError(f"{path}, line {number}: expected a score, found {line[:40]!r}; move it away")
        return known

    def _append(self, scores: dict[str, Score]) -> None:
        """Starts on a line of its own, whatever a kill has left."""
        lines = [json.dumps({"key": key, "score": score}) for key, score in scores.items()]
        path = self.folder / f"scores{f'.{self.part}' if self.part else ''}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write("\n".join(["", *lines, ""]).encode())
        except OSError as error:
            raise UserError(f"{path}: scores cannot be kept: {error.strerror}") from error
        self._known.update(scores)
