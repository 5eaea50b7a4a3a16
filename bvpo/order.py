"""In which order rows are trained on: optimizer batches are random draws of rows, cut into microbatches.

Statistics need exchangeable units, so an optimizer batch is drawn first and sorted by length, if at all, only inside
it. The draw is a function of seed and epoch alone: it is the same for any split into microbatches and ranks, and a
resumed run goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Microbatch:
    """Rows that one rank takes through the model at once."""

    rows: list[int]
    step_pairs: tuple[int, int]  # of the optimizer batch: its trace pairs and its empty-trace pairs
    closes_step: bool


class StepSampler(Sampler[Microbatch]):
    """Epoch after epoch of optimizer batches, cut into this rank's microbatches.

    Each iteration goes on where the last one ended, to the end of that epoch. An epoch's last optimizer batch holds the
    rows that are left; no row is dropped.

    Args:
        rows: Rows of the data set.
        batch_size: Rows of a microbatch on a rank.
        accumulate: Microbatches of an optimizer step on a rank.
        lengths: Tokens of each row: sorts the rows of an optimizer batch by length; None leaves them as drawn.
        pairs: (trace, empty) whether each row has the pair, where some rows have one only.
        together: Consecutive rows that are drawn and sorted as one: several rows of a prompt. Divides the rows and the
            batch size.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        lengths: Sequence[int] | None = None,
        pairs: Sequence[tuple[bool, bool]] | None = None,
        together: int = 1,
    ) -> None:
        self.together = together
        self.rows, self.batch_size, self.accumulate, self.seed = rows, batch_size, accumulate, seed
        self.rank, self.ranks, self.lengths, self.pairs = rank, ranks, lengths, pairs
        self.epoch, self.served = 0, 0  # where the next microbatch is taken from

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer batch: microbatches × ranks × rows of a microbatch."""
        return self.batch_size * self.accumulate * self.ranks

    @property
    def cut(self) -> dict[str, int]:
        """What the order of rows and their microbatches depend on."""
        return {
            "rows": self.rows,
            "seed": self.seed,
            "rows_together": self.together,
            "bucket_by_length": int(self.lengths is not None),
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "processes": self.ranks,
        }

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.rows / self.step_rows)

    def steps_in(self, epochs: int, limit: float = 1.0) -> int:
        """Optimizer steps that end in so many iterations, of which each is left after `limit` microbatches: a number of
        them (int), or a share of all (float). The next one goes on from there."""
        most = min(limit, len(self)) if isinstance(limit, int) else int(limit * len(self))
        if not most:
            return 0
        whole, rest = divmod(epochs, math.ceil(len(self) / most))
        return whole * self.steps + rest * most // self.accumulate

    def __len__(self) -> int:
        full, rest = divmod(self.rows, self.step_rows)
        return full * self.accumulate + math.ceil(rest / (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[Microbatch]:
        yield from list(self._epoch())[self.served :]

    def advance(self) -> None:
        """Count a microbatch as served."""
        self.served += 1
        if self.served == len(self):
            self.epoch, self.served = self.epoch + 1, 0

    def _epoch(self) -> Iterator[Microbatch]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.rows // self.together, generator=generator).tolist()  # of groups, as all below
        size, step = self.batch_size // self.together, self.step_rows // self.together
        width = size * self.ranks
        own = slice(self.rank * size, (self.rank + 1) * size)  # the microbatches of one rank with as many rows each
        if self.lengths is not None:  # ranks with equally long rows
            own = slice(self.rank, None, self.ranks)
        for first in range(0, len(order), step):
            batch = order[first : first + step]
            if self.lengths is not None:
                batch.sort(key=self._longest)
            pairs = _count_pairs(self.pairs, self._rows(batch))
            for cut in range(0, len(batch), width):
                mine = self._rows(batch[cut : cut + width][own])
                yield Microbatch(mine, pairs, closes_step=cut + width >= len(batch))

    def _rows(self, groups: Sequence[int]) -> list[int]:
        return [group * self.together + row for group in groups for row in range(self.together)]

    def _longest(self, group: int) -> int:
        assert self.lengths is not None
        return max(self.lengths[row] for row in self._rows([group]))


class InOrder(Sampler[Microbatch]):
    """Every row once, as they stand, shared out over ranks. Each iteration begins at the first row: a validation that
    takes some of the batches takes the same ones each time.

    Args:
        rows: Rows of the data set.
        batch_size: Rows of a microbatch on a rank.
        pairs: (trace, empty) whether each row has the pair.
    """

    def __init__(
        self, rows: int, batch_size: int, pairs: Sequence[tuple[bool, bool]], rank: int = 0, ranks: int = 1
    ) -> None:
        self.rows, self.batch_size, self.pairs, self.rank, self.ranks = rows, batch_size, pairs, rank, ranks

    def __len__(self) -> int:
        return math.ceil(self.rows / (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[Microbatch]:
        width = self.batch_size * self.ranks
        for first in range(0, self.rows, width):
            rows = list(range(first, min(first + width, self.rows)))[self.rank :: self.ranks]
            yield Microbatch(rows, _count_pairs(self.pairs, rows), closes_step=True)


def _count_pairs(pairs: Sequence[tuple[bool, bool]] | None, rows: Sequence[int]) -> tuple[int, int]:
    """Trace pairs and empty-trace pairs of some rows."""
    if pairs is None:
        return len(rows), len(rows)
    return sum(pairs[row][0] for row in rows), sum(pairs[row][1] for row in rows)
