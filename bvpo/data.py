"""The paired batches as a LightningDataModule: rows are read, tokenized, drawn, and padded a microbatch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import lightning as L
from torch.utils.data import DataLoader, Dataset

from bvpo.batches import PairBatch, collate
from bvpo.errors import UserError
from bvpo.order import InOrder, Microbatch, StepSampler
from bvpo.pairs import load_rows, tokenize_rows
from bvpo.policy import load_tokenizer, stop_tokens
from bvpo.selection import OnBadRow, OnOneSided, OnOverlong, RowOptions
from bvpo.traces import ThinkFormat, think_format


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
        return {"epoch": self.order.epoch, "served": self.order.served, **self.order.cut}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises UserError where rows are drawn or cut otherwise than when the state was taken."""
        cut = self.order.cut
        if found := [f"{name} {state[name]} → {cut[name]}" for name in cut if state.get(name, cut[name]) != cut[name]]:
            raise UserError(
                f"the checkpoint's optimizer batches were cut otherwise ({', '.join(found)}), and rows would be "
                "repeated or left out: a run goes on with the rows, seed_everything, data.rows_together, "
                "data.bucket_by_length, data.batch_size, model.accumulate and processes that it was started with"
            )
        self.order.epoch, self.order.served = state["epoch"], state["served"]


class PairData(L.LightningDataModule):
    """Trace pairs and empty-trace pairs of the same prompts.

    Args:
        train: Rows to train on: a JSONL or Parquet file, a Hub data set id, or `builtin:tiny_reasoner`.
        validation: Rows whose losses and margins are logged, from the same kinds of source.
        batch_size: Rows of a microbatch on a rank. A row holds four completions.
        accumulate: Microbatches of an optimizer step on a rank; taken from `model.accumulate`.
        tokenizer: Whose tokenizer: a Hub id or folder; taken from `model.policy`.
        max_tokens: Tokens, padding included, that go through the model at once; a microbatch with more is taken in
            parts of similar length. Memory is then bounded whatever the lengths, and a microbatch remains a random draw
            of rows: the statistics' unit. null takes a microbatch at once.
        max_length: Tokens of prompt and completion that a sequence may have; none by default.
        on_overlong: What happens to a row with a longer sequence. `error` refuses it and `drop` leaves it out;
            `truncate_prompt` cuts its prompt's oldest tokens, `truncate_trace` the end of its trace, before the close
            tag. A row that this cannot shorten enough is a bad row. All are counted, by branch and side.
        on_bad_row: What happens to a row that is no pair of pairs: `error` refuses it, `drop` leaves it out and shows
            counts by reason.
        on_one_sided: What happens to a row without a trace pair or without an empty-trace pair: `error` takes it for a
            bad row, `keep` trains each estimator on the rows that have its pair.
        think: How the model marks its traces: qwen3, r1_distill or r1_0528, or the fields of a format of its own.
        bucket_by_length: Sort the rows inside an optimizer batch by length: less padding. A microbatch is then no
            random subset, and the whole optimizer step becomes the statistics' unit.
        rows_together: Consecutive rows of the file that are drawn as one and stand in one microbatch, where a prompt
            has several rows; a unit is then a random subset of prompts. Where one of them is dropped, all are.
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
        max_tokens: int | None = None,
        max_length: int | None = None,
        on_overlong: OnOverlong = "error",
        on_bad_row: OnBadRow = "error",
        on_one_sided: OnOneSided = "error",
        think: str | ThinkFormat = "qwen3",
        bucket_by_length: bool = False,
        rows_together: int = 1,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, least, value in (
            ("batch_size", 1, batch_size),
            ("accumulate", 1, accumulate),
            ("max_tokens", 1, max_tokens),
            ("max_length", 1, max_length),
            ("rows_together", 1, rows_together),
            ("workers", 0, workers),
        ):
            if value is not None and value < least:
                raise UserError(f"{name} must be ≥ {least}, got {value}")
        if batch_size % rows_together:
            raise UserError(
                f"batch_size must be a multiple of rows_together, got {batch_size} and {rows_together}: rows of one "
                "prompt stand in one microbatch"
            )
        self.sources = {"train": train, "validation": validation}
        self.batch_size, self.accumulate, self.workers, self.seed = batch_size, accumulate, workers, seed
        self.max_tokens = max_tokens
        self.max_length, self.on_overlong, self.on_bad_row = max_length, on_overlong, on_bad_row
        self.on_one_sided, self.think = on_one_sided, think_format(think)
        self.bucket_by_length, self.rows_together = bucket_by_length, rows_together
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
        return {
            name: tokenize_rows(self.read(source), self.tokenizer, source, self.row_options(anchors, name))
            for name, source in self.sources.items()
            if source is not None
        }

    def read(self, source: str) -> datasets.Dataset:
        """A source's rows, not yet checked."""
        return load_rows(source, one_sided=self.on_one_sided == "keep")

    def attach_reference(self, cached: Mapping[str, datasets.Dataset]) -> None:
        """Rows that have come to know their reference's log-probabilities take the place of those without."""
        self.rows |= cached

    def row_options(self, anchors: bool, name: str = "train") -> RowOptions:
        """What is done with the rows of one of the sources; `anchors` where the marginal anchor is asked for."""
        return RowOptions(
            anchors=anchors and name == "train",  # it measures training steps
            on_bad_row=self.on_bad_row,
            max_length=self.max_length,
            on_overlong=self.on_overlong,
            workers=self.workers,
            think=self.think,
            stops=stop_tokens(self.tokenizer_name, self.tokenizer),
            on_one_sided=self.on_one_sided,
            together=self.rows_together if name == "train" else 1,  # validation rows are not drawn
        )

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
            pairs=_pairs_of(rows) if self.on_one_sided == "keep" else None,
            together=self.rows_together,
        )

    @property
    def total_steps(self) -> float:
        """Optimizer steps until the first of the trainer's limits; inf where a time or a callback alone ends the fit.

        The trainer's own estimate does not know our accumulation.
        """
        trainer: Any = self.trainer
        limits: list[float] = [trainer.max_steps] if trainer.max_steps >= 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            limits.append(self.sampler().steps_in(trainer.max_epochs, trainer.limit_train_batches))
        return min(limits, default=math.inf)

    def train_dataloader(self) -> PairLoader:
        return PairLoader(Microbatches(self.rows["train"], self.pad_token_id), self.sampler(), self.workers)

    def val_dataloader(self) -> list[DataLoader[PairBatch]]:
        if "validation" not in self.rows:
            return []
        rows, trainer = self.rows["validation"], self.trainer
        order = InOrder(
            len(rows),
            self.batch_size,
            _pairs_of(rows),
            rank=trainer.global_rank if trainer else 0,
            ranks=trainer.world_size if trainer else 1,
        )
        batches = Microbatches(rows, self.pad_token_id)
        return [DataLoader(batches, sampler=order, batch_size=None, num_workers=self.workers)]


def _pairs_of(rows: datasets.Dataset) -> list[tuple[bool, bool]]:
    """Whether each tokenized row has a trace pair and an empty-trace pair."""
    return [(lengths[0] > 0, lengths[2] > 0) for lengths in rows["lengths"][:]]
