"""Rows → text, checked: message lists are rendered, implicit prompts found, and nothing is repaired in silence.

A row that is no pair of pairs is a *bad row*: its problem is found here, and `selection.select_rows` refuses it, or
drops and counts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from bvpo.batches import BRANCHES, PREFIX, Branch
from bvpo.errors import UserError
from bvpo.reading import (
    COMPLETIONS,
    OPTIONAL_COLUMNS,
    PROBLEM,
    STRUCTURE,
    TEXT_COLUMNS,
    conform,
    describe,
    first_line,
    number_as_text,
)
from bvpo.traces import QWEN3, ThinkFormat, own_stops, render_prompt, split, turn_end

REASONING = ("reasoning_content", "thinking")  # a message's trace; the latter is gpt-oss's name
NESTED = ("conversation", "trace_candidates", "empty_candidates", "anchor_traces")  # columns of lists of objects


def conform_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row whose lists of objects have every documented field, None where it is absent, whatever file it is from.

    Raises:
        UserError: The reader found a problem, or one of these columns holds something else.
    """
    if row.get(PROBLEM):
        raise UserError(f"{where}: {row[PROBLEM]}")
    conformed = dict(row) | {"prompt_id": number_as_text(row.get("prompt_id"))}
    for name in NESTED:
        if name in row:
            try:
                conformed[name] = conform(row[name], OPTIONAL_COLUMNS[name])
            except ValueError as error:
                raise UserError(f"{where}: field {name}: expected {STRUCTURE[name]}, found {error}") from error
    return conformed


# ---------------------------------------------------------------------- conversations → text


def to_text(
    row: Mapping[str, Any],
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    think: ThinkFormat = QWEN3,
    stops: Sequence[str] = (),
) -> dict[str, Any]:
    """A conformed row whose six columns are text: message lists, as TRL and SimPO write them, are rendered.

    Prompts go through the chat template. Completions never do, it may cut the trace: a completion is the message's
    `reasoning_content` between the tags, its content as it stands, and that of `stops` which ends a turn of the
    template. A row of text without prompts has them inside its completions. The columns of a pair that the row does not
    have are None.

    Raises:
        UserError: The row cannot be conformed, or its messages are no prompt with one answer.
    """
    row = conform_row(row, where)
    text = dict.fromkeys(TEXT_COLUMNS) | row
    answers = {name: row[name] for name in COMPLETIONS if isinstance(row.get(name), list)}
    if not answers:
        return _with_prompts(row, where, think)
    eos = turn_end(tokenizer, stops or own_stops(tokenizer))
    for name, messages in answers.items():
        if not _are_messages(messages) or messages[-1]["role"] != "assistant":
            found = describe(messages)
            raise UserError(f"{where}: field {name}: expected messages that end in the assistant's, found {found}")
    try:
        conversation = _conversation(row.get("prompt"), [messages[:-1] for messages in answers.values()])
        text["prompt"] = render_prompt(tokenizer, conversation, "thinking", think)
        if not isinstance(row.get("empty_prompt"), str):
            text["empty_prompt"] = render_prompt(tokenizer, conversation, "no_thinking", think)
        for name, messages in answers.items():
            prompt = str(text["empty_prompt" if name.startswith("empty_") else "prompt"])
            text[name] = completion_text(messages[-1], prompt, eos, think)
    except (ValueError, TemplateError) as error:
        raise UserError(f"{where}: {first_line(error)}") from error
    return text


def prefixes_without_prompt(row: Mapping[str, Any]) -> list[str]:
    """Prefixes of the pairs whose prompts are inside chosen and rejected, TRL's implicit form: there is no column."""
    return [
        prefix
        for prefix in PREFIX.values()
        if isinstance(row.get(f"{prefix}chosen"), str) and f"{prefix}prompt" not in row
    ]


def _with_prompts(row: Mapping[str, Any], where: str, think: ThinkFormat) -> dict[str, Any]:
    """Text whose pairs have prompts: those without are cut out of chosen and rejected."""
    text = dict.fromkeys(TEXT_COLUMNS) | dict(row)
    for prefix in prefixes_without_prompt(row):
        names = f"{prefix}prompt", f"{prefix}chosen", f"{prefix}rejected"
        chosen, rejected = text[names[1]] or "", text[names[2]] or ""
        prompt = shared_prompt(chosen, rejected, think, closed=bool(prefix))
        if not prompt and chosen and rejected:
            raise UserError(
                f"{where}: no field {names[0]}, and {names[1]} and {names[2]} do not start with a prompt that they "
                "share; give one"
            )
        text |= {names[0]: prompt, names[1]: chosen[len(prompt) :], names[2]: rejected[len(prompt) :]}
    return text


def shared_prompt(chosen: str, rejected: str, think: ThinkFormat, closed: bool) -> str:
    """The prompt that two texts start with.

    It ends where the think block begins, or with the tag where the format's prompt opens it; behind the block where
    that is `closed`, as in an empty-trace pair. Texts without a think block share a prompt up to the last white space
    before they differ.
    """
    end = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[: min(len(chosen), len(rejected)) if end is None else end]
    if closed:
        before, block, _ = shared.rpartition(think.empty)
        if block:
            return before + block
    before, tag, after = shared.rpartition(think.open)
    if tag and think.prompt_opens:
        return before + tag + after[: len(after) - len(after.lstrip())]
    if tag:
        return before
    return shared[: max((i + 1 for i, letter in enumerate(shared) if letter.isspace()), default=0)]


def _are_messages(value: list[Any]) -> bool:
    """Whether these are one or more messages with a role and text, or a trace, as their content."""
    return bool(value) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content") or "", str)
        and all(isinstance(message.get(name) or "", str) for name in REASONING)
        for message in value
    )


def _conversation(prompt: Any, starts: list[list[dict[str, Any]]]) -> list[dict[str, str]]:
    """What the completions answer: the explicit prompt, or what their own messages share up to the last one."""
    given = prompt if isinstance(prompt, list) else []
    shared = next((start for start in starts if start), [])
    if any(start and start != shared for start in starts):
        raise ValueError(
            "the completions answer different conversations; expected one conversation before the last message"
        )
    messages = [*given, *shared] or ([{"role": "user", "content": prompt}] if prompt else [])
    if not _are_messages(messages) or not all(message.get("content") for message in messages):
        raise ValueError(f"field prompt: expected messages with role and content, found {describe(messages)}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def completion_text(message: Mapping[str, Any], prompt: str, eos: str, think: ThinkFormat = QWEN3) -> str:
    """A message as the model wrote it after the prompt, which may have opened the think block.

    A `reasoning_content` (or `thinking`) or content that a server has stripped gets the line breaks back that Qwen3 and
    R1 write around the tags.
    """
    content, reasoning = message.get("content") or "", next(filter(None, map(message.get, REASONING)), None)
    opened = prompt.rstrip().endswith(think.open)
    if reasoning:
        if think.close in content:
            raise ValueError("a message has reasoning_content and a trace in its content; expected one of them")
        trace = reasoning if reasoning != reasoning.strip() else f"\n{reasoning}\n"
        content = think.open + trace + think.close + (content if content[:1] == "\n" else f"\n\n{content}")
    if opened and content.startswith(think.open):
        content = content.removeprefix(think.open)
        if prompt != prompt.rstrip():  # the prompt holds the line break after its tag
            content = content.lstrip("\n")
    return content if eos and content.endswith(eos) else content + eos


# ---------------------------------------------------------------------- checking


def check_row(
    row: Mapping[str, Any],
    where: str,
    stops: Sequence[str] = (),
    think: ThinkFormat = QWEN3,
    one_sided: bool = False,
) -> None:
    """Raises UserError, naming file, row and field, where a row of text, conformed, is no pair of pairs.

    Args:
        stops: The texts that may end a completion.
        one_sided: Whether a row may be without one of its pairs.
    """
    present = [branch for branch in BRANCHES if not one_sided or _is_there(row, branch)]
    if not present:
        raise UserError(f"{where}: expected a trace pair or an empty-trace pair, found neither")
    for branch in present:
        _check_pair(row, branch, where, stops, think)
    for branch in present:
        _check_candidates(row, branch, where, stops, think)
    for anchor in row.get("anchor_traces") or []:
        logprob = anchor.get("logprob")
        if not isinstance(anchor.get("trace"), str) or logprob is None or not math.isfinite(logprob):
            found = describe(anchor)
            raise UserError(f"{where}: field anchor_traces: expected a trace and a finite logprob each, found {found}")


def _is_there(row: Mapping[str, Any], branch: Branch) -> bool:
    return any(row.get(f"{PREFIX[branch]}{side}") for side in ("chosen", "rejected"))


def _check_pair(row: Mapping[str, Any], branch: Branch, where: str, stops: Sequence[str], think: ThinkFormat) -> None:
    prompt, chosen, rejected = (PREFIX[branch] + name for name in ("prompt", "chosen", "rejected"))
    for name in (prompt, chosen, rejected):
        if not isinstance(text := row.get(name), str) or not text:
            raise UserError(f"{where}: field {name}: expected text, found {describe(text)}")
    for name in (chosen, rejected):
        if problem := _completion_problem(row[prompt], row[name], stops, think):
            raise UserError(f"{where}: field {name}: {problem}")
        if branch == "empty" and (trace := _trace(row[prompt], row[name], think).strip()):
            raise UserError(f"{where}: field {name}: expected an answer without a trace, found {describe(trace)}")
    if row[chosen] == row[rejected]:
        raise UserError(f"{where}: {chosen} equals {rejected}: a pair needs two different completions")


def without_stop(text: str, stops: Sequence[str]) -> str:
    """A completion without the stop token that it may end in."""
    return text.removesuffix(next((stop for stop in stops if text.endswith(stop)), ""))


def _completion_problem(prompt: str, completion: str, stops: Sequence[str], think: ThinkFormat) -> str | None:
    """What makes a completion unfit to be trained on. Think tags matter where a think block is opened only."""
    body = without_stop(completion, stops)
    if not body.strip():
        return "expected text before the EOS, found nothing but whitespace"
    own, opened = split(body, think), prompt.rstrip().endswith(think.open)
    if opened and own.opened:
        return f"opens a second think block: the prompt ends in {think.open} already"
    if opened or own.opened:
        if not own.closed:
            return f"expected {think.close} after the trace, found an unfinished trace; leave it out, or sample longer"
        if not own.answer.strip():
            return f"expected an answer after {think.close}, found nothing"
    return None


def _trace(prompt: str, completion: str, think: ThinkFormat) -> str:
    """The trace of a completion, empty where no think block is opened."""
    own = split(completion, think)
    return own.trace if own.opened or prompt.rstrip().endswith(think.open) else ""


def _check_candidates(
    row: Mapping[str, Any], branch: Branch, where: str, stops: Sequence[str], think: ThinkFormat
) -> None:
    """Where a row holds the candidates of a pair: neither side was cut off, and chosen scores above rejected."""
    prefix, column, scores = PREFIX[branch], f"{branch}_candidates", []
    for name in (f"{prefix}chosen", f"{prefix}rejected"):
        body = without_stop(row[name], stops)
        own = split(body, think)
        trace, answer = ("", body) if prefix else (own.trace, own.answer)
        matches = [
            candidate
            for candidate in row.get(column) or []
            if (candidate.get("trace") or "").strip() == trace.strip()
            and (candidate.get("answer") or "").strip() == answer.strip()
        ]
        if matches and all(candidate.get("finish_reason") == "length" for candidate in matches):
            raise UserError(f"{where}: field {name}: its candidate was cut off (finish_reason = length)")
        scores.append([c["score"] for c in matches if c.get("score") is not None])
    if all(scores) and not max(scores[0]) > min(scores[1]):
        raise UserError(
            f"{where}: {prefix}chosen does not score above {prefix}rejected ({max(scores[0])} and {min(scores[1])} in "
            f"{column}): a tie is no pair"
        )
