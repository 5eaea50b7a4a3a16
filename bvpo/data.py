"""The paired batches: optimizer batches are random draws of rows, cut into microbatches.

Statistics need exchangeable units, so an optimizer batch is drawn first and sorted by length, if at all, only inside
it. The draw is a function of seed and epoch alone: it is the same for any split into microbatches and ranks, and a
resumed run goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bvpo.errors import UserError
from bvpo.pairs import OnBadRow, OnOverlong, PairBatch, RowOptions, collate, load_rows, tokenize_rows
from bvpo.policy import load_tokenizer


@dataclass(frozen=True)
class Microbatch:
    """Rows that one rank takes through the model at once."""

    rows: list[int]
    step_pairs: int
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
    ) -> None:
        self.rows, self.batch_size, self.accumulate, self.seed = rows, batch_size, accumulate, seed
        self.rank, self.ranks, self.lengths = rank, ranks, lengths
        self.epoch, self.served = 0, 0  # where the next microbatch is taken from

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer batch: microbatches × ranks × rows of a microbatch."""
        return self.batch_size * self.accumulate * self.ranks

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.rows / self.step_rows)

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
        order = torch.randperm(self.rows, generator=generator).tolist()
        width = self.batch_size * self.ranks
        for first in range(0, self.rows, self.step_rows):
            batch = order[first : first + self.step_rows]
            if self.lengths is not None:
                batch.sort(key=self.lengths.__getitem__)
            for cut in range(0, len(batch), width):
                mine = batch[cut : cut + width][self.rank :: self.ranks]
                yield Microbatch(mine, len(batch), closes_step=cut + width >= len(batch))


class Microbatches(Dataset[PairBatch]):
    """Tokenized rows, looked up and padded a microbatch at a time."""

    def __init__(self, rows: datasets.Dataset, pad_token_id: int) -> None:
        self.rows, self.pad_token_id = rows, pad_token_id

    def __getitem__(self, microbatch: Microbatch) -> PairBatch:  # type: ignore[override]
        columns: dict[str, list[Any]] = self.rows[microbatch.rows]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return collate(rows, self.pad_token_id, microbatch.step_pairs, microbatch.closes_step)


class PairLoader(DataLoader[PairBatch]):
    """A loader that Lightning can checkpoint and resume in the middle of an epoch."""

    def __init__(self, data: Microbatches, sampler: StepSampler, workers: int = 0) -> None:
        super().__init__(data, sampler=sampler, batch_size=None, num_workers=workers)
        self.order = sampler

    def __iter__(self) -> Iterator[PairBatch]:  # type: ignore[override]
        for batch in super().__iter__():
            self.order.advance()  # before the batch is handed out: a checkpoint after it counts it as served
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.order.epoch, "served": self.order.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.epoch, self.order.served = state["epoch"], state["served"]


class PairData(L.LightningDataModule):
    """Trace pairs and empty-trace pairs of the same prompts.

    Args:
        train: Rows to train on: a JSONL or Parquet file, a Hub data set id, or `builtin:tiny_reasoner`.
        validation: Rows whose losses and margins are logged, from the same kinds of source.
        batch_size: Rows of a microbatch on a rank. A row holds four completions.
        accumulate: Microbatches of an optimizer step on a rank; taken from `model.accumulate`.
        tokenizer: Whose tokenizer: a Hub id or folder; taken from `model.policy`.
        max_length: Tokens of prompt and completion that a sequence may have; none by default.
        on_overlong: What happens to a row with a longer sequence. `error` refuses it and `drop` leaves it out;
            `truncate_prompt` cuts its prompt's oldest tokens, `truncate_trace` the end of its trace, before the close
            tag. A row that this cannot shorten enough is a bad row. All are counted, by branch and side.
        on_bad_row: What happens to a row that is no pair of pairs: `error` refuses it, `drop` leaves it out and shows
            counts by reason.
        bucket_by_length: Sort the rows inside an optimizer batch by length: less padding. A microbatch is then no
            random subset, and the whole optimizer step becomes the statistics' unit.
        workers: Processes that prepare batches, and that tokenize a large data set.
        seed: Of the order of rows; taken from `seed_everything`.
    """

    def __init__(
        self,
        train: str = "builtin:tiny_reasoner",
        validation: str | None = None,
        batch_size: int = 4,
        accumulate: int = 1,
        tokenizer: str = "builtin:tiny_reasoner",
        max_length: int | None = None,
        on_overlong: OnOverlong = "error",
        on_bad_row: OnBadRow = "error",
        bucket_by_length: bool = False,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("accumulate", accumulate)):
            if value < 1:
                raise UserError(f"{name} must be ≥ 1, got {value}")
        self.sources = {"train": train, "validation": validation}
        self.batch_size, self.accumulate, self.workers, self.seed = batch_size, accumulate, workers, seed
        self.max_length, self.on_overlong, self.on_bad_row = max_length, on_overlong, on_bad_row
        self.bucket_by_length = bucket_by_length
        self.tokenizer_name = tokenizer
        self.rows: dict[str, datasets.Dataset] = {}

    def prepare_data(self) -> None:
        """Read and tokenize on one process; `datasets` caches what the others then read."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        if not self.rows:
            self.rows = self._load()

    def _load(self) -> dict[str, datasets.Dataset]:
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        module: Any = self.trainer.lightning_module if self.trainer else None
        anchors = module is not None and module.mixing.anchor == "marginal"
        options = RowOptions(anchors, self.on_bad_row, self.max_length, self.on_overlong, self.workers)
        return {
            name: tokenize_rows(load_rows(source), self.tokenizer, source, options=options)
            for name, source in self.sources.items()
            if source is not None
        }

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's pad id, or any other: padding is masked by lengths and its value has no effect."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)  # type: ignore[call-overload,no-any-return]

    def sampler(self) -> StepSampler:
        """The training rows' order and cut, for this rank."""
        rows = self.rows["train"]
        trainer = self.trainer
        lengths = rows["length"][:] if self.bucket_by_length else None
        return StepSampler(
            len(rows),
            self.batch_size,
            self.accumulate,
            self.seed,
            rank=trainer.global_rank if trainer else 0,
            ranks=trainer.world_size if trainer else 1,
            lengths=lengths,
        )

    def train_dataloader(self) -> PairLoader:
        return PairLoader(Microbatches(self.rows["train"], self.pad_token_id), self.sampler(), self.workers)

    def val_dataloader(self) -> list[PairLoader]:
        if "validation" not in self.rows:
            return []
        rows = self.rows["validation"]
        return [PairLoader(Microbatches(rows, self.pad_token_id), _InOrder(len(rows), self.batch_size), self.workers)]


class _InOrder(StepSampler):
    """Every row once, as they stand."""

    def _epoch(self) -> Iterator[Microbatch]:
        for first in range(0, self.rows, self.batch_size):
            rows = list(range(first, min(first + self.batch_size, self.rows)))
            yield Microbatch(rows, len(rows), closes_step=True)
