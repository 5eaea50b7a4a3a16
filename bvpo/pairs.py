"""Rows → token ids → batches. What a model is trained on are the ids that it was sampled with.

A row gives one prompt with four completions: chosen and rejected, with a trace and with the empty trace. Prompt and
completion are tokenized apart, each once: together, a token could span their border. Masks come from lengths, never
from the pad token, which is also the EOS in some families.

A row that cannot be trained on is refused, or by `RowOptions` dropped or cut, and then counted.

Shapes: B rows, S = 2B sequences (the chosen ones, then the rejected ones), T tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import datasets
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bvpo import __version__
from bvpo.errors import UserError
from bvpo.rows import TEXT_COLUMNS, check_row, to_text
from bvpo.rows import load_rows as load_rows  # both halves of the way from a file to ids, under one name
from bvpo.traces import QWEN3, Response, ThinkFormat, answer_of, check_template, join, split, starts_with_bos

Branch = Literal["trace", "empty"]
BRANCHES: tuple[Branch, ...] = ("trace", "empty")
OnBadRow = Literal["error", "drop"]
OnOverlong = Literal["error", "drop", "truncate_prompt", "truncate_trace"]
SEQUENCES = {
    f"{branch} {side}": (prefix + "prompt", prefix + side)
    for branch, prefix in (("trace", ""), ("empty", "empty_"))
    for side in ("chosen", "rejected")
}
IDS, NUMBER = datasets.List(datasets.Value("int32")), datasets.Value("int64")
COLUMNS = dict.fromkeys(TEXT_COLUMNS, IDS) | {
    "prompt_key": NUMBER,
    "length": NUMBER,  # of the longest sequence, as it is trained on
    "lengths": IDS,  # of the four sequences, before any cut
    "problem": datasets.Value("string"),
    "endless": datasets.Value("bool"),  # a completion does not end in the EOS
}
ANCHOR_COLUMNS = {
    "anchor_log_q": datasets.List(datasets.Value("float64")),
    "anchor_chosen": datasets.List(IDS),
    "anchor_rejected": datasets.List(IDS),
}
LARGE = 5_000  # rows from which on further processes earn their start
CODE = hashlib.sha256(  # what made a cached row: another code makes it anew
    b"".join(Path(__file__).with_name(name).read_bytes() for name in ("pairs.py", "rows.py", "traces.py"))
).hexdigest()


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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids that generation starts from: BOS exactly once where generation has one, and never an EOS."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    bos = cast(int, tokenizer.bos_token_id)
    return [bos, *ids] if starts_with_bos(tokenizer) and ids[:1] != [bos] else ids


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


@dataclass(frozen=True)
class RowOptions:
    """What happens to rows that cannot be trained on as they are. See `PairData`.

    Args:
        anchors: Whether each row needs traces for the marginal anchor.
        on_bad_row: A row that is no pair of pairs.
        max_length: Tokens of prompt and completion that a sequence may have.
        on_overlong: A row with a longer sequence.
        workers: Processes that tokenize, where the data set is large.
    """

    anchors: bool = False
    on_bad_row: OnBadRow = "error"
    max_length: int | None = None
    on_overlong: OnOverlong = "error"
    workers: int = 0

    @property
    def cut_to(self) -> int | None:
        """The length that rows are cut to; None where they are left as they are."""
        return self.max_length if self.on_overlong.startswith("truncate") else None


def tokenize_rows(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    anchors: bool = False,
    options: RowOptions | None = None,
) -> datasets.Dataset:
    """Check and tokenize every row, cached by content; then refuse or drop, and count, what is bad or too long."""
    options = options or RowOptions(anchors)
    if "template_sha" in rows.column_names and tokenizer.chat_template:
        try:
            check_template(rows["template_sha"], tokenizer, source)
        except UserError as error:  # the rows hold rendered text, so what they were sampled from is what is trained on
            rank_zero_warn(str(error))
    cut = {"anchors": options.anchors, "cut_to": options.cut_to, "how": options.on_overlong if options.cut_to else ""}
    key = json.dumps([rows._fingerprint, fingerprint(tokenizer), CODE, __version__, cut])
    tokenized = rows.map(
        prepare_row,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "source": source, **cut},
        remove_columns=rows.column_names,
        features=datasets.Features(COLUMNS | (ANCHOR_COLUMNS if options.anchors else {})),
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
        num_proc=options.workers if options.workers > 1 and len(rows) >= LARGE else None,
        writer_batch_size=100,  # rows held in memory, each of up to some hundred thousand ids
        desc=f"tokenizing {source}",
    )
    return _select(tokenized, source, options).remove_columns(["problem", "lengths", "endless"])


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text gets, the same in every process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    adds = list(tokenizer("").input_ids)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    parts = [vocabulary, adds, tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def prepare_row(
    row: Mapping[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    anchors: bool,
    cut_to: int | None,
    how: str,
) -> dict[str, Any]:
    """A tokenized row, or a row without ids whose `problem` says why: a map over rows goes on to the end."""
    where = f"{source}, row {index + 1}"
    empty: dict[str, Any] = {name: [] for name in COLUMNS | (ANCHOR_COLUMNS if anchors else {})}
    empty |= {"prompt_key": 0, "length": 0, "problem": None, "endless": False}
    try:
        text = to_text(row, where, tokenizer)
        check_row(text, where, str(tokenizer.eos_token or ""))
        tokenized = tokenize_row(text, tokenizer)
        check_ids(tokenized, where, tokenizer)
        tokenized["endless"] = any(tokenized[name][-1] != tokenizer.eos_token_id for _, name in SEQUENCES.values())
        tokenized["lengths"] = sequence_lengths(tokenized)
        if cut_to is not None and max(tokenized["lengths"]) > cut_to:
            shorten(tokenized, text, where, tokenizer, cut_to, how)
        tokenized["length"] = longest(tokenized)
        return empty | tokenized | (tokenize_anchors(text, tokenizer, where) if anchors else {})
    except UserError as error:
        return empty | {"problem": str(error).removeprefix(f"{where}: ")}


def check_ids(tokenized: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where BOS or EOS stand where a model that samples puts none."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    for name in TEXT_COLUMNS:
        ids = tokenized[name]
        if not ids:
            raise UserError(f"{where}: field {name} has no tokens")
        if name.endswith("prompt"):
            if bos != eos and starts_with_bos(tokenizer) and bos in ids[1:]:
                raise UserError(
                    f"{where}: field {name}: {tokenizer.bos_token} stands inside (token {ids.index(bos, 1) + 1} of "
                    f"{len(ids)}); the tokenizer puts it in front, leave it out of the text"
                )
        elif eos in ids[:-1]:
            raise UserError(
                f"{where}: field {name}: the EOS {tokenizer.eos_token} comes before the end (token "
                f"{ids.index(eos) + 1} of {len(ids)}); a model stops there"
            )


def sequence_lengths(row: Mapping[str, Any]) -> list[int]:
    """Tokens of a tokenized row's four sequences, in the order of `SEQUENCES`."""
    return [len(row[prompt]) + len(row[completion]) for prompt, completion in SEQUENCES.values()]


def shorten(
    tokenized: dict[str, Any],
    text: Mapping[str, Any],
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    to: int,
    how: str,
) -> None:
    """Cut a row to `to` tokens a sequence: prompts from the left, behind BOS, or traces at their end.

    Both sides of a pair keep one prompt. Close tag, answer and EOS are never touched.

    Raises:
        UserError: That is not enough: the prompt, or the trace, is shorter than the excess.
    """
    for name, (prompt, completion) in SEQUENCES.items():
        excess = len(tokenized[prompt]) + len(tokenized[completion]) - to
        if excess <= 0:
            continue
        if how == "truncate_prompt":
            first = int(starts_with_bos(tokenizer))
            spare = len(tokenized[prompt]) - first - 1
            ids, column, at = tokenized[prompt], prompt, first
        else:
            start, end = _trace_span(tokenized[completion], text[completion], tokenizer)
            spare, ids, column, at = end - start - 1, tokenized[completion], completion, end - excess
        if excess > spare:
            raise UserError(
                f"{where}: field {column}: {how} cannot bring {name} to {to} tokens ({excess} too many, "
                f"{max(spare, 0)} may be cut)"
            )
        tokenized[column] = ids[:at] + ids[at + excess :]


def _trace_span(
    ids: list[int], completion: str, tokenizer: PreTrainedTokenizerBase, think: ThinkFormat = QWEN3
) -> tuple[int, int]:
    """Where a trace's tokens begin and end; (0, 0) where there is none, or its ends are no borders between tokens."""
    own = split(completion, think)
    heads = [join(replace(own, trace=trace, answer="", closed=False), think) for trace in ("", own.trace)]
    opening, whole = (encode_completion(tokenizer, head) for head in heads)
    if not own.closed or ids[: len(opening)] != opening or ids[: len(whole)] != whole:
        return 0, 0
    return len(opening), len(whole)


def _select(tokenized: datasets.Dataset, source: str, options: RowOptions) -> datasets.Dataset:
    """The rows to train on. Whatever is left out, cut or repeated is counted and shown."""
    facts = tokenized.select_columns(["problem", "lengths", "length", "prompt_key", "endless"])[:]
    total, limit = len(tokenized), options.max_length or math.inf
    bad = {index: problem for index, problem in enumerate(facts["problem"]) if problem}
    if bad:
        first, problem = next(iter(bad.items()))
        if options.on_bad_row == "error" or len(bad) == total:
            hint = "" if len(bad) == 1 else f" ({len(bad)} of {total} rows are no pairs: {count_reasons(bad)})"
            remedy = "; set on_bad_row to drop to go on without" if len(bad) < total else ""
            raise UserError(f"{source}, row {first + 1}: {problem}{hint}{remedy}")
        rank_zero_warn(f"{source}: dropped {len(bad)} of {total} rows that are no pairs: {count_reasons(bad)}")
    over = {index for index, lengths in enumerate(facts["lengths"]) if index not in bad and max(lengths) > limit}
    sides = ", ".join(
        f"{name} {sum(facts['lengths'][index][side] > limit for index in over)}" for side, name in enumerate(SEQUENCES)
    )
    if over and options.on_overlong == "error":
        first = min(over)
        raise UserError(
            f"{source}, row {first + 1}: longest sequence has {facts['length'][first]} tokens, max_length is {limit} "
            f"({len(over)} of {total} rows are longer: {sides}): raise it, or set on_overlong to drop, "
            "truncate_prompt or truncate_trace"
        )
    dropped = over if options.on_overlong == "drop" else set()
    kept = [index for index in range(total) if index not in bad and index not in dropped]
    if not kept:
        raise UserError(f"{source}: all {total} rows are longer than max_length = {limit} tokens, or bad ({sides})")
    if over:
        done = "dropped" if dropped else f"cut by {options.on_overlong}"
        rank_zero_warn(f"{source}: {done} {len(over)} of {total} rows longer than {limit} tokens ({sides})")
    endless = [index for index in kept if facts["endless"][index]]
    if endless:  # an EOS is never added: where a completion was cut off it would be a lie
        rank_zero_warn(
            f"{source}: {len(endless)} of {len(kept)} rows (the first is row {endless[0] + 1}) have a completion "
            "without the tokenizer's EOS at its end: they are trained on as they are, and teach the policy no end"
        )
    repeated = len(kept) - len({facts["prompt_key"][index] for index in kept})
    if repeated:
        rank_zero_warn(f"{source}: {repeated} of {len(kept)} rows repeat another row's prompt; they are kept")
    return tokenized if len(kept) == total else tokenized.select(kept)


def count_reasons(bad: Mapping[int, str]) -> str:
    """Reasons by frequency, each with its first row numbers. What was found in one row is no part of a reason."""
    reasons: dict[str, list[int]] = {}
    for index, problem in bad.items():
        reasons.setdefault(re.split(r", found | \(", problem)[0], []).append(index + 1)
    by_count = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return "; ".join(
        f"{len(rows)} × {reason} (row {', '.join(map(str, rows[:3]))}{', …' if len(rows) > 3 else ''})"
        for reason, rows in by_count
    )


def longest(row: Mapping[str, Any]) -> int:
    """Tokens of a tokenized row's longest sequence."""
    return max(sequence_lengths(row))


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
