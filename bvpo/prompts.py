"""Prompts to answer: from JSONL, Parquet, a Hub data set or the built-in tasks to conversations.

A row is recognised by its columns: a `conversation` or `messages` (a final assistant turn is what others answered, and
is left out), Alpaca's `instruction` and `input`, or text under `prompt`, `question` or `problem`. A right answer, for
exact rewards, is taken from `reference`, `answer` or `solution`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from bvpo.errors import UserError
from bvpo.reading import number_as_text, read_records
from bvpo.tasks import draw_questions
from bvpo.traces import Conversation, check_conversation, check_text

TASKS = "builtin:tasks"
MESSAGES = ("conversation", "messages", "prompt", "chosen")  # chosen: UltraFeedback's conversations hold an answer
TEXTS = ("prompt", "instruction", "question", "problem")
REFERENCES = ("reference", "answer", "solution")
BUILTIN_COUNT = 1000


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends in the user's turn.

    Attributes:
        id: The row's `prompt_id` or, without one, a hash of the conversation.
        reference: The right answer, where the source has one.
    """

    id: str
    conversation: Conversation
    reference: str | None = None


def load_prompts(source: str, limit: int | None = None, seed: int = 0, reference: str | None = None) -> list[Prompt]:
    """The prompts of a source, in its order, each once; repeated ones are counted in a warning.

    Args:
        source: A JSONL or Parquet file, a Hub data set id, or `builtin:tasks`.
        limit: The first so many. `builtin:tasks` draws so many, 1,000 by default.
        seed: Of the built-in questions.
        reference: The column of the right answer, where it has another name.

    Raises:
        UserError: The source cannot be read, a row is no prompt, or two prompts share an id.
    """
    if source == TASKS:
        questions = draw_questions(limit or BUILTIN_COUNT, seed, "train")
        return [
            Prompt(f"task-{index:05d}", [{"role": "user", "content": question.instruction}], question.answer)
            for index, question in enumerate(questions)
        ]
    prompts: dict[str, Prompt] = {}
    repeated = 0
    for number, row in enumerate(read_records(source), 1):
        prompt = prompt_of(row, f"{source}, row {number}", reference)
        before = prompts.setdefault(prompt.id, prompt)
        if before.conversation != prompt.conversation:
            raise UserError(
                f"{source}, row {number}: the prompt_id {prompt.id!r} is another row's, with another prompt"
            )
        if before.reference != prompt.reference:
            raise UserError(
                f"{source}, row {number}: an earlier row's prompt with another reference, {prompt.reference!r} instead "
                f"of {before.reference!r}: leave one of the rows out, or give each a prompt_id"
            )
        repeated += before is not prompt
        if len(prompts) == limit:
            break
    if not prompts:
        raise UserError(f"{source}: no rows; expected one prompt a row")
    if repeated:
        rank_zero_warn(f"{source}: {repeated} rows repeat an earlier prompt; they are left out")
    return list(prompts.values())


def prompt_of(row: Mapping[str, Any], where: str, reference: str | None = None) -> Prompt:
    """One row as a prompt. Raises UserError, naming the row, where it is none."""
    conversation = _conversation(row, where)
    try:
        check_conversation(conversation)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if reference is not None and reference not in row:
        raise UserError(f"{where}: no column {reference}; it has {', '.join(row)}")
    given = {name: number_as_text(row.get(name)) for name in (*REFERENCES, reference, "prompt_id", "id") if name}
    answers = [given[name] for name in ([reference] if reference else REFERENCES) if given[name] is not None]
    name = next((given[name] for name in ("prompt_id", "id") if given[name] not in (None, "")), None)
    check_text(str(name), f"{where}, prompt_id")
    digest = hashlib.sha256(json.dumps(conversation, sort_keys=True).encode()).hexdigest()[:16]
    return Prompt(digest if name is None else str(name), conversation, str(answers[0]) if answers else None)


def dated(template: Any, date: datetime) -> Any:
    """A chat template that writes this date where it asks for today's: going on tomorrow asks the same prompts."""
    if not isinstance(template, str):
        return template
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(date.strftime(call[2])), template)


def _conversation(row: Mapping[str, Any], where: str) -> Conversation:
    for name in MESSAGES:
        if isinstance(row.get(name), list) and (turns := _until_user(row[name])):
            return turns  # an assistant's turn alone answers a prompt that is elsewhere in the row
    for name in TEXTS:
        text = row.get(name)
        if isinstance(text, str) and text.strip():
            extra = row.get("input") if name == "instruction" else None
            return [{"role": "user", "content": f"{text}\n\n{extra}" if extra else text}]
    expected = "conversation or messages, instruction, prompt, question or problem"
    raise UserError(f"{where}: expected one of the fields {expected}, found {', '.join(row) or 'no field'}")


def _until_user(messages: Iterable[Any]) -> Conversation:
    """Messages as role and content alone, without the assistant's last turn."""
    turns: list[Any] = [
        {"role": m.get("role"), "content": m.get("content")} if isinstance(m, Mapping) else m for m in messages
    ]
    while turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        turns.pop()
    return turns
