"""Rows → token ids. What a model is trained on are the ids that it was sampled with.

A row gives one prompt with four completions: chosen and rejected, with a trace and with the empty trace. Prompt and
completion are tokenized apart: together, a token could span their border. Only where a tokenizer puts a space in front
of every text (SentencePiece), a completion's ids are those that it has behind its prompt. Masks come from lengths,
never from the pad token, which is also the EOS in some families.

A row that cannot be trained on is refused, or by `RowOptions` dropped or cut, and then counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import datasets
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from bvpo import __version__
from bvpo.batches import BRANCHES, PREFIX, has_branch
from bvpo.errors import UserError
from bvpo.reading import TEXT_COLUMNS, cache_errors
from bvpo.reading import load_rows as load_rows  # both halves of the way from a file to ids, under one name
from bvpo.rows import check_row, prefixes_without_prompt, to_text, without_stop
from bvpo.selection import SEQUENCES, RowOptions, select_rows
from bvpo.traces import (
    QWEN3,
    Response,
    ThinkFormat,
    answer_of,
    check_template,
    join,
    own_stops,
    split,
    starts_with_bos,
    template_fingerprint,
)

IDS, NUMBER = datasets.List(datasets.Value("int32")), datasets.Value("int64")
COLUMNS = dict.fromkeys(TEXT_COLUMNS, IDS) | {
    "prompt_key": NUMBER,
    "length": NUMBER,  # of the longest sequence, as it is trained on
    "lengths": IDS,  # of the four sequences, and of the anchor's longest, before any cut; 0 where there is none
    "problem": datasets.Value("string"),
    "endless": datasets.Value("bool"),  # a completion does not end in the EOS
    "guessed": datasets.Value("bool"),  # the prompt was taken from what chosen and rejected share
}
ANCHOR_COLUMNS = {
    "anchor_log_q": datasets.List(datasets.Value("float64")),
    "anchor_chosen": datasets.List(IDS),
    "anchor_rejected": datasets.List(IDS),
}
LARGE = 5_000  # rows from which on further processes earn their start
SOURCES = ("batches", "pairs", "reading", "rows", "traces")  # what made a cached row: another code makes it anew
CODE = hashlib.sha256(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in SOURCES)).hexdigest()
NEIGHBOURS = ("\n", ".")  # texts that most others can stand behind without a token across the border


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids that generation starts from: BOS exactly once where generation has one, and never an EOS."""
    ids = _ids(tokenizer, text)
    bos = cast(int, tokenizer.bos_token_id)
    return [bos, *ids] if starts_with_bos(tokenizer) and ids[:1] != [bos] else ids


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str, prompt: str = NEIGHBOURS[0]) -> list[int]:
    """The ids of a completion, with nothing added: the text itself ends in the EOS.

    Args:
        prompt: The text in front of it. It matters only to tokenizers that put a space, which nobody wrote, in front of
            what they are given.
    """
    if adds_space(tokenizer):
        for before in (prompt, *NEIGHBOURS):
            if ids := _ids_behind(tokenizer, before, text):
                return ids
    return _ids(tokenizer, text)


def decode_completion(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt: str) -> str:
    """The text of a completion's ids behind the prompt that they were sampled from.

    Alone, a space in front of it would be taken for the one that the tokenizer puts there, and be lost.
    """

    def decode(ids: Sequence[int]) -> str:
        return cast(str, tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    if not adds_space(tokenizer):
        return decode(ids)
    before = encode_prompt(tokenizer, prompt)
    return decode([*before, *ids])[len(decode(before)) :]


@lru_cache(maxsize=8)
def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has other ids alone than behind another: `▁a` and `a`, as SentencePiece has it by default."""
    return any(_ids_behind(tokenizer, before, "a") not in ([], _ids(tokenizer, "a")) for before in NEIGHBOURS)


def _ids_behind(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """The ids of a text behind another one; [] where a token lies across their border."""
    head, whole = _ids(tokenizer, before), _ids(tokenizer, before + text)
    return whole[len(head) :] if whole[: len(head)] == head else []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def tokenize_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Six id lists and the prompt's key: the columns of a tokenized data set. A pair that is not there has no ids."""
    tokenized: dict[str, Any] = {name: [] for name in TEXT_COLUMNS}
    for branch in BRANCHES:
        if has_branch(row, branch):
            prompt, *sides = (PREFIX[branch] + name for name in ("prompt", "chosen", "rejected"))
            tokenized[prompt] = encode_prompt(tokenizer, row[prompt])
            tokenized |= {side: encode_completion(tokenizer, row[side], row[prompt]) for side in sides}
    tokenized["prompt_key"] = prompt_key(str(row.get("prompt_id") or row.get("prompt") or row["empty_prompt"]))
    return tokenized


def tokenize_anchors(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    think: ThinkFormat = QWEN3,
    stops: Sequence[str] = (),
) -> dict[str, Any]:
    """A trace pair's answers with several traces each: completions in ids, and log q of their traces.

    `anchor_traces`, drawn independently of the pair, serve both sides. Without them the `trace_candidates` that give
    a side's own answer serve that side: they are posterior draws, and log q is empty.

    Raises:
        UserError: The row has neither, or its close tag is no border between tokens.
    """
    if "anchor_traces" in row and row["anchor_traces"] is None and has_branch(row, "trace"):
        raise UserError(f"{where}: field anchor_traces: expected traces, as in other rows of this file, found nothing")
    drawn = row.get("anchor_traces")
    candidates = drawn if drawn is not None else row.get("trace_candidates")
    if not candidates:
        raise UserError(f"{where}: the marginal anchor needs anchor_traces (or trace_candidates), and the row has none")
    anchors: dict[str, Any] = {"anchor_log_q": [float(c["logprob"]) for c in candidates] if drawn is not None else []}
    prompt = row["prompt"]
    for side in ("chosen", "rejected"):
        own = split(row[side], think)
        whole = encode_completion(tokenizer, row[side], prompt)
        head = encode_completion(tokenizer, join(replace(own, answer=""), think), prompt)
        if not own.closed or whole[: len(head)] != head:
            raise UserError(
                f"{where}: field {side}: the trace's end is no border between tokens, so no anchor is possible"
            )
        answer = whole[len(head) :]
        wanted = answer_of(without_stop(row[side], stops or own_stops(tokenizer)), "thinking", think)
        same = [c for c in candidates if drawn is not None or (c.get("answer") or "").strip() == wanted]
        traces = [c["trace"] for c in same if c.get("trace") is not None]
        heads = [join(replace(own, trace=trace, answer=""), think) for trace in traces or [own.trace]]
        anchors[f"anchor_{side}"] = [encode_completion(tokenizer, text, prompt) + answer for text in heads]
    return anchors


def prompt_key(prompt_id: str) -> int:
    """A 63-bit key of a prompt, the same in every process."""
    return int.from_bytes(hashlib.blake2b(prompt_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def tokenize_rows(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    options: RowOptions = RowOptions(),
) -> datasets.Dataset:
    """Check and tokenize every row, cached by content; then refuse or drop, and count, what is bad or too long."""
    if isinstance(rows.features.get("template_sha"), datasets.Value) and tokenizer.chat_template:
        try:
            if set(rows.unique("template_sha")) - {None, template_fingerprint(tokenizer)}:
                check_template(rows["template_sha"], tokenizer, source)
        except UserError as error:  # the rows hold rendered text, so what they were sampled from is what is trained on
            rank_zero_warn(str(error))
    tokenized = prepare_rows(rows, tokenizer, source, options)
    return select_rows(tokenized, source, options).remove_columns(["problem", "endless", "guessed"])


def prepare_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, source: str, options: RowOptions
) -> datasets.Dataset:
    """Every row tokenized, bad ones with their problem; cached by all that decides what a tokenized row holds."""
    if not options.stops:
        options = replace(options, stops=own_stops(tokenizer))
    key = json.dumps([rows._fingerprint, fingerprint(tokenizer), CODE, __version__, options.content])
    with cache_errors(source):
        return rows.map(
            prepare_row,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "source": source, "options": options},
            remove_columns=rows.column_names,
            features=datasets.Features(COLUMNS | (ANCHOR_COLUMNS if options.anchors else {})),
            new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
            num_proc=options.workers if options.workers > 1 and len(rows) >= LARGE else None,
            writer_batch_size=100,  # rows held in memory, each of up to some hundred thousand ids
            desc=f"tokenizing {source}",
        )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text gets, the same in every process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    adds = list(tokenizer("").input_ids)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    parts = [vocabulary, adds, tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def prepare_row(
    row: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, source: str, options: RowOptions
) -> dict[str, Any]:
    """A tokenized row, or a row without ids whose `problem` says why: a map over rows goes on to the end."""
    where, think, stops = f"{source}, row {index + 1}", options.think, options.stops
    empty: dict[str, Any] = {name: [] for name in COLUMNS | (ANCHOR_COLUMNS if options.anchors else {})}
    empty |= {"prompt_key": 0, "length": 0, "problem": None, "endless": False, "guessed": False}
    try:
        text = to_text(row, where, tokenizer, think, stops)
        check_row(text, where, stops, think, one_sided=options.on_one_sided == "keep")
        tokenized = empty | tokenize_row(text, tokenizer) | {"guessed": bool(prefixes_without_prompt(row))}
        ends = {cast(int, tokenizer.convert_tokens_to_ids(stop)) for stop in stops}
        check_ids(tokenized, where, tokenizer, ends)
        completions = [tokenized[name] for _, name in SEQUENCES.values() if tokenized[name]]
        tokenized["endless"] = any(ids[-1] not in ends for ids in completions)
        if options.anchors and has_branch(tokenized, "trace"):
            tokenized |= tokenize_anchors(text, tokenizer, where, think, stops)
        tokenized["lengths"] = [*sequence_lengths(tokenized), longest_anchor(tokenized)]
        if options.cut_to is not None and max(tokenized["lengths"]) > options.cut_to:
            shorten(tokenized, text, where, tokenizer, options)
        tokenized["length"] = max(sequence_lengths(tokenized))
        return tokenized
    except UserError as error:
        return empty | {"problem": str(error).removeprefix(f"{where}: ")}


def check_ids(tokenized: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
    """Raises UserError where BOS or an id that ends a completion stand where a model that samples puts none."""
    bos = tokenizer.bos_token_id
    for name in (prefix + name for prefix in own_prefixes(tokenized) for name in ("prompt", "chosen", "rejected")):
        ids = tokenized[name]
        if not ids:
            raise UserError(f"{where}: field {name} has no tokens")
        if name.endswith("prompt"):
            if bos not in ends and starts_with_bos(tokenizer) and bos in ids[1:]:
                raise UserError(
                    f"{where}: field {name}: {tokenizer.bos_token} stands inside (token {ids.index(bos, 1) + 1} of "
                    f"{len(ids)}); the tokenizer puts it in front, leave it out of the text"
                )
        elif ends & set(ids[:-1]):
            first = next(index for index, token in enumerate(ids) if token in ends)
            raise UserError(
                f"{where}: field {name}: the EOS {tokenizer.decode([ids[first]])} comes before the end (token "
                f"{first + 1} of {len(ids)}); a model stops there"
            )


def own_prefixes(tokenized: Mapping[str, Any]) -> list[str]:
    """The column prefixes of the pairs that a tokenized row has."""
    return [PREFIX[branch] for branch in BRANCHES if has_branch(tokenized, branch)]


def sequence_lengths(row: Mapping[str, Any]) -> list[int]:
    """Tokens of a tokenized row's four sequences, in the order of `SEQUENCES`."""
    return [len(row[prompt]) + len(row[completion]) for prompt, completion in SEQUENCES.values()]


def longest_anchor(row: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence that the marginal anchor takes from a tokenized row; 0 where there is none."""
    anchors = [*row.get("anchor_chosen", ()), *row.get("anchor_rejected", ())]
    return len(row["prompt"]) + max(map(len, anchors)) if anchors else 0


def shorten(
    tokenized: dict[str, Any],
    text: Mapping[str, Any],
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
) -> None:
    """Cut a row to `max_length` tokens a sequence: prompts from the left, behind BOS, or traces at their end.

    Both sides of a pair keep one prompt. Close tag, answer and EOS are never touched, and neither are anchor traces:
    cut ones are no draws from q.

    Raises:
        UserError: That is not enough: the prompt, or the trace, is shorter than the excess.
    """
    to, how = options.max_length or 0, options.on_overlong
    for name, (prompt, completion) in SEQUENCES.items():
        excess = len(tokenized[prompt]) + len(tokenized[completion]) - to
        if excess <= 0:
            continue
        if how == "truncate_prompt":
            first = int(starts_with_bos(tokenizer))
            spare = len(tokenized[prompt]) - first - 1
            ids, column, at = tokenized[prompt], prompt, first
        else:
            own = split(text[completion], options.think)
            start, end = _trace_span(tokenized[completion], own, text[prompt], tokenizer, options.think)
            spare, ids, column, at = end - start - 1, tokenized[completion], completion, end - excess
        if excess > spare:
            raise UserError(
                f"{where}: field {column}: {how} cannot bring {name} to {to} tokens ({excess} too many, "
                f"{max(spare, 0)} may be cut)"
            )
        tokenized[column] = ids[:at] + ids[at + excess :]
    if longest_anchor(tokenized) > to:
        raise UserError(f"{where}: field anchor_traces: one has {longest_anchor(tokenized)} tokens with its prompt")


def _trace_span(
    ids: list[int], own: Response, prompt: str, tokenizer: PreTrainedTokenizerBase, think: ThinkFormat
) -> tuple[int, int]:
    """Where a trace's tokens begin and end; (0, 0) where there is none, or its ends are no borders between tokens."""
    heads = [join(replace(own, trace=trace, answer="", closed=False), think) for trace in ("", own.trace)]
    opening, whole = (encode_completion(tokenizer, head, prompt) for head in heads)
    if not own.closed or ids[: len(opening)] != opening or ids[: len(whole)] != whole:
        return 0, 0
    return len(opening), len(whole)
