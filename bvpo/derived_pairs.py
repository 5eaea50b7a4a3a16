"""A row → the trace pairs that a baseline trains on, made of what the row holds: nothing is sampled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bvpo.errors import UserError
from bvpo.pairing import corrupt_digits
from bvpo.traces import ThinkFormat, join, split

Row = Mapping[str, Any]


class DerivedPairs(ABC):
    """What `--pairs` takes: makes trace pairs of a row. Subclasses are frozen dataclasses."""

    @abstractmethod
    def pairs(self, row: Row, think: ThinkFormat) -> list[dict[str, Any]]:
        """What the derived rows have in place of the row's own fields. Raises ValueError where a field is missing."""


@dataclass(frozen=True)
class Pooled(DerivedPairs):
    """Both pairs of a row as rows of their own: DPO on the union of D_t and D_e, one loss over 2N pairs.

    An empty-trace pair keeps its prompt, which ends behind the closed block; only the column's name changes. With both
    pairs of a prompt in one batch this would be α = 0.5; drawn independently of each other they are not.
    """

    def pairs(self, row: Row, think: ThinkFormat) -> list[dict[str, Any]]:
        _need(row, ("prompt", "chosen", "rejected", "empty_prompt", "empty_chosen", "empty_rejected"))
        empty = {name: row[f"empty_{name}"] for name in ("prompt", "chosen", "rejected")}
        return [{"conversation": None}, {"conversation": None, **empty}]  # its own template gives the trace prompt


@dataclass(frozen=True)
class SeveralTraces(DerivedPairs):
    """K trace pairs a prompt: the same two answers, each with traces that the model drew for it.

    The candidates with a pair's own answer are draws of its trace from the posterior π_ref(r | x, y), the pair's own
    trace among them. A side with fewer than K of them repeats them in turn, so that every prompt has K rows and weighs
    the same: the mean over a prompt's rows estimates its trace gradient with part of the traces' variance averaged out.

    Args:
        traces: K.
    """

    traces: int = 4

    def __post_init__(self) -> None:
        if self.traces < 1:
            raise UserError(f"traces must be ≥ 1, got {self.traces}")

    def pairs(self, row: Row, think: ThinkFormat) -> list[dict[str, Any]]:
        _need(row, ("prompt", "chosen", "rejected", "trace_candidates"))
        sides = {side: with_other_traces(row[side], row["trace_candidates"], think) for side in ("chosen", "rejected")}
        return [{side: own[k % len(own)] for side, own in sides.items()} for k in range(self.traces)]


def with_other_traces(completion: str, candidates: Sequence[Row], think: ThinkFormat) -> list[str]:
    """The completion, then the same with the trace of each other complete candidate that has its answer, as drawn."""
    own = split(completion, think)
    text = own.answer.strip()  # the answer and the stop token
    same = [c for c in candidates if c["trace"] == own.trace and c["answer"] and text.startswith(c["answer"])]
    if not own.closed or not same:
        raise ValueError("its chosen or its rejected completion is not among trace_candidates")
    mine = max(same, key=lambda candidate: len(candidate["answer"]))
    rest = [c for c in candidates if c is not mine and c["answer"] == mine["answer"]]
    traces = [c["trace"] for c in rest if c["finish_reason"] != "length" and c["trace"] is not None]
    return [completion, *(join(replace(own, trace=trace), think) for trace in traces)]


@dataclass(frozen=True)
class CorruptedTraces(DerivedPairs):
    """The chosen completion beside itself with other digits in its trace, as in PORT (arXiv 2406.16061).

    Args:
        fraction: Of the trace's digits that are replaced, at least one.
        seed: Of the digits.
    """

    fraction: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be in (0, 1], got {self.fraction}")

    def pairs(self, row: Row, think: ThinkFormat) -> list[dict[str, Any]]:
        _need(row, ("prompt", "chosen"))
        rejected = corrupt_digits(row["chosen"], think, self.fraction, self.seed)
        return [] if rejected is None else [{"rejected": rejected}]


def _need(row: Row, names: Sequence[str]) -> None:
    for name in names:
        if not row.get(name):
            raise ValueError(f"field {name}: expected a value, found none")
        if name != "trace_candidates" and not isinstance(row[name], str):
            raise ValueError(f"field {name}: expected text; messages are not rendered here")
