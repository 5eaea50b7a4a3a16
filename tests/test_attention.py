"""Attention over packed rows against a softmax that anyone can check, and as a part of models.

Shapes: H query heads, K key heads, L tokens, D numbers of a head.
"""

from __future__ import annotations

import copy
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Gemma2Config, PreTrainedModel
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from bvpo.attention import NAME, PackedMask, attend, computing, packed_attention, packed_mask
from bvpo.packing import Block, PackedBatch
from tests.test_policy import FAMILIES, TINY, random_model

HEADS, KEY_HEADS, SIZE = 4, 2, 8
BLOCKS = (Block(0, 9, 0, 0), Block(2, 5, 3, 0), Block(1, 4, 0, 2), Block(3, 1, 2, 2), Block(4, 12, 0, 4))
CPU = torch.device("cpu")


def states(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (1, heads, L, D)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, heads, length, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )


def naive(query: Tensor, key: Tensor, value: Tensor, may: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """(1, H, L, D) → (1, L, H, D), one query of one head at a time."""
    out = torch.zeros_like(query)
    for head in range(HEADS):
        own = head * KEY_HEADS // HEADS  # neighbouring query heads share a key head
        for row in range(query.shape[2]):
            scores = scaling * (key[0, own] @ query[0, head, row])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores[may[row]].softmax(0)
            out[0, head, row] = weights @ value[0, own][may[row]]
    return out.transpose(1, 2)


def window(length: int, reach: int | None) -> Tensor:
    """(L, L) whether a token sees another: itself and reach − 1 tokens before it."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < (reach or length))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("reach", [None, 4])
def test_every_sequence_is_attended_as_if_it_were_alone(reach: int | None, softcap: float | None) -> None:
    """Five sequences, two of which have their prompts in another's block; values and gradients."""
    lengths = [block.length for block in BLOCKS]
    starts, row = [0, *accumulate(lengths)], states(sum(lengths))
    rule = None if reach is None else sliding_window_causal_mask_function(reach)
    found, _ = packed_attention(
        nn.Module(), *row, PackedMask(BLOCKS, rule, reach, CPU), scaling=0.3, softcap=softcap, dropout=0.0
    )
    expected = torch.zeros_like(found)
    for number, block in enumerate(BLOCKS):
        tokens = [starts[block.owner] + place for place in range(block.prefix)]
        tokens += range(starts[number], starts[number + 1])
        query, key, value = (own[:, :, tokens] for own in row)
        alone = naive(query, key, value, window(len(tokens), reach), 0.3, softcap)
        expected[:, starts[number] : starts[number + 1]] = alone[:, block.prefix :]
    assert_close(found, expected)
    above = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    for own, other in zip(
        torch.autograd.grad(found, row, above), torch.autograd.grad(expected, row, above), strict=True
    ):
        assert_close(own, other)


def test_by_default_scores_are_divided_by_the_root_of_the_size() -> None:
    row = states(6)
    for softcap in (None, 2.0):
        found = attend(*row, None, softcap=softcap)
        assert_close(found, naive(*row, window(6, None), SIZE**-0.5, softcap))


# --- Masks ------------------------------------------------------------------------------------------------------------


def mask_of(blocks: tuple[Block, ...] = BLOCKS, **arguments: Any) -> PackedMask:
    """What the mask function gives while a packed row is computed."""
    empty = torch.empty(0)
    with computing(PackedBatch(empty, empty, blocks, empty, empty, ())):
        return cast(PackedMask, packed_mask(**arguments))


def test_a_short_sequence_needs_no_mask_and_a_long_one_the_models_own() -> None:
    full = mask_of(mask_function=causal_mask_function)
    sliding = mask_of(mask_function=sliding_window_causal_mask_function(4), local_size=4)
    chunked = mask_of(mask_function=chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), local_size=4)
    assert full.of(1000) is None
    assert sliding.of(4) is None and chunked.of(4) is None
    for length in (5, 7):
        chunk = torch.arange(length) // 4
        assert_close(sliding.of(length), window(length, 4))
        assert_close(chunked.of(length), window(length, None) & (chunk[:, None] == chunk))


def test_a_rule_that_the_model_has_changed_is_applied_to_short_sequences_too() -> None:
    both_ways = mask_of(mask_function=lambda *_: torch.ones(3, 3, dtype=torch.bool), local_size=4, use_vmap=True)
    assert_close(both_ways.of(3), torch.ones(3, 3, dtype=torch.bool))


# --- Outside packed rows ----------------------------------------------------------------------------------------------

CONFIGS = {
    "llama": FAMILIES["llama"],
    "gemma2": Gemma2Config(**TINY, sliding_window=8, attn_logit_softcapping=2.0),  # transformers runs it as `eager`
    "gemma3": FAMILIES["gemma3"],
}


def own_and_packed(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model as transformers sets it up, and its copy with this attention."""
    model = cast(PreTrainedModel, random_model(CONFIGS[family], 0, torch.float32))
    other = copy.deepcopy(model)
    other.set_attn_implementation(NAME)
    assert model.config._attn_implementation != other.config._attn_implementation == NAME
    return model.eval(), other.eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_padded_batches_are_computed_as_without_it(family: str) -> None:
    """With padding on either side, and more of it than the window of 8. 1e-5: `eager` adds in another order."""
    model, packed = own_and_packed(family)
    ids, mask = torch.randint(48, (3, 30), generator=torch.Generator().manual_seed(0)), torch.ones(3, 30)
    mask[1, 12:], mask[2, :17] = 0, 0
    found, expected = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (packed, model))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_close(packed(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_generation_is_as_without_it(family: str) -> None:
    """Token by token from a cache, beyond the window."""
    ids = torch.randint(2, 48, (2, 5), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    model, packed = own_and_packed(family)
    assert torch.equal(*(cast(Any, m).generate(ids, **options) for m in (packed, model)))


def test_no_saved_folder_knows_of_it(tmp_path: Path) -> None:
    """Any transformers can load it; and a copy of the model keeps it."""
    _, packed = own_and_packed("llama")
    packed.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert copy.deepcopy(packed).config._attn_implementation == NAME
