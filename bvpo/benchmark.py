"""What `--tasks` takes: questions, and what becomes of the answers to them.

A benchmark is either scored here, against answers known to be right, or written down in the form that its own judge
reads. Either way an answer is what follows a finished trace: a response that was cut at `max_new_tokens`, or that ended
inside its trace, has none, whatever formula its last line may hold.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download

from bvpo.checkpoints import replacing
from bvpo.errors import UserError
from bvpo.reading import describe, first_line, read_records
from bvpo.traces import Conversation, Mode, ThinkFormat, answer_of, check_text

HUB_FILES = "hf://datasets/"  # OWNER/NAME/PATH behind it is one file of a data set


@dataclass(frozen=True)
class Item:
    """A question.

    Args:
        id: Names it in all files; the seeds of its responses are made from it.
        conversation: Ends in the user's turn.
        row: What scoring and exporting need of its source; a scored benchmark's right answer is its `gold`.
    """

    id: str
    conversation: Conversation
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A response to an item, and the answer in it.

    Attributes:
        number: Of the response, from 0.
        text: The answer without its trace; None where the response was cut or its trace was not finished.
        finish_reason: `length` where it was cut.
        n_tokens: Of the whole response, as sampled, the stop token included.
        answer_tokens: Of `text`, by the policy's tokenizer.
    """

    item: Item
    mode: Mode
    number: int
    text: str | None
    finish_reason: Literal["stop", "length"]
    n_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right.

    Attributes:
        compared: The part of the answer that was compared, where it is not the whole.
        problem: Why the answer counts as wrong although it may be right.
    """

    correct: bool
    compared: str | None = None
    problem: Literal["time was up", "right answer not understood"] | None = None


class Benchmark(ABC):
    """Questions. Subclasses are frozen dataclasses of one of the two kinds below.

    Attributes:
        name: Of its folder and its row in the table.
        samples: Responses to a question in each mode; None takes the evaluation's.
    """

    name: str
    samples: int | None

    @abstractmethod
    def items(self) -> list[Item]:
        """All questions, in an order that does not change.

        Raises:
            UserError: The source cannot be read, a row is no question, or a package that scoring needs is missing.
        """


class Scored(Benchmark):
    """Its answers are compared with answers known to be right."""

    @abstractmethod
    def verdicts(self, answers: Sequence[Answer], work: Path, progress: bool) -> list[Verdict]:
        """One verdict an answer; every answer has a text. What takes long is kept in the folder `work`."""


class Judged(Benchmark):
    """Its answers are compared with other models' by a judge of the user's: one answer to each question."""

    samples = 1

    @abstractmethod
    def export(self, answers: Sequence[Answer], folder: Path, generator: str, started: float) -> str:
        """Write one mode's answers into the folder in the judge's form. An answer without a text is an empty one.

        Args:
            generator: What the judge is to call the model in this mode.
            started: When sampling began, in seconds since 1970.

        Returns:
            The command that judges them.
        """


def final_answer(completion: str, mode: Mode, finish_reason: str, think: ThinkFormat) -> str | None:
    """The answer of a completion without its stop token; None where it was cut or its trace was not finished.

    A model that opens or closes a think block in `no_thinking` all the same has it taken out as in `thinking`.
    """
    if finish_reason == "length":
        return None
    body = completion.lstrip()
    thought = body.startswith(think.open) or think.close in body
    return answer_of(body, "thinking" if thought else mode, think)


# ---------------------------------------------------------------------- sources


def source_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the row) of a JSON, JSONL or Parquet file, a Hub data set, or one file of it.

    Args:
        source: A path; `owner/name` or `owner/name:split`; or `hf://datasets/owner/name/path/of/the/file.jsonl`.

    Raises:
        UserError: The source cannot be had or read, or has no rows.
    """
    number = 0
    for number, row in enumerate(read_records(_local(source)), 1):
        yield f"{source}, row {number}", row
    if not number:
        raise UserError(f"{source}: no rows; expected one question a row")


def _local(source: str) -> str:
    if not source.startswith(HUB_FILES):
        return source
    parts = source.removeprefix(HUB_FILES).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise UserError(f"{source}: expected {HUB_FILES}OWNER/NAME/PATH, the path of one file of a data set")
    try:
        return hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset")
    except Exception as error:  # whatever the Hub's client or the network raises
        raise UserError(
            f"{source}: cannot be fetched from the Hub ({first_line(error)}): check the network, HF_HUB_OFFLINE and "
            "the path, or give a local file as `source`"
        ) from error


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must hold text. Raises UserError, naming row and field, where it does not."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = describe(value) if name in row else f"the fields {', '.join(row)}"
        raise UserError(f"{where}: field {name}: expected text, found {found}")
    check_text(value, f"{where}, field {name}")
    return value


# ---------------------------------------------------------------------- files, there whole or not at all


def write_json(path: Path, value: Any) -> None:
    """Raises UserError where the file cannot be written; an older one is then still there."""
    _write(path, [json.dumps(value, indent=1, ensure_ascii=False)])


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """A line a record. Raises as `write_json`."""
    _write(path, (json.dumps(record, ensure_ascii=False) for record in records))


def _write(path: Path, lines: Iterable[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            text = io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8", newline="\n")  # type: ignore[type-var]
            for line in lines:
                text.write(line + "\n")
            text.flush()
            text.detach().detach()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
