"""Model FLOPs against hand arithmetic and torch's own counter, MFU on made-up devices, and the table of real ones."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from bvpo import throughput
from bvpo.batches import SequenceBatch
from bvpo.packed import packed_logps, use_packed_attention
from bvpo.policy import padded_logps
from bvpo.shapes import ModelShape, model_shape
from bvpo.throughput import DEVICES, Device, ModelFlops, peak_flops, peak_memory, utilization

# 2 layers of 3,000 numbers in matrices, a head of 40 · 8 = 320, attention 8 wide
SHAPE = ModelShape(
    parameters=7_000,
    largest=320,
    layers=2,
    hidden=8,
    intermediate=16,
    heads=2,
    attention_width=8,
    key_width=4,
    vocabulary=40,
    products=6_000,
    borders=500,
)


def pair(prompt: int, chosen: int, rejected: int, vocabulary: int = 40) -> SequenceBatch:
    """One pair of random tokens with one prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([prompt + chosen, prompt + rejected])
    ids = torch.randint(vocabulary, (2, int(lengths.max())), generator=generator)
    ids[1, :prompt] = ids[0, :prompt]
    return SequenceBatch(ids, torch.tensor([prompt, prompt]), lengths, step_pairs=1)


def test_model_flops_by_hand() -> None:
    """A prompt of 4 tokens, completions of 6 and 2.

    layers  12 tokens · 2 · 6,000 = 144,000;  head  8 · 2 · 320 = 5,120
    attention  4 · 2 layers · 8 = 64 a query and key; 4²/2 + 6 (4 + 3) + 2 (4 + 1) = 60 of them: 3,840
    """
    batch = pair(4, 6, 2)
    forward = 144_000 + 5_120 + 3_840
    trained = ModelFlops.of(SHAPE, frozen=False, reference=False)
    assert trained is not None and float(trained(batch)) == 3 * forward
    live = ModelFlops.of(SHAPE, frozen=False, reference=True)
    assert live is not None and float(live(batch)) == 4 * forward
    frozen = ModelFlops.of(SHAPE, frozen=True, reference=False)  # no gradient of weights: attention has none anyway
    assert frozen is not None and float(frozen(batch)) == 2 * (144_000 + 5_120) + 3 * 3_840
    assert ModelFlops.of(replace(SHAPE, products=None), frozen=False, reference=False) is None


def test_a_sliding_window_by_hand() -> None:
    """The same pair, one of the two layers with a window of 3 tokens: 64 / 2 = 32 FLOPs a query and key in each.

    full  60 queries and keys, as above
    window  K(n) = 3 (n − 1.5): K(10) + K(6) − K(4) = 25.5 + 13.5 − 7.5 = 31.5
    """
    flops = ModelFlops.of(replace(SHAPE, windows=(3,)), frozen=False, reference=False)
    assert flops is not None and float(flops(pair(4, 6, 2))) == 3 * (144_000 + 5_120 + 32 * (60 + 31.5))
    wide = ModelFlops.of(
        replace(SHAPE, windows=(10, 64)), frozen=False, reference=False
    )  # windows that nothing is beyond
    full = ModelFlops.of(SHAPE, frozen=False, reference=False)
    assert wide is not None and full is not None and float(wide(pair(4, 6, 2))) == float(full(pair(4, 6, 2)))


def small(kind: Any, layers: int = 6, **options: Any) -> ModelShape:
    """The shape of a small model of this kind."""
    config = kind(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **options,
    )
    with torch.device("meta"):
        return ModelShape.of(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("kind", "options", "windows"),
    [
        (LlamaConfig, {}, ()),
        (MistralConfig, {"sliding_window": None}, ()),
        (MistralConfig, {"sliding_window": 16}, (16,) * 6),
        (Qwen2Config, {"sliding_window": 16, "max_window_layers": 4}, ()),
        (Qwen2Config, {"sliding_window": 16, "max_window_layers": 4, "use_sliding_window": True}, (16, 16)),
        (Qwen3Config, {"sliding_window": 16, "max_window_layers": 6, "use_sliding_window": True}, ()),
        (Gemma2Config, {"sliding_window": 16}, (16,) * 3),  # every other layer
        (Gemma3TextConfig, {"sliding_window": 16}, (16,) * 5),  # five of six
        (Gemma3TextConfig, {"sliding_window": 16, "layer_types": ["full_attention"] * 6}, ()),
    ],
)
def test_windows_are_read_off_the_configuration(kind: Any, options: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert small(kind, **options).windows == windows


def test_a_long_sequence_asks_a_windowed_layer_for_its_window() -> None:
    """Gemma-3-4B's layers, 5 of 6 with 1,024 tokens, at 16,384 tokens: keys counted token by token."""
    shape = small(Gemma3TextConfig, layers=34, sliding_window=1024)
    assert len(shape.windows) == 29
    alone = replace(shape, products=0, vocabulary=0)  # attention alone
    flops = ModelFlops.of(alone, frozen=False, reference=False)
    batch = pair(1, 1, 1)._replace(prompt_lengths=torch.tensor([0, 0]), lengths=torch.tensor([16_384, 0]))
    tokens = torch.arange(1, 16_385)
    asked = 29 * tokens.clamp(max=1024).sum() + 5 * tokens.sum()
    assert flops is not None
    assert float(flops(batch)) == pytest.approx(12 * shape.attention_width * int(asked), rel=1e-3)  # half a key a query


def test_two_pairs_are_the_sum_of_each() -> None:
    flops = ModelFlops.of(replace(SHAPE, windows=(3,)), frozen=False, reference=True)
    assert flops is not None
    first, second = pair(4, 6, 2), pair(3, 1, 5)
    both = SequenceBatch(
        torch.zeros(4, 10, dtype=torch.long),
        torch.tensor([4, 3, 4, 3]),  # chosen ones, then rejected ones
        torch.tensor([10, 4, 6, 8]),
        step_pairs=2,
    )
    assert float(flops(both)) == float(flops(first) + flops(second))


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=64, bos_token_id=None, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("model", [llama(), gpt2()], ids=["llama", "gpt2, tied"])
def test_products_are_those_that_torch_counts(model: PreTrainedModel) -> None:
    """Forward and backward of a packed pair, prompt once. Its kernel for plain attention takes whole squares, and its
    counter leaves out products that are added in place, as the gradient of the head's weight is."""
    assert use_packed_attention(model) is None
    batch, shape = pair(5, 9, 3), ModelShape.of(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        packed_logps(model, batch).sum().backward()
    squares = 3 * 4 * shape.layers * shape.attention_width * (14**2 + 8**2)
    halves = 3 * 4 * shape.layers * shape.attention_width * (5**2 / 2 + 9 * (5 + 4.5) + 3 * (5 + 1.5))
    flops = ModelFlops.of(shape, frozen=False, reference=False)
    assert flops is not None
    in_place = 2 * shape.head * (9 + 3)
    assert counter.get_total_flops() - squares + in_place == float(flops(batch)) - halves


def test_padding_is_not_counted() -> None:
    """What is computed grows with padding, model FLOPs do not."""
    model, batch = llama(), pair(5, 9, 3)
    flops = ModelFlops.of(ModelShape.of(model), frozen=False, reference=False)
    assert flops is not None
    with FlopCounterMode(display=False) as counter:
        padded_logps(model, batch).sum().backward()
    assert counter.get_total_flops() > float(flops(batch))


def test_the_shape_of_a_real_configuration() -> None:
    """The built-in model's own weights, counted one by one."""
    shape = model_shape("builtin:tiny_reasoner")
    assert shape.products is not None
    assert shape.root + shape.layer * shape.layers == pytest.approx(shape.parameters, rel=1e-3)
    assert shape.products < shape.parameters - shape.root
    flops = ModelFlops.of(shape, frozen=False, reference=False)
    assert flops is not None
    long = pair(1, 1, 1)._replace(prompt_lengths=torch.tensor([0, 0]), lengths=torch.tensor([1, 0]))
    assert float(flops(long)) == pytest.approx(6 * (shape.products + shape.head), rel=1e-3)  # 6 N a token


def test_utilization_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.2e15 FLOP in 2 s on 4 devices of 300 TFLOP/s that could have done 2.4e15: half."""
    monkeypatch.setattr(throughput, "DEVICES", (Device(r"\bX1\b", 300e12, 150e12, 10e12),))
    peak = peak_flops("Maker X1 96GB", "bf16-mixed")
    assert peak == 300e12
    assert float(utilization(torch.tensor(1.2e15), 2.0, 4, peak)) == pytest.approx(0.5)
    assert peak_flops("Maker X10", "bf16-mixed") is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_known_devices(name: str, tflops: float) -> None:
    assert peak_flops(name, "bf16-true") == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "NVIDIA RTX A1000",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_other_devices_are_not_guessed(name: str) -> None:
    assert peak_flops(name, "bf16-true") is None


def test_the_peak_is_that_of_the_precision() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert peak_flops("NVIDIA A100-SXM4-80GB", "32-true") == 19.5e12
        torch.set_float32_matmul_precision("high")
        assert peak_flops("NVIDIA A100-SXM4-80GB", "32-true") == 156e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert peak_flops("NVIDIA A100-SXM4-80GB", "64-true") is None
    assert all(own.fp32 <= own.tf32 <= own.bf16 and re.compile(own.name) for own in DEVICES)


def test_peak_memory_is_that_of_a_gpu() -> None:
    assert peak_memory(torch.device("cpu")) is None
    if torch.cuda.is_available():
        block = torch.ones(2**24, device="cuda")
        peak = peak_memory(block.device)
        assert peak is not None and 2**-4 <= peak < 10
