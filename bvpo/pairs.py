"""Rows → token ids → batches. What a model is trained on are the ids that it was sampled with.

A row gives one prompt with four completions: chosen and rejected, with a trace and with the empty trace. Prompt and
completion are tokenized apart, each once: together, a token could span their border. Masks come from lengths, never
from the pad token, which is also the EOS in some families.

Shapes: B rows, S = 2B sequences (the chosen ones, then the rejected ones), T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bvpo.errors import UserError
from bvpo.traces import QWEN3, Response, ThinkFormat, answer_of, join, split

BUILTIN = {"builtin:tiny_reasoner": Path(__file__).parent / "assets" / "tiny_reasoner_pairs.parquet"}
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "empty_prompt", "empty_chosen", "empty_rejected")
Branch = Literal["trace", "empty"]
BRANCHES: tuple[Branch, ...] = ("trace", "empty")


class SequenceBatch(NamedTuple):
    """The chosen and rejected sequences of one branch, padded on the right.

    A named tuple, as `PairBatch` is: Lightning and torch then move, pin and convert it without code of ours.

    Attributes:
        input_ids: (S, T) int64.
        prompt_lengths, lengths: (S,) tokens of the prompt, and of prompt and completion.
        step_pairs: Pairs of this branch in the whole optimizer batch, over microbatches and ranks: the loss's divisor.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    step_pairs: int

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
        return SequenceBatch(ids, self.prompt_lengths[index], lengths, self.step_pairs)


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


class PairBatch(NamedTuple):
    """One microbatch: the same rows in both branches.

    Attributes:
        trace, empty: The two estimators' sequences.
        prompts: (B,) int64 keys of the prompts.
        closes_step: Whether the optimizer steps after this microbatch.
        anchors: The marginal anchor's sequences, where it is asked for.
    """

    trace: SequenceBatch
    empty: SequenceBatch
    prompts: Tensor
    closes_step: bool = True
    anchors: AnchorBatch | None = None


def load_rows(source: str) -> datasets.Dataset:
    """The rows of a JSONL or Parquet file, a built-in set, or a Hub data set (its `train` split).

    Raises:
        UserError: The source does not exist, cannot be read, is empty, or lacks a column.
    """
    path = BUILTIN.get(source, Path(source))
    if path.suffix in (".json", ".jsonl", ".parquet"):
        if not path.is_file():
            raise UserError(f"{source}: there is no such file; give a JSONL or Parquet file, a Hub id, or {_builtin()}")
        if path.stat().st_size == 0:
            raise UserError(f"{source}: the file is empty; expected one row a prompt")
        kind, where = ("parquet" if path.suffix == ".parquet" else "json"), {"data_files": str(path)}
    elif path.exists() or source.startswith(("builtin:", ".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: not a data set; give a .jsonl or .parquet file, a Hub id, or {_builtin()}")
    else:
        kind, where = source, {}
    try:
        rows = cast(datasets.Dataset, datasets.load_dataset(kind, split="train", **where))
    except Exception as error:  # datasets raises whatever its reader, the network or Arrow raises
        if "corresponds to no data" in str(error):
            raise UserError(f"{source}: no rows; expected one row a prompt") from error
        raise UserError(f"{source}: cannot be read as {kind}: {_first_line(error)}") from error
    missing = [name for name in TEXT_COLUMNS if name not in rows.column_names]
    if missing:
        raise UserError(
            f"{source}: no column {', '.join(missing)}; it has {', '.join(rows.column_names)}. "
            f"A row needs {', '.join(TEXT_COLUMNS)}"
        )
    if len(rows) == 0:
        raise UserError(f"{source}: no rows; expected one row a prompt")
    return rows


def _builtin() -> str:
    return ", ".join(BUILTIN)


def _first_line(error: BaseException) -> str:
    root = error.__cause__ or error
    text = str(root).strip()
    return text.splitlines()[0] if text else type(root).__name__


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids that generation starts from: BOS exactly once where the tokenizer adds one, and never an EOS."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and list(tokenizer("").input_ids)[:1] == [bos]
    return [cast(int, bos), *ids] if adds_bos and ids[:1] != [bos] else ids


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a completion, with nothing added: the text itself ends in the EOS."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def tokenize_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Six id lists and the prompt's key: the columns of a tokenized data set."""
    tokenized: dict[str, Any] = {
        name: (encode_prompt if name.endswith("prompt") else encode_completion)(tokenizer, row[name])
        for name in TEXT_COLUMNS
    }
    tokenized["prompt_key"] = prompt_key(str(row.get("prompt_id") or row["prompt"]))
    return tokenized


def tokenize_anchors(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, think: ThinkFormat = QWEN3
) -> dict[str, Any]:
    """A trace pair's answers with several traces each: completions in ids, and log q of their traces.

    `anchor_traces`, drawn independently of the pair, serve both sides. Without them the `trace_candidates` that give
    a side's own answer serve that side: they are posterior draws, and log q is empty.

    Raises:
        UserError: The row has neither, or its close tag is no border between tokens.
    """
    drawn = row.get("anchor_traces")
    candidates = drawn if drawn is not None else row.get("trace_candidates")
    if not candidates:
        raise UserError(f"{where}: the marginal anchor needs anchor_traces (or trace_candidates), and the row has none")
    anchors: dict[str, Any] = {"anchor_log_q": [float(c["logprob"]) for c in candidates] if drawn is not None else []}
    for side in ("chosen", "rejected"):
        own = split(row[side], think)
        whole = encode_completion(tokenizer, row[side])
        head = encode_completion(tokenizer, join(replace(own, answer=""), think))
        if not own.closed or whole[: len(head)] != head:
            raise UserError(
                f"{where}: field {side}: the trace's end is no border between tokens, so no anchor is possible"
            )
        answer = whole[len(head) :]
        wanted = answer_of(row[side].removesuffix(str(tokenizer.eos_token)), "thinking", think)
        traces = [c["trace"] for c in candidates if drawn is not None or c["answer"].strip() == wanted]
        heads = [join(Response(trace, "", own.opened, closed=True), think) for trace in traces or [own.trace]]
        anchors[f"anchor_{side}"] = [encode_completion(tokenizer, text) + answer for text in heads]
    return anchors


def prompt_key(prompt_id: str) -> int:
    """A 63-bit key of a prompt, the same in every process."""
    return int.from_bytes(hashlib.blake2b(prompt_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming file, row and field, where a row is no pair of pairs."""
    for name in TEXT_COLUMNS:
        value = row[name]
        if not isinstance(value, str) or not value:
            found = "nothing" if value is None or value == "" else f"{type(value).__name__} {str(value)[:40]!r}"
            raise UserError(f"{where}: field {name}: expected text, found {found}")
    for chosen, rejected in (("chosen", "rejected"), ("empty_chosen", "empty_rejected")):
        if row[chosen] == row[rejected]:
            raise UserError(f"{where}: {chosen} equals {rejected}: a pair needs two different completions")


def tokenize_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, source: str, anchors: bool = False
) -> datasets.Dataset:
    """Check and tokenize every row, with its anchor traces if asked. Raises UserError at the first bad one."""

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{source}, row {index + 1}"
        check_row(row, where)
        tokenized = tokenize_row(row, tokenizer)
        for name in TEXT_COLUMNS:
            if not tokenized[name]:
                raise UserError(f"{where}: field {name} has no tokens")
        return tokenized | (tokenize_anchors(row, tokenizer, where) if anchors else {})

    return rows.map(tokenize, with_indices=True, remove_columns=rows.column_names, desc=f"tokenizing {source}")


def longest(row: Mapping[str, Any]) -> int:
    """Tokens of a tokenized row's longest sequence."""
    return max(
        len(row[prefix + "prompt"]) + len(row[prefix + side])
        for prefix in ("", "empty_")
        for side in ("chosen", "rejected")
    )


def collate(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, step_pairs: int | None = None, closes_step: bool = True
) -> PairBatch:
    """A batch of tokenized rows; `step_pairs` defaults to the rows given."""
    pairs = len(rows) if step_pairs is None else step_pairs
    return PairBatch(
        trace=_pad(rows, "", pad_token_id, pairs),
        empty=_pad(rows, "empty_", pad_token_id, pairs),
        prompts=torch.tensor([row["prompt_key"] for row in rows]),
        closes_step=closes_step,
        anchors=_anchors(rows, pad_token_id, pairs) if "anchor_chosen" in rows[0] else None,
    )


def _anchors(rows: Sequence[Mapping[str, Any]], pad_token_id: int, step_pairs: int) -> AnchorBatch:
    sequences, completion, log_q = [], [], []
    for offset, side in ((0, "anchor_chosen"), (len(rows), "anchor_rejected")):
        for index, row in enumerate(rows):
            sequences += [(row["prompt"], ids) for ids in row[side]]
            completion += [offset + index] * len(row[side])
            log_q += row["anchor_log_q"]
    drawn = torch.tensor(log_q, dtype=torch.float64) if log_q else None
    return AnchorBatch(_padded(sequences, pad_token_id, step_pairs), torch.tensor(completion), drawn)


def _pad(rows: Sequence[Mapping[str, Any]], prefix: str, pad_token_id: int, step_pairs: int) -> SequenceBatch:
    sides = ("chosen", "rejected")
    sequences = [(row[prefix + "prompt"], row[prefix + side]) for side in sides for row in rows]
    return _padded(sequences, pad_token_id, step_pairs)


def _padded(sequences: Sequence[tuple[list[int], list[int]]], pad_token_id: int, step_pairs: int) -> SequenceBatch:
    """Sequences of prompt and completion ids, padded on the right."""
    joined = [torch.tensor(prompt + completion) for prompt, completion in sequences]
    return SequenceBatch(
        torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=pad_token_id),
        torch.tensor([len(prompt) for prompt, _ in sequences]),
        torch.tensor([len(ids) for ids in joined]),
        step_pairs,
    )
