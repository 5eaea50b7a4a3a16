"""Log-probabilities of a packed row = those of the padded batch, for every family; and which models are refused.

Shapes: S sequences (2B: the chosen ones, then the rejected ones), P parameters.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from bvpo.attention import NAME
from bvpo.batches import SequenceBatch
from bvpo.packed import packed_logps, use_packed_attention
from bvpo.policy import padded_logps
from tests.test_policy import FAMILIES, TINY, assert_near, flat, random_model

MORE: dict[str, PreTrainedConfig] = {
    "gemma2": Gemma2Config(**TINY, sliding_window=8, attn_logit_softcapping=2.0, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**TINY, logit_scale=0.25),
    "granite": GraniteConfig(**TINY, logits_scaling=3.0, attention_multiplier=0.2, embedding_multiplier=2.0),
    "gpt2": GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=512, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        initializer_range=0.3, bos_token_id=1, eos_token_id=1,
    ),
    # its layers apply a window that they do not tell the attention function of: it is in the mask alone
    "qwen2_moe": Qwen2MoeConfig(
        **TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        use_sliding_window=True, sliding_window=8, max_window_layers=1,
    ),
}  # fmt: skip
CONFIGS = FAMILIES | MORE

PROMPTS, COMPLETIONS = [60, 1, 30], ([300, 1, 40], [33, 20, 1])  # tokens; a one-token prompt, one-token completions


def make_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = cast(PreTrainedModel, random_model(config, 0, dtype))
    model.train()
    return model


def packing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose attention takes packed rows."""
    model = copy.deepcopy(model)
    assert use_packed_attention(model) is None
    assert model.training
    return model


def make_batch(prompts: list[int] = PROMPTS, seed: int = 0) -> SequenceBatch:
    """Random tokens; both sides of a pair have one prompt."""
    generator = torch.Generator().manual_seed(seed)
    completions = torch.tensor(COMPLETIONS).flatten()
    lengths = torch.tensor(prompts * 2) + completions
    ids = torch.randint(48, (6, int(lengths.max())), generator=generator)
    for pair, length in enumerate(prompts):
        ids[3 + pair, :length] = ids[pair, :length]
    return SequenceBatch(ids, torch.tensor(prompts * 2), lengths, 3)


def logps_and_gradient(model: PreTrainedModel, logps: Any, batch: SequenceBatch, **options: Any) -> list[Tensor]:
    """(S,) log-probabilities, and (P,) the gradient of a weighted sum of them."""
    result = logps(model, batch, **options)
    weights = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.7, 0.3], dtype=result.dtype)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(weights @ result, parameters, allow_unused=True, materialize_grads=True)
    return [result.detach(), flat(gradients)]


def assert_same(found: list[Tensor], expected: list[Tensor], value: float, gradient: float) -> None:
    assert ((found[0] - expected[0]).abs() <= value * expected[0].abs()).all()
    assert_near(found[1], expected[1], gradient)


# --- Packed = padded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_is_padded_in_fp32(family: str, shared: bool) -> None:
    model, batch = make_model(CONFIGS[family]), make_batch()
    expected = logps_and_gradient(model, padded_logps, batch)
    found = logps_and_gradient(packing(model), packed_logps, batch, share_prompts=shared)
    assert found[0].dtype == expected[0].dtype
    assert_same(found, expected, value=1e-5, gradient=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_padded_in_float64(family: str, tied: bool) -> None:
    config = copy.deepcopy(CONFIGS[family])
    config.tie_word_embeddings = tied
    model, batch = make_model(config, torch.float64), make_batch()
    assert (cast(Any, model.get_output_embeddings()).weight is model.get_input_embeddings().weight) == tied
    expected = logps_and_gradient(model, padded_logps, batch)
    assert_same(logps_and_gradient(packing(model), packed_logps, batch), expected, value=1e-10, gradient=1e-10)


def test_packed_is_padded_where_the_sides_prompts_differ() -> None:
    model, batch = make_model(CONFIGS["mistral"]), make_batch()
    batch.input_ids[3, 0] = (batch.input_ids[0, 0] + 1) % 48
    batch = batch._replace(prompt_lengths=batch.prompt_lengths + torch.tensor([0, 0, 0, 0, 5, 0]))
    expected = logps_and_gradient(model, padded_logps, batch)
    assert_same(logps_and_gradient(packing(model), packed_logps, batch), expected, value=1e-5, gradient=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_activation_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    """Layers run a second time in the backward pass, when the forward pass of the row is over."""
    model, batch = packing(make_model(CONFIGS[family])), make_batch()
    expected = logps_and_gradient(model, packed_logps, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # without which reentrant checkpointing drops gradients
    result = packed_logps(model, batch)
    (torch.tensor([1.0, -0.5, 2.0, -1.0, 0.7, 0.3]) @ result).backward()
    assert torch.equal(result, expected[0])
    assert_near(flat(tuple(cast(Tensor, p.grad) for p in model.parameters())), expected[1], 1e-6)


@pytest.mark.parametrize("family", CONFIGS)
def test_in_bf16_packing_rounds_no_more_than_padding(family: str) -> None:
    """Against fp32 on the same rounded weights, where the padded gradient is off by 1 to 6%: the orders of additions
    differ, the precision of each one does not."""
    rounded, batch = make_model(CONFIGS[family]).bfloat16(), make_batch()
    exact = logps_and_gradient(copy.deepcopy(rounded).float(), padded_logps, batch)
    padded = logps_and_gradient(rounded, padded_logps, batch)
    found = logps_and_gradient(packing(rounded), packed_logps, batch)
    assert found[0].dtype == torch.float32 and all(tensor.isfinite().all() for tensor in found)
    assert_near(found[0], exact[0], 2e-3)
    assert_near(found[1], exact[1], 1.1 * float((padded[1].float() - exact[1]).norm() / exact[1].norm()))


def test_under_autocast_packed_is_padded_within_rounding() -> None:
    """Weights stay in fp32, products are rounded to bf16 (2⁻⁹ each)."""
    model, batch = make_model(CONFIGS["llama"]), make_batch()
    packed = packing(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = padded_logps(model, batch), packed_logps(packed, batch)
    assert found.dtype == torch.float32 and found.requires_grad
    assert_near(found, expected, 2e-3)
    gradients = [
        flat(torch.autograd.grad(sums.sum(), list(m.parameters()))) for m, sums in ((packed, found), (model, expected))
    ]
    assert_near(gradients[0], gradients[1], 5e-2)


def test_several_completions_of_one_prompt() -> None:
    """The sequences of a marginal anchor: no pairs, and traces of one prompt in a row."""
    model, batch = make_model(CONFIGS["gemma3"]), make_batch(prompts=[20, 20, 7])
    batch.input_ids[:, :20] = torch.where(torch.arange(20) < batch.prompt_lengths[:, None], 5, batch.input_ids[:, :20])
    expected = logps_and_gradient(model, padded_logps, batch)
    assert_same(logps_and_gradient(packing(model), packed_logps, batch), expected, value=1e-5, gradient=1e-4)


def test_hooks_see_each_parameters_whole_gradient_once() -> None:
    """Also that of a tied embedding, which has two parts: gradients are collected as they are accumulated."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = True
    model, batch = packing(make_model(config)), make_batch()
    _, expected = logps_and_gradient(model, packed_logps, batch)
    seen: list[tuple[int, Tensor]] = []
    for index, parameter in enumerate(model.parameters()):

        def collect(own: Tensor, index: int = index) -> None:
            assert own.grad is not None
            seen.append((index, own.grad.flatten()))
            own.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
    (torch.tensor([1.0, -0.5, 2.0, -1.0, 0.7, 0.3]) @ packed_logps(model, batch)).backward()
    seen.sort(key=lambda pair: pair[0])
    assert [index for index, _ in seen] == list(range(len(list(model.parameters()))))
    assert torch.equal(torch.cat([gradient for _, gradient in seen]), expected)


# --- No leak ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3"])
def test_a_change_of_one_sequence_changes_no_other_one_in_the_last_bit(family: str, dtype: torch.dtype) -> None:
    model, batch = packing(cast(Any, make_model(CONFIGS[family])).to(dtype)), make_batch()
    before = packed_logps(model, batch)
    for sequence in range(6):
        ids = batch.input_ids.clone()
        prompt = int(batch.prompt_lengths[sequence])
        ids[sequence, prompt:] = (ids[sequence, prompt:] + 1) % 48
        after = packed_logps(model, batch._replace(input_ids=ids))
        assert (after == before).tolist() == [other != sequence for other in range(6)]


def test_a_shared_prompt_reaches_both_completions_and_no_other() -> None:
    model, batch = packing(make_model(CONFIGS["llama"])), make_batch()
    ids = batch.input_ids.clone()
    ids[[0, 3], 0] = (ids[0, 0] + 1) % 48
    after, before = packed_logps(model, batch._replace(input_ids=ids)), packed_logps(model, batch)
    assert (after == before).tolist() == [False, True, True, False, True, True]


# --- Which models -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "bloom": (BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4), "interface of transformers"),
    # its attention has sinks, which are no part of what this one computes
    "gpt_oss": (GptOssConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, sliding_window=8), "are off by"),
    "mamba": (MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2), "are off by"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_packing_would_change_is_refused_and_left_as_it_was(family: str) -> None:
    config, reason = REFUSED[family]
    model = make_model(config)
    before = model.config._attn_implementation
    assert reason in (use_packed_attention(model) or "")
    assert model.config._attn_implementation == before != NAME
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_leak_below_the_rounding_of_bf16_is_found() -> None:
    """A layer that adds a little of the token before, whosever it is: values pass, gradients show what it reads."""
    model = make_model(CONFIGS["llama"]).bfloat16()
    assert use_packed_attention(copy.deepcopy(model)) is None

    def mix(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] + 1e-3 * nn.functional.pad(inputs[0][:, :-1], (0, 0, 1, 0)),)

    cast(Any, model).model.layers[0].mlp.register_forward_pre_hook(mix)
    assert use_packed_attention(model) == "in a packed row, its sequences see each other"


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model = make_model(LlamaConfig(**TINY))
    model.set_output_embeddings(nn.Sequential(nn.Linear(32, 48, bias=False)))
    assert use_packed_attention(model) == "its output layer is no linear layer"


def test_the_check_leaves_no_gradients_and_the_mode_as_it_was() -> None:
    model = make_model(CONFIGS["llama"]).eval().requires_grad_(False)  # a reference
    assert use_packed_attention(model) is None
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not packed_logps(model, make_batch()).requires_grad
