"""What can be wrong with a row that can be trained on: questions to one row, as it is read, as text, and as ids.

Each function answers with a fault, or None. `checks` asks them of many rows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from bvpo.batches import BRANCHES, PREFIX, Branch, has_branch
from bvpo.errors import UserError
from bvpo.pairs import encode_prompt, prepare_row
from bvpo.rows import to_text, without_stop
from bvpo.selection import RowOptions
from bvpo.traces import MODES, render_prompt, split, template_fingerprint

Status = Literal["pass", "warn", "fail", "skipped"]
SAMPLE = 64  # rows that are looked at in detail
BAD_ROWS = 500  # bad rows that are looked at in detail
BORDER = 200  # characters of a completion that decide which tokens are at its start


class Fault(NamedTuple):
    status: Status
    found: str


@dataclass(frozen=True)
class Example:
    """A row that can be trained on: its number (from 1), as it is read, as text (conformed), and as ids."""

    number: int
    row: Mapping[str, Any]
    text: Mapping[str, Any]
    ids: Mapping[str, Any]

    def completions(self) -> list[tuple[Branch, str, str]]:
        """(branch, prompt column, completion column) of the sequences that the row has."""
        return [
            (branch, PREFIX[branch] + "prompt", PREFIX[branch] + side)
            for branch in BRANCHES
            if has_branch(self.ids, branch)
            for side in ("chosen", "rejected")
        ]


@dataclass(frozen=True)
class Sample:
    """Rows to look at.

    Attributes:
        examples: Some of the good rows.
        bad: Why rows are no pairs, by number.
        bad_rows: The first of them, by number, as they are read.
        total: Rows that `bad` is of.
    """

    examples: list[Example]
    bad: Mapping[int, str]
    bad_rows: Mapping[int, Mapping[str, Any]]
    total: int
    tokenizer: PreTrainedTokenizerBase
    options: RowOptions


def draw_sample(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
    seed: int,
    wanted: Sequence[int] = (),
    also: Sequence[int] = (),
    problems: Mapping[int, str] | None = None,
    size: int = SAMPLE,
) -> Sample:
    """The rows with the `wanted` indices, `size` random ones, and `also` some others, tokenized as training does.

    Args:
        rows: As they are read.
        problems: What is wrong with the rows of the whole source, by index; without it, only the rows that are drawn
            are known.
    """
    drawn = random.Random(seed).sample(range(len(rows)), min(size, len(rows)))
    indices = list(dict.fromkeys([*wanted, *drawn, *also]))
    limit = None if options.cut_to else options.max_length  # longer rows are left out
    examples, bad = [], dict(problems or {})
    for index in indices:
        row, where = rows[index], f"row {index + 1}"
        ids = prepare_row(row, index, tokenizer, "", options)
        if ids["problem"]:
            bad[index] = ids["problem"]
        elif index in wanted or not limit or max(ids["lengths"]) <= limit:
            text = to_text(row, where, tokenizer, options.think, options.stops)
            examples.append(Example(index + 1, row, text, ids))
    first = {index + 1: rows[index] for index in list(bad)[:BAD_ROWS]}
    total = len(rows) if problems is not None else len(indices)
    return Sample(examples, {index + 1: why for index, why in bad.items()}, first, total, tokenizer, options)


# ---------------------------------------------------------------------- what can be wrong with a row


def no_trace(example: Example, sample: Sample) -> Fault | None:
    """A trace pair's completion without a trace, though the data or the model tell of reasoning."""
    think = sample.options.think
    for branch, prompt, completion in example.completions():
        text = str(example.text[completion])
        own = split(text, think)
        opened = own.opened or example.text[prompt].rstrip().endswith(think.open)
        if branch == "empty" or (own.closed and own.trace.strip()) or (own.closed and not opened):
            continue
        answer = without_stop(own.answer if own.closed else text, sample.options.stops).strip()
        candidates = example.text.get("trace_candidates") or []
        if any((c.get("answer") or "").strip() == answer and (c.get("trace") or "").strip() for c in candidates):
            return Fault("fail", f"{completion} holds no trace, and its candidate does")
        if think.close in str(example.text["empty_prompt"]):
            return Fault("warn", f"{completion} holds no trace, and empty_prompt has an empty think block")
        if think.close in str(sample.tokenizer.chat_template):
            return Fault("warn", f"{completion} holds no trace, and the chat template knows {think.close}")
    return None


def never_opened(example: Example, sample: Sample) -> Fault | None:
    """A trace that ends and never began."""
    think = sample.options.think
    for branch, prompt, completion in example.completions():
        text = str(example.text[completion])
        opened = split(text, think).opened or example.text[prompt].rstrip().endswith(think.open)
        if branch == "trace" and think.close in text and not opened:
            return Fault("warn", f"{completion} holds {think.close}, and neither it nor the prompt opens a block")
    return None


def bos_twice(example: Example, sample: Sample) -> Fault | None:
    tokenizer = sample.tokenizer
    bos, text = tokenizer.bos_token_id, str(tokenizer.bos_token)
    if bos is None or text in sample.options.stops:
        return None
    for _, prompt, completion in example.completions():
        if bos in example.ids[completion]:
            return Fault("fail", f"{completion} holds {text}")
        if example.ids[prompt].count(bos) > 1:
            return Fault("fail", f"{prompt} holds {text} {example.ids[prompt].count(bos)} times")
        if str(example.text[prompt]).startswith(text):
            return Fault("warn", f"the text of {prompt} begins with {text}: here it counts once, TRL adds a second")
    return None


def no_stop(example: Example, sample: Sample) -> Fault | None:
    if not example.ids["endless"]:
        return None
    names = [c for *_, c in example.completions() if not str(example.text[c]).endswith(sample.options.stops)]
    return Fault("warn", f"{' and '.join(names) or 'a completion'} ends in no stop token")


def token_across_border(example: Example, sample: Sample) -> Fault | None:
    for _, prompt, completion in example.completions():
        apart = encode_prompt(sample.tokenizer, example.text[prompt])
        together = encode_prompt(sample.tokenizer, example.text[prompt] + example.text[completion][:BORDER])
        if together[: len(apart)] != apart:
            at = next((i for i, (a, b) in enumerate(zip(apart, together, strict=False)) if a != b), len(together) - 1)
            token = sample.tokenizer.decode([together[at]])
            return Fault("warn", f"in {prompt} + {completion} the token {token!r} lies across the border")
    return None


def other_prompt(example: Example, sample: Sample) -> Fault | None:
    """The prompt is not what the policy's template makes of the row's conversation."""
    conversation, tokenizer = example.text.get("conversation"), sample.tokenizer
    if not conversation:
        return None
    sha = example.row.get("template_sha")
    dated = "strftime_now" in str(tokenizer.chat_template)
    status: Status = "warn" if dated or sha not in (None, template_fingerprint(tokenizer)) else "fail"
    messages = [{"role": message["role"], "content": message["content"]} for message in conversation]
    for branch, mode in zip(BRANCHES, MODES, strict=True):
        name = PREFIX[branch] + "prompt"
        if not has_branch(example.ids, branch):
            continue
        try:
            expected = encode_prompt(tokenizer, render_prompt(tokenizer, messages, mode, sample.options.think))
        except UserError as error:
            return Fault(status, str(error))
        found = encode_prompt(tokenizer, example.text[name])
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
            at = min(len(found), len(expected)) if at is None else at
            ends = [tokenizer.decode(ids[at : at + 8]) for ids in (found, expected)]
            return Fault(status, f"{name} differs from token {at + 1} on: {ends[0]!r}, the policy's has {ends[1]!r}")
    return None


def same_sides(example: Example, sample: Sample) -> Fault | None:
    for branch in BRANCHES:
        chosen, rejected = (example.ids[PREFIX[branch] + side] for side in ("chosen", "rejected"))
        if has_branch(example.ids, branch) and chosen == rejected:
            return Fault("fail", f"{PREFIX[branch]}chosen and {PREFIX[branch]}rejected are the same ids once cut")
    return None


def other_template(example: Example, sample: Sample) -> Fault | None:
    sha, own = example.row.get("template_sha"), template_fingerprint(sample.tokenizer)
    if sha in (None, own) or not sample.tokenizer.chat_template:
        return None
    return Fault("warn", f"sampled with the template {str(sha)[:12]}…, the policy's is {own[:12]}…")


def healthy(example: Example, sample: Sample) -> Fault | None:
    """Nothing: for checks that only bad rows can fail."""
    return None
