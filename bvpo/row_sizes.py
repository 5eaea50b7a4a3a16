"""Which rows a model takes: how long they are, against its positions, vocabulary and rotary frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from bvpo.batches import BRANCHES, PREFIX, Branch
from bvpo.shapes import ModelShape

ROWS_AT_ONCE = 1000  # that are measured


@dataclass(frozen=True)
class RowSizes:
    """What a model must have room for.

    Attributes:
        spans: Tokens of each branch's shortest and longest sequence, anchors among the trace's; a branch may have none.
        largest_id: None where it was not looked for.
    """

    spans: Mapping[Branch, tuple[int, int]]
    largest_id: int | None

    @property
    def longest(self) -> int:
        return max((longest for _, longest in self.spans.values()), default=0)

    @classmethod
    def of(cls, rows: datasets.Dataset, ids: bool) -> RowSizes:
        """Measure tokenized rows, Arrow table by Arrow table.

        Args:
            ids: Whether to look for the largest id: this reads every token, lengths do not.
        """
        columns = [name for name in rows.column_names if name.endswith(("prompt", "chosen", "rejected"))]
        lengths: dict[Branch, list[Any]] = {branch: [] for branch in BRANCHES}
        largest = []
        for table in rows.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
            for branch in BRANCHES:
                lengths[branch] += _sequence_lengths(table, branch)
            largest += [_largest(table.column(name)) for name in columns] if ids else []
        joined = {branch: np.concatenate([*own, np.zeros(0, int)]) for branch, own in lengths.items()}
        spans = {branch: (int(own.min()), int(own.max())) for branch, own in joined.items() if own.size}
        return cls(spans, max(largest, default=None))


def _sequence_lengths(table: pa.Table, branch: Branch) -> list[Any]:
    """Arrays of tokens a sequence: of each of a branch's completions, and of each of its anchors, with the prompt."""
    prompts = pc.list_value_length(table.column(PREFIX[branch] + "prompt")).to_numpy()
    found = []
    for side in ("chosen", "rejected"):
        own = pc.list_value_length(table.column(PREFIX[branch] + side)).to_numpy()
        found.append((prompts + own)[own > 0])
        if branch == "trace" and f"anchor_{side}" in table.column_names:
            anchors = table.column(f"anchor_{side}")
            own = pc.list_value_length(pc.list_flatten(anchors)).to_numpy()
            found.append(np.repeat(prompts, pc.list_value_length(anchors).to_numpy()) + own)
    return found


def _largest(ids: pa.ChunkedArray) -> int:
    """Of lists, or lists of lists, of ids; -1 where there is none."""
    while pa.types.is_list(ids.type) or pa.types.is_large_list(ids.type):
        ids = pc.list_flatten(ids)
    return int(pc.max(ids).as_py() if len(ids) else -1)


class Misfit(NamedTuple):
    """Why a model does not take rows, and what to do."""

    found: str
    advice: str


def vocabulary_misfit(model: ModelShape, largest_id: int) -> Misfit | None:
    """Rows hold an id that the model has no embedding for."""
    if largest_id < model.vocabulary:
        return None
    found = f"the model has {model.vocabulary} embeddings, and the rows hold the id {largest_id}"
    return Misfit(found, "give the tokenizer that belongs to the policy, or resize the model's embeddings")


def positions_misfit(model: ModelShape, longest: int) -> Misfit | None:
    """A sequence is longer than the model was made for; it is no error where positions are `rotary`."""
    if model.positions is None or longest <= model.positions:
        return None
    found = f"the longest sequence has {longest} tokens, the model was made for {model.positions}"
    return Misfit(found, f"set data.max_length to {model.positions} or less, and data.on_overlong")


def frequencies_misfit(model: ModelShape, spans: Mapping[Branch, tuple[int, int]]) -> Misfit | None:
    """A sequence's log-probability would depend on the other sequences that go through the model at the same time."""
    own = model.frequencies
    for branch, (shortest, longest) in spans.items():
        if own is None or longest <= own.border or (own.kind == "longrope" and shortest > own.border):
            continue
        found = (
            f"the model's rotary frequencies ({own.kind}) change for a whole batch where one sequence has more than "
            f"{own.border} tokens, and the {branch} sequences have {shortest} to {longest}: a log-probability would "
            "depend on the rows beside it"
        )
        or_longer = f", or keep rows whose {branch} sequences are all longer" if own.kind == "longrope" else ""
        return Misfit(found, f"set data.max_length to {own.border}, and data.on_overlong{or_longer}")
    return None


def row_misfit(model: ModelShape, rows: RowSizes) -> Misfit | None:
    """The first reason why rows cannot be trained on."""
    checked = [None if rows.largest_id is None else vocabulary_misfit(model, rows.largest_id)]
    checked.append(None if model.rotary else positions_misfit(model, rows.longest))
    checked.append(frequencies_misfit(model, rows.spans))
    return next((misfit for misfit in checked if misfit is not None), None)


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1
