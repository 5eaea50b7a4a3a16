"""One microbatch in tensors: the sequences of both estimators, padded, with the lengths that masks come from.

Shapes: B rows, of which B_t have a trace pair and B_e an empty-trace pair; S = 2B_t or 2B_e sequences (the chosen ones,
then the rejected ones), T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Branch = Literal["trace", "empty"]
BRANCHES: tuple[Branch, ...] = ("trace", "empty")
PREFIX: dict[Branch, str] = {"trace": "", "empty": "empty_"}  # of a branch's columns


class SequenceBatch(NamedTuple):
    """The chosen and rejected sequences of one branch, padded on the right.

    A named tuple, as `PairBatch` is: Lightning and torch then move, pin and convert it without code of ours.

    Attributes:
        input_ids: (S, T) int64.
        prompt_lengths, lengths: (S,) tokens of the prompt, and of prompt and completion.
        step_pairs: Pairs of this branch in the whole optimizer batch, over microbatches and ranks: the loss's divisor.
            0 where that batch has none.
        reference: (S,) float64 log π_ref(completion | prompt), where the rows came with them.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    step_pairs: int
    reference: Tensor | None = None

    @classmethod
    def dummy(cls, device: torch.device) -> SequenceBatch:
        """A pair of the shortest sequences: what is computed where there is nothing to compute."""
        ids = torch.zeros(2, 2, dtype=torch.long, device=device)
        one = torch.ones_like(ids[0])
        return cls(ids, one, 2 * one, step_pairs=1, reference=torch.zeros_like(one, dtype=torch.float64))

    @property
    def attention_mask(self) -> Tensor:
        """(S, T) int64, 1 at the tokens of prompt and completion."""
        return (self._positions < self.lengths[:, None]).long()

    @property
    def completion_mask(self) -> Tensor:
        """(S, T) bool, True at the tokens of the completion."""
        return (self._positions >= self.prompt_lengths[:, None]) & (self._positions < self.lengths[:, None])

    @property
    def _positions(self) -> Tensor:
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device)

    @property
    def pairs(self) -> int:
        return len(self.lengths) // 2

    def part(self, index: slice | list[int]) -> SequenceBatch:
        """Some of the sequences, without the padding that they do not need."""
        lengths = self.lengths[index]
        ids = self.input_ids[index][:, : int(lengths.max())]
        reference = None if self.reference is None else self.reference[index]
        return SequenceBatch(ids, self.prompt_lengths[index], lengths, self.step_pairs, reference)

    def cut(self, most_tokens: int | None) -> list[SequenceBatch]:
        """The pairs in parts of similar length, each of at most so many tokens, padding included, or of one pair."""
        if most_tokens is None:
            return [self] if self.pairs else []
        return [self.part(sequences) for sequences in self.cuts(most_tokens)]

    def cuts(self, most_tokens: int | None) -> list[list[int]]:
        """Which of the sequences are in each of those parts; where there is no pair, there is no part."""
        if most_tokens is None:
            return [list(range(2 * self.pairs))] if self.pairs else []
        longest = self.lengths.view(2, -1).amax(0).tolist()
        parts: list[list[int]] = []
        for pair in sorted(range(self.pairs), key=longest.__getitem__):
            if not parts or 2 * (len(parts[-1]) + 1) * longest[pair] > most_tokens:
                parts.append([])
            parts[-1].append(pair)
        return [[*pairs, *(self.pairs + pair for pair in pairs)] for pairs in parts]


class AnchorBatch(NamedTuple):
    """Several traces for each completion of the trace pairs: what the marginal anchor is computed from.

    Attributes:
        sequences: A sequences: a row's prompt, one of the traces, and the answer of one side.
        completion: (A,) int64 index in [0, S): which completion of the trace branch a sequence belongs to.
        log_q: (A,) float64 log q(r|x) that the trace was drawn with; None where the traces are posterior draws.
    """

    sequences: SequenceBatch
    completion: Tensor
    log_q: Tensor | None

    def cuts(self, width: int, most_tokens: int | None) -> list[slice]:
        """The sequences in parts of at most `width`, and so many tokens, padding included, or of one sequence."""
        if most_tokens is not None:
            width = min(width, max(1, most_tokens // self.sequences.input_ids.shape[1]))
        return [slice(first, first + width) for first in range(0, len(self.completion), width)]


class PairBatch(NamedTuple):
    """One microbatch. A row is in both branches, or in one of them where it has one pair only.

    Attributes:
        trace, empty: The two estimators' sequences.
        prompts: (B,) int64 keys of the rows' prompts.
        closes_step: Whether the optimizer steps after this microbatch.
        anchors: The marginal anchor's sequences, where it is asked for.
    """

    trace: SequenceBatch
    empty: SequenceBatch
    prompts: Tensor
    closes_step: bool = True
    anchors: AnchorBatch | None = None

    @property
    def counts(self) -> tuple[int, int, int]:
        """B_t, B_e and B_te: rows with a trace pair, with an empty-trace pair, and with both."""
        trace, empty = self.trace.pairs, self.empty.pairs
        return trace, empty, trace + empty - len(self.prompts)


def has_branch(row: Mapping[str, Any], branch: Branch) -> bool:
    """Whether a tokenized row has this branch's pair."""
    return bool(row[PREFIX[branch] + "chosen"])


def collate(
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    step_pairs: tuple[int, int] | None = None,
    closes_step: bool = True,
) -> PairBatch:
    """A batch of tokenized rows; `step_pairs`, of the trace and the empty branch, defaults to those of the rows."""
    own = {branch: [row for row in rows if has_branch(row, branch)] for branch in BRANCHES}
    pairs = step_pairs or (len(own["trace"]), len(own["empty"]))
    with_anchors = own["trace"] if rows and "anchor_chosen" in rows[0] else []
    return PairBatch(
        trace=_pad(own["trace"], "trace", pad_token_id, pairs[0]),
        empty=_pad(own["empty"], "empty", pad_token_id, pairs[1]),
        prompts=torch.tensor([row["prompt_key"] for row in rows], dtype=torch.long),
        closes_step=closes_step,
        anchors=_anchors(with_anchors, pad_token_id, pairs[0]) if with_anchors else None,
    )


def _anchors(rows: Sequence[Mapping[str, Any]], pad_token_id: int, step_pairs: int) -> AnchorBatch:
    sequences, completion, log_q, reference = [], [], [], []
    for offset, side in ((0, "anchor_chosen"), (len(rows), "anchor_rejected")):
        for index, row in enumerate(rows):
            sequences += [(row["prompt"], ids) for ids in row[side]]
            completion += [offset + index] * len(row[side])
            log_q += row["anchor_log_q"]
            first = len(row["anchor_chosen"]) if offset else 0
            reference += row.get("reference_anchors", [])[first : first + len(row[side])]
    drawn = torch.tensor(log_q, dtype=torch.float64) if log_q else None
    padded = _padded(sequences, pad_token_id, step_pairs, reference)
    return AnchorBatch(padded, torch.tensor(completion), drawn)


def _pad(rows: Sequence[Mapping[str, Any]], branch: Branch, pad_token_id: int, step_pairs: int) -> SequenceBatch:
    prefix, sides = PREFIX[branch], ("chosen", "rejected")
    sequences = [(row[prefix + "prompt"], row[prefix + side]) for side in sides for row in rows]
    cached = [row[f"reference_{branch}"] for row in rows if f"reference_{branch}" in row]
    return _padded(sequences, pad_token_id, step_pairs, [pair[side] for side in (0, 1) for pair in cached])


def _padded(
    sequences: Sequence[tuple[list[int], list[int]]],
    pad_token_id: int,
    step_pairs: int,
    reference: Sequence[float] = (),
) -> SequenceBatch:
    """Sequences of prompt and completion ids, padded on the right."""
    joined = [torch.tensor(prompt + completion) for prompt, completion in sequences]
    padded = torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=pad_token_id) if joined else None
    return SequenceBatch(
        torch.empty(0, 0, dtype=torch.long) if padded is None else padded,
        torch.tensor([len(prompt) for prompt, _ in sequences], dtype=torch.long),
        torch.tensor([len(ids) for ids in joined], dtype=torch.long),
        step_pairs,
        torch.tensor(reference, dtype=torch.float64) if reference else None,
    )
