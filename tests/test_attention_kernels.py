"""Kernels for whole rows = attention sequence by sequence: what is around them on a CPU, they themselves on a GPU.

A stand-in does what the documentation of `varlen_attn` says, by a plain softmax for each sequence.

Shapes: S sequences, H query heads, K key heads, N tokens of a row, D numbers of a head.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from torch.testing import assert_close
from transformers import Gemma2Config, PreTrainedModel
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

from bvpo import attention_kernels as kernels
from bvpo.attention import FLASH, FLEX, FUNCTIONS, NAME, PackedMask
from bvpo.batches import SequenceBatch
from bvpo.errors import UserError
from bvpo.packed import is_packed, packed_logps, use_attention_kernel, use_packed_attention
from bvpo.packing import Block, spans, tokens
from tests.test_policy import FAMILIES, TINY, random_model

Row = tuple[Tensor, Tensor, Tensor]

CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYERS = TINY["num_hidden_layers"]
CHUNKS = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
GEMMA2 = Gemma2Config(**TINY, sliding_window=8, attn_logit_softcapping=2.0)
ROWS = {
    "pairs": (Block(0, 9, 0, 0), Block(2, 5, 6, 0), Block(1, 4, 0, 2), Block(3, 1, 3, 2)),
    "four of a prompt": (Block(0, 9, 0, 0), Block(1, 1, 5, 0), Block(2, 7, 5, 0), Block(3, 2, 5, 0)),
    "no prompt shared": (Block(0, 9, 0, 0), Block(1, 2, 0, 1), Block(2, 12, 0, 2)),
}


# --- A stand-in for the kernel ----------------------------------------------------------------------------------------


def varlen_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    top_left: bool = False,
) -> Tensor:
    """(N, H, D) queries, (N', K, D) keys and values → (N, H, D).

    Args:
        top_left: Where the mask is aligned, instead of at the bottom right.
    """
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype and key.shape == value.shape
    assert len(query) == query_starts[-1] and len(key) == key_starts[-1]
    assert most_queries == query_starts.diff().max() and most_keys == key_starts.diff().max()
    assert type(window_size) is tuple and window_size[1] == 0  # the kernel compares it to a tuple
    groups, left = query.shape[1] // key.shape[1], window_size[0]
    assert groups == 1 or enable_gqa
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs = []
    for sequence in range(len(query_starts) - 1):
        own_query = query[query_starts[sequence] : query_starts[sequence + 1]]
        own = slice(key_starts[sequence], key_starts[sequence + 1])
        count, length = len(own_query), len(key[own])
        scores = torch.einsum("qhd,khd->hqk", own_query, key[own]) * (scale or query.shape[-1] ** -0.5)
        first = 0 if top_left else length - count
        distance = torch.arange(first, first + count)[:, None] - torch.arange(length)
        may = (distance >= 0) & ((distance <= left) | (left < 0))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~may, -torch.inf).softmax(-1), value[own]))
    return torch.cat(outputs)


class StandIn:
    """Takes the kernel's place, and counts its calls."""

    def __init__(self) -> None:
        self.kernel: Callable[..., Tensor] = varlen_softmax
        self.calls = 0

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        self.calls += 1
        return self.kernel(*inputs, **options)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A CPU that seems to have FlashAttention, in float64 too."""
    stand_in = StandIn()
    monkeypatch.setattr(kernels, "varlen_attn", stand_in)
    monkeypatch.setattr(kernels, "flash_runs_on", lambda device: True)
    monkeypatch.setattr(kernels, "HALF", (torch.bfloat16, torch.float64))
    return stand_in


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that seems to train with FlexAttention; it is not compiled here."""
    monkeypatch.setattr(kernels, "flex_runs_on", lambda device: True)
    monkeypatch.setattr(kernels, "_compiled", lambda function: function)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    yield


def states(
    blocks: tuple[Block, ...], sizes: tuple[int, int, int] = (4, 2, 8), dtype: torch.dtype = torch.float64
) -> Row:
    """Queries, keys and values, (1, heads, N, D).

    Args:
        sizes: H, K and D.
    """
    generator, length = torch.Generator().manual_seed(0), sum(block.length for block in blocks)
    heads, key_heads, size = sizes
    return tuple(  # type: ignore[return-value]
        torch.randn(1, count, length, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    )


def mask_of(blocks: tuple[Block, ...], window: int | None = None, device: torch.device = CPU) -> PackedMask:
    return PackedMask(blocks, None if window is None else sliding_window_causal_mask_function(window), window, device)


def attention(name: str, row: Row, mask: PackedMask, **options: Any) -> Tensor:
    """(1, N, H, D)."""
    return FUNCTIONS[name](nn.Module(), *row, mask, **options)[0]


def with_gradients(name: str, row: Row, mask: PackedMask, **options: Any) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    out = attention(name, row, mask, **options)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad(out, row, above)]


# --- What the kernels are told ----------------------------------------------------------------------------------------


def test_spans_by_hand() -> None:
    #        row: p p p a b | c d | q e f f f | g        the prompts are ppp and q
    blocks = (Block(0, 5, 0, 0), Block(2, 2, 3, 0), Block(1, 5, 0, 2), Block(3, 1, 1, 2))
    found = spans(blocks, CPU)
    assert found.keys is not None
    assert found.keys.tolist() == [*range(5), *(0, 1, 2, 5, 6), *range(7, 12), *(7, 12)]
    assert found.query_starts.tolist() == [0, 5, 7, 12, 13]
    assert found.key_starts.tolist() == [0, 5, 10, 15, 17]
    assert (found.most_queries, found.most_keys) == (5, 5)
    assert type(found.most_queries) is type(found.most_keys) is int
    assert found.query_starts.dtype == found.key_starts.dtype == torch.int32


def test_keys_are_not_copied_where_no_prompt_is_shared() -> None:
    found = spans(ROWS["no prompt shared"], CPU)
    assert found.keys is None
    assert found.query_starts.tolist() == found.key_starts.tolist() == [0, 9, 11, 23]


def test_tokens_by_hand() -> None:
    found = tokens((Block(0, 3, 0, 0), Block(1, 2, 2, 0), Block(2, 2, 0, 2)), CPU)
    assert found.block.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert found.owner.tolist() == [0, 0, 0, 0, 0, 2, 2]
    assert found.prefix.tolist() == [0, 0, 0, 2, 2, 0, 0]
    assert found.position.tolist() == [0, 1, 2, 2, 3, 0, 1]


def test_they_are_made_once_a_row() -> None:
    mask = mask_of(ROWS["pairs"])
    assert mask.spans is mask.spans


# --- FlashAttention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4, 2, 8), (4, 1, 16), (3, 3, 8)])
@pytest.mark.parametrize("window", [None, 1, 4, 11, 100])
@pytest.mark.parametrize("row", ROWS)
def test_a_row_at_once_is_sequence_by_sequence(
    flash: StandIn, row: str, window: int | None, sizes: tuple[int, int, int]
) -> None:
    mask, inputs = mask_of(ROWS[row], window), states(ROWS[row], sizes)
    expected = with_gradients(NAME, inputs, mask, scaling=0.3)
    assert flash.calls == 0
    for found, wanted in zip(with_gradients(FLASH, inputs, mask, scaling=0.3), expected, strict=True):
        assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert flash.calls == 1


TAKEN: list[tuple[bool, dict[str, Any]]] = [
    (True, {}),
    (True, {"dtype": torch.float16}),
    (True, {"sizes": (4, 4, 256)}),
    (True, {"dropout": 0.0}),
    (False, {"dtype": torch.float32}),
    (False, {"dtype": torch.float64}),
    (False, {"sizes": (4, 4, 264)}),
    (False, {"sizes": (4, 4, 20)}),
    (False, {"dropout": 0.1}),
    (False, {"softcap": 50.0}),
]


@pytest.mark.parametrize(("taken", "case"), TAKEN)
def test_what_flash_attention_takes(monkeypatch: pytest.MonkeyPatch, taken: bool, case: dict[str, Any]) -> None:
    monkeypatch.setattr(kernels, "flash_runs_on", lambda device: True)
    row = states(ROWS["pairs"], case.get("sizes", (4, 2, 8)), case.get("dtype", torch.bfloat16))
    assert kernels.flash_takes(*row, softcap=case.get("softcap"), dropout=case.get("dropout")) == taken


def test_values_of_another_size_are_not_taken(flash: StandIn) -> None:
    query, key, value = states(ROWS["pairs"])
    assert not kernels.flash_takes(query, key, value[..., :4], None, None)


def test_a_cpu_has_neither_kernel() -> None:
    assert not kernels.flash_runs_on(CPU) and not kernels.flex_runs_on(CPU)


def test_under_autocast_inputs_are_cast_as_for_torchs_own(monkeypatch: pytest.MonkeyPatch, flash: StandIn) -> None:
    """Rotated queries and keys leave it in fp32, values in bf16."""
    query, key, value = states(ROWS["pairs"], dtype=torch.float32)
    row = (query, key, value.detach().bfloat16().requires_grad_())
    monkeypatch.setattr(kernels, "HALF", (torch.bfloat16,))
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(FLASH, row, mask_of(ROWS["pairs"]))
        expected = with_gradients(NAME, row, mask_of(ROWS["pairs"]))
    assert flash.calls == 1
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 2e-2 * other.norm()  # roundings of 2⁻⁹


RULES: list[tuple[bool, int, Any, int | None]] = [  # of a row whose longest sequence has 11 tokens
    (True, 1, None, None),
    (True, 1, sliding_window_causal_mask_function(1), 1),
    (True, 1, sliding_window_causal_mask_function(4), 4),
    (True, 1, sliding_window_causal_mask_function(11), 11),
    (True, 1, chunked_causal_mask_function(11, torch.zeros(1, dtype=torch.long)), 11),
    (False, 0, CHUNKS, 4),
    (False, 0, sliding_window_causal_mask_function(4), None),  # the model has changed it
]


@pytest.mark.parametrize(("causal", "calls", "rule", "reach"), RULES)
def test_rules_that_are_neither_causal_nor_a_window_are_left_to_the_mask(
    flash: StandIn, causal: bool, calls: int, rule: Any, reach: int | None
) -> None:
    mask, row = PackedMask(ROWS["pairs"], rule, reach, CPU), states(ROWS["pairs"])
    assert mask.is_causal == causal
    assert_close(attention(FLASH, row, mask), attention(NAME, row, mask), rtol=1e-10, atol=1e-10)
    assert flash.calls == calls


# --- In models --------------------------------------------------------------------------------------------------------


def make_model(config: Any, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """With an attention that takes packed rows."""
    model = cast(PreTrainedModel, random_model(config, 0, dtype))
    model.train()
    assert use_packed_attention(model) is None
    return model


def make_batch(prompts: list[int], completions: list[int]) -> SequenceBatch:
    """Random tokens; sequences whose prompts have a length have the same prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(prompts) + torch.tensor(completions)
    ids = torch.randint(48, (len(prompts), int(lengths.max())), generator=generator)
    for sequence, length in enumerate(prompts):
        ids[sequence, :length] = ids[prompts.index(length), :length]
    return SequenceBatch(ids, torch.tensor(prompts), lengths, len(prompts) // 2)


BATCHES = {
    "pairs": make_batch([20, 1, 6, 20, 1, 6], [30, 1, 5, 12, 9, 1]),
    "four of a prompt": make_batch([12, 12, 12, 12], [9, 1, 30, 2]),
    "no prompt shared": make_batch([5, 6, 7, 8], [20, 1, 3, 4]),
}


def logps_and_gradients(model: PreTrainedModel, batch: SequenceBatch) -> list[Tensor]:
    result = packed_logps(model, batch)
    weights = torch.linspace(-1, 2, len(result), dtype=result.dtype)
    return [result, *torch.autograd.grad(weights @ result, list(model.parameters()))]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same_in_one_call_a_layer(flash: StandIn, family: str, batch: str) -> None:
    """Mistral and one layer of Gemma 3 have a window of 8, less than the sequences have."""
    model = make_model(FAMILIES[family])
    expected = logps_and_gradients(model, BATCHES[batch])
    assert use_attention_kernel(model) is None
    assert model.training and is_packed(model) and model.config._attn_implementation == FLASH
    flash.calls = 0
    for found, wanted in zip(logps_and_gradients(model, BATCHES[batch]), expected, strict=True):
        assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert flash.calls == LAYERS


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_run_again_in_the_backward_pass_use_it_too(flash: StandIn, reentrant: bool) -> None:
    model, batch = make_model(FAMILIES["mistral"]), BATCHES["pairs"]
    _, *expected = logps_and_gradients(model, batch)
    assert use_attention_kernel(model) is None
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    flash.calls = 0
    result = packed_logps(model, batch)
    (torch.linspace(-1, 2, len(result), dtype=result.dtype) @ result).backward()
    assert flash.calls == 2 * LAYERS
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-10)


def test_layers_that_it_does_not_take_are_attended_as_before(flash: StandIn) -> None:
    """Gemma 2 caps its scores."""
    model, batch = make_model(GEMMA2), BATCHES["pairs"]
    expected = packed_logps(model, batch)
    assert use_attention_kernel(model) is None
    flash.calls = 0
    assert torch.equal(packed_logps(model, batch), expected) and flash.calls == 0


def test_batches_that_are_not_packed_are_as_before(flash: StandIn) -> None:
    model, batch = make_model(FAMILIES["mistral"]), BATCHES["pairs"]
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    expected = model(**inputs).logits
    for name in (FLASH, FLEX):
        model.set_attn_implementation(name)
        assert torch.equal(model(**inputs).logits, expected)
    assert flash.calls == 0


# --- A kernel that is wrong -------------------------------------------------------------------------------------------


def wider(*inputs: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
    """A window of a token more."""
    left, right = window_size
    return varlen_softmax(*inputs, **options, window_size=(left + (left >= 0), right))


def leaking(query: Tensor, key: Tensor, value: Tensor, *inputs: Any, **options: Any) -> Tensor:
    """A little of each value for everybody: less than a comparison of values shows."""
    return varlen_softmax(query, key, value, *inputs, **options) + 1e-7 * value.mean()


def broken(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


WRONG: dict[str, tuple[Callable[..., Tensor], str]] = {
    "top left, as before FlashAttention 2.1": (
        partial(varlen_softmax, top_left=True),
        r"^attention is off by [\d.]+%$",
    ),
    "wider": (wider, r"^attention is off by [\d.]+% with a window of 33 tokens$"),
    "leaking": (leaking, "^in a packed row, its sequences see each other$"),
    "broken": (broken, "^RuntimeError: no kernel image is available$"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_kernel_is_found_and_not_used(flash: StandIn, kind: str, training: bool) -> None:
    model, batch = make_model(FAMILIES["llama"]), BATCHES["pairs"]
    model.train(training)
    expected = packed_logps(model, batch)
    flash.kernel, reason = WRONG[kind]
    fault = use_attention_kernel(model)
    assert fault is not None and re.search(reason, fault), fault
    assert model.config._attn_implementation == NAME and model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())
    flash.calls = 0
    assert torch.equal(packed_logps(model, batch), expected) and flash.calls == 0


def test_a_kernel_that_was_right_before_is_given_up_where_it_is_not(flash: StandIn) -> None:
    """A model that was trained elsewhere, or is asked a second time."""
    model = make_model(FAMILIES["llama"])
    assert use_attention_kernel(model) is None
    flash.kernel = broken
    assert use_attention_kernel(model) is not None and model.config._attn_implementation == NAME


def test_on_a_cpu_nothing_changes() -> None:
    model = make_model(FAMILIES["llama"])
    assert use_attention_kernel(model) is None and model.config._attn_implementation == NAME


def test_flex_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"the model is on cpu\. Set --model\.packing auto"):
        use_attention_kernel(make_model(FAMILIES["llama"]), "flex")


def test_a_model_that_pads_is_left_alone(flash: StandIn) -> None:
    model = cast(PreTrainedModel, random_model(FAMILIES["llama"], 0, torch.float32))
    assert use_attention_kernel(model) is None and not is_packed(model) and flash.calls == 0


def test_under_autocast_the_tolerance_is_that_of_half_precision(
    monkeypatch: pytest.MonkeyPatch, flash: StandIn
) -> None:
    """Parameters are in fp32, products are rounded to bf16: the stand-in's at other places than torch's own."""
    monkeypatch.setattr(kernels, "HALF", (torch.bfloat16,))
    model = make_model(FAMILIES["llama"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert use_attention_kernel(model) is None and flash.calls > 0
    flash.calls = 0
    packed_logps(model, BATCHES["pairs"])
    assert flash.calls == 0  # nor is it used in fp32


# --- FlexAttention ----------------------------------------------------------------------------------------------------


def visible(blocks: tuple[Block, ...], mask: PackedMask) -> Tensor:
    """(N, N) who sees whom, by each sequence's own square."""
    starts = [sum(block.length for block in blocks[:number]) for number in range(len(blocks) + 1)]
    seen = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for number, block in enumerate(blocks):
        places = [starts[block.owner] + place for place in range(block.prefix)]
        places += range(starts[number], starts[number + 1])
        own = mask.of(len(places))
        square = torch.ones(len(places), len(places), dtype=torch.bool).tril() if own is None else own
        for query in range(block.prefix, len(places)):
            seen[places[query], places] = square[query]
    return seen


@pytest.mark.parametrize("rule", [None, sliding_window_causal_mask_function(4), CHUNKS])
@pytest.mark.parametrize("row", ROWS)
def test_the_mask_of_a_row(row: str, rule: Any) -> None:
    blocks = ROWS[row]
    expected = visible(blocks, PackedMask(blocks, rule, rule and 4, CPU))
    found = create_mask(kernels.row_rule(tokens(blocks, CPU), rule), None, None, len(expected), len(expected), CPU)
    assert torch.equal(found[0, 0], expected)


@torch.no_grad()
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("rule", [None, sliding_window_causal_mask_function(4), CHUNKS])
@pytest.mark.parametrize("row", ROWS)
def test_flex_attention_is_sequence_by_sequence(flex: None, row: str, rule: Any, softcap: float | None) -> None:
    """Its eager forward pass, all of it that a CPU has. 1e-5: it sums in fp32."""
    mask = PackedMask(ROWS[row], rule, rule and 4, CPU)
    query, key, value = (own.detach() for own in states(ROWS[row], dtype=torch.float32))
    found, expected = (
        attention(name, (query, key, value), mask, scaling=0.3, softcap=softcap) for name in (FLEX, NAME)
    )
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", [*FAMILIES.values(), GEMMA2], ids=[*FAMILIES, "gemma2"])
def test_a_model_computes_the_same_with_flex(flex: None, config: Any) -> None:
    model, batch = make_model(config, torch.float32), BATCHES["pairs"]
    model.requires_grad_(False)
    expected = packed_logps(model, batch)
    model.set_attn_implementation(FLEX)
    assert is_packed(model)
    assert_close(packed_logps(model, batch), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_of_other_lengths_are_not_compiled_again(flex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the part of the compiler that is the same on every device."""
    torch._dynamo.reset()
    counters = {
        create_block_mask: CompileCounterWithBackend("eager"),
        flex_attention: CompileCounterWithBackend("eager"),
    }
    compiled = {
        function: torch.compile(cast(Any, function), dynamic=True, fullgraph=True, backend=counter)
        for function, counter in counters.items()
    }
    monkeypatch.setattr(kernels, "_compiled", compiled.__getitem__)
    for more in (0, 64, 130, 7):
        blocks = (Block(0, 150 + more, 0, 0), Block(1, 90, 60 + more, 0), Block(2, 140, 0, 2))
        query, key, value = (own.detach() for own in states(blocks, dtype=torch.float32))
        mask, options = mask_of(blocks, 40), {"softcap": 1.5, "scaling": 0.3}
        found, expected = (attention(name, (query, key, value), mask, **options) for name in (FLEX, NAME))
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [counter.frame_count for counter in counters.values()] == [1, 1]


def test_a_device_where_flex_has_no_backward_pass_is_found(flex: None) -> None:
    """Nothing stands in here: a CPU has none."""
    model = make_model(FAMILIES["llama"], torch.float32)
    assert "FlexAttention does not support backward on CPU" in (use_attention_kernel(model, "flex") or "")
    assert model.config._attn_implementation == NAME


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("row", ROWS)
def test_flash_attention_on_a_gpu(row: str, window: int | None) -> None:
    """bf16 against the same rounded numbers in fp32."""
    device = torch.device("cuda")
    if not kernels.flash_runs_on(device):
        pytest.skip("this torch or GPU has no FlashAttention")
    rounded = [own.detach().to(device) for own in states(ROWS[row], (8, 2, 64), torch.bfloat16)]
    mask = mask_of(ROWS[row], window, device)
    found, expected = (
        with_gradients(name, tuple(own.to(dtype).requires_grad_() for own in rounded), mask)  # type: ignore[arg-type]
        for name, dtype in ((FLASH, torch.bfloat16), (NAME, torch.float32))
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 2e-2 * other.norm()


@GPU
@pytest.mark.parametrize("kernel", ["auto", "flex"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_models_on_a_gpu(family: str, kernel: Any) -> None:
    """In bf16; how far attention sequence by sequence is from fp32 is the measure. Twice: sums are in another order."""
    config = copy.deepcopy((FAMILIES | {"gemma2": GEMMA2})[family])
    config.head_dim = 64
    batch = BATCHES["pairs"]
    batch = batch._replace(input_ids=batch.input_ids.cuda())
    model = cast(Any, random_model(config, 0, torch.float32)).bfloat16().cuda()
    exact = copy.deepcopy(model).float()
    assert use_packed_attention(model) is None and use_packed_attention(exact) is None
    wanted, before = logps_and_gradients(exact, batch), logps_and_gradients(model, batch)
    assert use_attention_kernel(model, kernel) is None
    assert model.config._attn_implementation == (FLASH if kernel == "auto" else FLEX)
    for found, own, other in zip(logps_and_gradients(model, batch), before, wanted, strict=True):
        assert (found - other).norm() <= 2 * (own - other).norm() + 1e-3 * other.norm()
