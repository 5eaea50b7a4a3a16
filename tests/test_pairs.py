"""Completions' ids where a tokenizer puts a space in front of every text: those that they have behind their prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bvpo.pairs import adds_space, decode_completion, encode_completion, encode_prompt, prepare_row, tokenize_row
from bvpo.policy import load_tokenizer
from bvpo.selection import RowOptions
from tests.conftest import EOS
from tests.test_traces import deepseek, template

ROWS = [
    {
        "prompt": f"user: {n} + 1 ?\nassistant:\n",
        "chosen": f"<think>\nI count {n}.\n</think>\n\nIt is {n + 1}.{EOS}",
        "rejected": f"<think>\nI guess {n}.\n</think>\n\nIt is {n + 2}.{EOS}",
        "empty_prompt": f"user: {n} + 1 ?\nassistant:\n<think>\n\n</think>\n\n",
        "empty_chosen": f"It is {n + 1}.{EOS}",
        "empty_rejected": f"No, {n + 2}.{EOS}",
    }
    for n in range(8)
]
SPECIAL = ["<unk>", EOS, "<think>", "</think>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FALLBACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
STRIPPED = decoders.Sequence([*FALLBACK, decoders.Strip(" ", 1, 0)])


def bpe(byte_fallback: bool = True) -> Tokenizer:
    return Tokenizer(models.BPE(unk_token="<unk>" if byte_fallback else None, byte_fallback=byte_fallback))


def trained(backend: Tokenizer, alphabet: list[str] | None = None) -> Tokenizer:
    special = [*SPECIAL, *(BYTES if alphabet is None else [])]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet or [])
    backend.train_from_iterator([text for row in ROWS for text in row.values()] * 20, trainer)
    return backend


def metaspace(scheme: Any) -> Tokenizer:
    backend = bpe()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence(FALLBACK) if scheme == "never" else STRIPPED
    return trained(backend)


def llama2() -> Tokenizer:
    """As transformers converts the tokenizer of Llama 2: the space is put there by the normalizer."""
    backend = bpe()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = STRIPPED
    return trained(backend)


def byte_level(space: bool) -> Tokenizer:
    backend = bpe(byte_fallback=False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    return trained(backend, pre_tokenizers.ByteLevel.alphabet())


ADDING: dict[str, Callable[[], Tokenizer]] = {
    "SentencePiece": lambda: metaspace("first"),
    "SentencePiece behind every special token": lambda: metaspace("always"),
    "Llama 2": llama2,
    "byte level with a space": lambda: byte_level(True),
}
OTHERS = {"SentencePiece": lambda: metaspace("never"), "byte level": lambda: byte_level(False)}


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, unk_token="<unk>", extra_special_tokens=["<think>", "</think>"]
    )


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("name", ADDING)
def test_nobody_s_space_is_not_trained_on(name: str) -> None:
    """`It`, not `▁It`: behind a clean border the ids are those of prompt and completion together, as TRL has them."""
    tokenizer = wrapped(ADDING[name]())
    assert adds_space(tokenizer)
    row = ROWS[0]
    tokenized = tokenize_row(row, tokenizer)
    for prompt, completion in (("prompt", "chosen"), ("prompt", "rejected"), ("empty_prompt", "empty_chosen")):
        together = ids(tokenizer, row[prompt] + row[completion])
        if together[: len(tokenized[prompt])] == tokenized[prompt]:
            assert tokenized[prompt] + tokenized[completion] == together
    assert tokenizer.convert_ids_to_tokens(tokenized["empty_chosen"])[0][0] == "I"
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, row["empty_chosen"]))[0][0] in "▁Ġ"


@pytest.mark.parametrize("name", ADDING)
def test_ids_that_were_sampled_are_kept(name: str) -> None:
    """What `bvpo.sample` asks of a response: do the ids of its text equal those that were sampled?

    Also where its first token holds a space, which decoding would take off the response alone.
    """
    tokenizer = wrapped(ADDING[name]())
    row = ROWS[0]
    for start in ("", " ", "  "):
        sampled = ids(tokenizer, "." + start + row["empty_chosen"])[len(ids(tokenizer, ".")) :]
        text = decode_completion(tokenizer, sampled, row["empty_prompt"])
        assert text == start + row["empty_chosen"]
        assert encode_completion(tokenizer, text, row["empty_prompt"]) == sampled
        assert tokenize_row(row | {"empty_chosen": text}, tokenizer)["empty_chosen"] == sampled


@pytest.mark.parametrize("name", ADDING)
def test_anchors_and_cut_traces_follow(name: str) -> None:
    tokenizer = wrapped(ADDING[name]())
    row = ROWS[0] | {"anchor_traces": [{"trace": "\nI count 0.\n", "logprob": -1.0}]}
    done = prepare_row(row, 0, tokenizer, "", RowOptions(anchors=True, stops=(EOS,)))
    assert done["problem"] is None and done["anchor_chosen"] == [done["chosen"]]
    options = RowOptions(stops=(EOS,), max_length=done["lengths"][0] - 2, on_overlong="truncate_trace")
    cut = prepare_row(ROWS[0], 0, tokenizer, "", options)
    at = done["chosen"].index(tokenizer.convert_tokens_to_ids("</think>"))
    assert cut["problem"] is None and cut["chosen"] == done["chosen"][: at - 2] + done["chosen"][at:]


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_take_the_completion_alone(name: str) -> None:
    tokenizer = wrapped(OTHERS[name]())
    assert not adds_space(tokenizer)
    tokenized = tokenize_row(ROWS[0], tokenizer)
    assert all(tokenized[column] == ids(tokenizer, text) for column, text in ROWS[0].items())


def test_the_tokenizers_of_reasoning_models_add_no_space(tokenizer: PreTrainedTokenizerFast) -> None:
    for own in (tokenizer, deepseek(template("qwen3")), load_tokenizer("builtin:tiny_reasoner")):
        assert not adds_space(own)
        assert encode_completion(own, "It", prompt="never looked at") == ids(own, "It") == encode_prompt(own, "It")
