"""Log-probabilities of a batch against a loop that anyone can check, and a reference that stays what it was.

Shapes: S sequences (2B: the chosen ones, then the rejected ones), T tokens, V vocabulary, P parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from bvpo.batches import BRANCHES, SequenceBatch, collate
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.losses import DPO, PairLogps, SimPO
from bvpo.mixing import Fixed
from bvpo.module import BVPO
from bvpo.pairs import tokenize_row
from bvpo.policy import load_policy, load_tokenizer, resolve_model, sequence_logps
from bvpo.reference import LiveReference
from tests.conftest import make_rows

BETA = 0.1
TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # far from uniform predictions
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TINY, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY),
    "mistral": MistralConfig(**TINY, sliding_window=8),
    "gemma": GemmaConfig(**TINY),
    "gemma3": Gemma3TextConfig(**TINY, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
}


def random_model(config: PreTrainedConfig, seed: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return in_float64(model) if dtype == torch.float64 else model


def in_float64(model: nn.Module) -> nn.Module:
    """A copy that computes in float64 throughout.

    The RMSNorm of transformers rounds to fp32 whatever it is given, so torch's takes its place: all weights are 1 here.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            width = cast(Tensor, module.weight).shape[0]
            model.set_submodule(name, nn.RMSNorm(width, eps=cast(Any, model.config).rms_norm_eps))
    return model.double()


def policy_and_reference(family: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, LiveReference]:
    """Two different random models: no margin is 0."""
    config = FAMILIES[family]
    return random_model(config, 0, dtype), LiveReference(random_model(config, 1, dtype))


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Three tokenized rows of different lengths."""
    return [tokenize_row(row, tokenizer) for row in make_rows(3)]


def loss_and_gradient(model: nn.Module, reference: LiveReference, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """The DPO loss averaged over the pairs, and its gradient, (P,)."""
    loss = DPO(BETA)(sequence_logps(model, batch), reference.logps(batch)).mean()
    return loss.detach(), flat(torch.autograd.grad(loss, list(model.parameters())))


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def assert_near(found: Tensor, expected: Tensor, relative: float) -> None:
    """‖found − expected‖ ≤ relative · ‖expected‖, and the expected value is no zero."""
    expected = expected.double()
    assert expected.norm() > 0
    assert (found.double() - expected).norm() <= relative * expected.norm()


# --- The oracle: one sequence at a time, no padding, token by token ---------------------------------------------------


def naive_logp(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """log π(completion | prompt) = Σ_t log π(y_t | prompt, y_<t)."""
    logits = model(torch.tensor([prompt + completion])).logits[0]  # (T, V)
    total = torch.zeros((), dtype=logits.dtype)
    for position, token in enumerate(completion, start=len(prompt)):
        total = total + logits[position - 1].log_softmax(-1)[token]  # the logits before a token predict it
    return total


def naive_loss(model: nn.Module, reference: nn.Module, rows: list[dict[str, Any]], prefix: str) -> Tensor:
    """The mean over rows of log(1 + exp(−β · margin))."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        log_ratios = []
        for side in ("chosen", "rejected"):
            sequence = row[prefix + "prompt"], row[prefix + side]
            with torch.no_grad():
                held = naive_logp(reference, *sequence)
            log_ratios.append(naive_logp(model, *sequence) - held)
        total = total + torch.log1p(torch.exp(-BETA * (log_ratios[0] - log_ratios[1])))
    return total / len(rows)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logps_loss_and_gradient_equal_those_of_a_plain_loop(
    rows: list[dict[str, Any]], family: str, branch: str, dtype: torch.dtype, relative: float
) -> None:
    """The loop runs in float64. 1e-5 is 170 roundings of fp32; one token more or less moves a sum by over 1e-3."""
    policy, reference = policy_and_reference(family, dtype)
    batch: SequenceBatch = getattr(collate(rows, pad_token_id=0), branch)
    prefix = "" if branch == "trace" else "empty_"
    exact_policy, exact_reference = in_float64(policy), in_float64(reference.model)

    logps = sequence_logps(policy, batch)
    for side, found in (("chosen", logps.chosen), ("rejected", logps.rejected)):
        exact = torch.stack([naive_logp(exact_policy, row[prefix + "prompt"], row[prefix + side]) for row in rows])
        assert found.dtype == dtype
        assert_close(found.double(), exact, rtol=relative, atol=0)
    assert logps.chosen_tokens.tolist() == [len(row[prefix + "chosen"]) for row in rows]
    assert logps.rejected_tokens.tolist() == [len(row[prefix + "rejected"]) for row in rows]

    exact_loss = naive_loss(exact_policy, exact_reference, rows, prefix)
    exact_gradient = flat(torch.autograd.grad(exact_loss, list(exact_policy.parameters())))
    loss, gradient = loss_and_gradient(policy, reference, batch)
    assert_near(loss, exact_loss, relative)
    assert_near(gradient, exact_gradient, relative)


def test_logits_are_capped_as_the_model_caps_them(rows: list[dict[str, Any]]) -> None:
    """Gemma 2 ends in c tanh(logits / c), c = 2 here: a way around the model's own head would miss it."""
    batch = collate(rows, pad_token_id=0).trace
    model = random_model(Gemma2Config(**TINY, sliding_window=8, final_logit_softcapping=2.0), 0, torch.float32)
    capped = sequence_logps(model, batch).chosen
    exact = [naive_logp(model, row["prompt"], row["chosen"]) for row in rows]
    assert_close(capped, torch.stack(exact), rtol=1e-5, atol=0)
    cast(Any, model.config).final_logit_softcapping = None
    assert ((sequence_logps(model, batch).chosen - capped).abs() > 1).all()


# --- What must not matter ---------------------------------------------------------------------------------------------

# In float64. The order in which a kernel adds depends on the batch's shape, so equality is up to thousands of
# roundings of 1e-16; a padded or misplaced token that counted would change a log-probability by about 1.
ROUNDING = 1e-12


@pytest.mark.parametrize("columns", [1, 2, 17])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_padding_on_the_right_does_not_matter(rows: list[dict[str, Any]], family: str, columns: int) -> None:
    """Also with more padding than the attention's sliding window of 8 (mistral, gemma3)."""
    policy, reference = policy_and_reference(family)
    batch = collate(rows, pad_token_id=0).trace
    wider = batch._replace(input_ids=nn.functional.pad(batch.input_ids, (0, columns), value=3))
    for found, expected in zip(
        loss_and_gradient(policy, reference, wider), loss_and_gradient(policy, reference, batch), strict=True
    ):
        assert_near(found, expected, ROUNDING)


@pytest.mark.parametrize("pad", [1, 2, 47])
def test_the_pad_token_does_not_matter(rows: list[dict[str, Any]], pad: int) -> None:
    """Not in the last bit, and not if it is EOS (id 1): masks come from lengths, and a completion's EOS is scored."""
    policy, reference = policy_and_reference("llama")
    found = loss_and_gradient(policy, reference, collate(rows, pad_token_id=pad).trace)
    expected = loss_and_gradient(policy, reference, collate(rows, pad_token_id=0).trace)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_the_order_of_the_rows_does_not_matter(rows: list[dict[str, Any]]) -> None:
    policy, reference = policy_and_reference("llama")
    batch, turned = (collate(some, pad_token_id=0).trace for some in (rows, [rows[2], rows[0], rows[1]]))
    for side in ("chosen", "rejected"):
        expected = getattr(sequence_logps(policy, batch), side)[[2, 0, 1]]
        assert_near(getattr(sequence_logps(policy, turned), side), expected, ROUNDING)
    for found, expected in zip(
        loss_and_gradient(policy, reference, turned), loss_and_gradient(policy, reference, batch), strict=True
    ):
        assert_near(found, expected, ROUNDING)


class WithoutLogitsToKeep(nn.Module):
    """A model whose forward takes no `logits_to_keep`: it always gives all logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_a_model_that_always_gives_all_logits_gives_the_same(rows: list[dict[str, Any]]) -> None:
    policy, reference = policy_and_reference("llama")
    batch = collate(rows, pad_token_id=0).trace
    for found, expected in zip(
        loss_and_gradient(WithoutLogitsToKeep(policy), reference, batch),
        loss_and_gradient(policy, reference, batch),
        strict=True,
    ):
        assert_near(found, expected, ROUNDING)


def test_no_logits_are_computed_inside_the_prompts(rows: list[dict[str, Any]]) -> None:
    policy, _ = policy_and_reference("llama")
    batch = collate(rows, pad_token_id=0).trace
    widths: list[int] = []
    cast(nn.Module, policy.lm_head).register_forward_hook(lambda _, __, logits: widths.append(logits.shape[1]))
    sequence_logps(policy, batch)
    shortest = min(len(row["prompt"]) for row in rows)
    assert widths == [batch.input_ids.shape[1] - (shortest - 1)]  # from the shortest prompt's last token on


def test_where_the_empty_block_is_scored_matters_to_simpo_and_not_to_dpo(rows: list[dict[str, Any]]) -> None:
    """`empty_prompt` is `prompt` and the empty block: the same ids, with the border of prompt and completion moved."""
    policy, reference = policy_and_reference("llama")
    batch = collate(rows, pad_token_id=0)
    outside, inside = batch.empty, batch.empty._replace(prompt_lengths=batch.trace.prompt_lengths)
    assert (outside.prompt_lengths - inside.prompt_lengths).tolist() == [4] * 6  # <think>, space, </think>, space

    for found, expected in zip(
        loss_and_gradient(policy, reference, inside), loss_and_gradient(policy, reference, outside), strict=True
    ):
        assert_near(found, expected, 1e-6)
    scores = [sequence_logps(policy, sequences) for sequences in (inside, outside)]
    assert ((scores[0].chosen - scores[1].chosen) < -1).all()  # the block's own log-probability
    assert ((SimPO()(scores[0], scores[0]) - SimPO()(scores[1], scores[1])).abs() > 1e-2).all()


# --- The reference, and the start of a fit ----------------------------------------------------------------------------


@pytest.fixture
def fit(llama_folder: Path, pairs_file: Path) -> Callable[..., BVPO]:
    """Trains the random Llama for a few optimizer steps and returns the module."""

    def run(steps: int) -> BVPO:
        module = BVPO(policy=str(llama_folder), learning_rate=1e-2, schedule="constant", mixing=Fixed(window=0))
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, PairData(str(pairs_file), batch_size=4, tokenizer=str(llama_folder)))
        return module

    return run


def test_at_step_0_both_losses_are_ln_2_and_all_margins_0(fit: Callable[..., BVPO]) -> None:
    """The metrics of a step are of the weights before it. The model's configuration asks for dropout."""
    metrics = fit(1).metrics
    for branch in BRANCHES:
        assert metrics[f"loss/{branch}"] == pytest.approx(math.log(2), abs=1e-6)
        for key in ("chosen", "rejected", "margin"):
            assert metrics[f"reward/{branch}_{key}"] == pytest.approx(0, abs=1e-6)


def test_the_reference_never_changes_and_is_no_part_of_the_module(
    fit: Callable[..., BVPO], llama_folder: Path, rows: list[dict[str, Any]]
) -> None:
    module = fit(3)
    start = load_policy(str(llama_folder)).state_dict()
    assert isinstance(module.reference, LiveReference)
    held = module.reference.model
    assert all(torch.equal(held.state_dict()[name], value) for name, value in start.items())
    assert not any(torch.equal(module.policy.state_dict()[name], value) for name, value in start.items())

    assert not any(part.training for part in held.modules())
    assert not any(parameter.requires_grad for parameter in held.parameters())
    logps = module.reference.logps(collate(rows, pad_token_id=0).trace)
    assert not logps.chosen.requires_grad and not logps.rejected.requires_grad

    assert set(module.state_dict()) == {f"policy.{name}" for name in start}
    trained = {id(p) for group in cast(Any, module.optimizers()).param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.policy.parameters()}


def test_a_change_of_the_policy_does_not_reach_its_copy() -> None:
    policy = random_model(FAMILIES["llama"], 0, torch.float32)
    held = LiveReference.copy_of(policy)
    before = [parameter.clone() for parameter in held.model.parameters()]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(held.model.parameters(), before, strict=True))
    assert all(parameter.requires_grad for parameter in policy.parameters())


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """GPT-2 has dropout in its embeddings, its attention and its residual stream, and by default it is on."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.1, 0.1, 0.1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("family", "folder"), [(LlamaForCausalLM, "llama_folder"), (GPT2LMHeadModel, "gpt2_folder")])
def test_dropout_is_off_in_training_mode(
    family: Any, folder: str, request: pytest.FixtureRequest, rows: list[dict[str, Any]]
) -> None:
    name, batch = str(request.getfixturevalue(folder)), collate(rows, pad_token_id=0).trace

    def two_forwards(model: nn.Module) -> list[PairLogps]:
        torch.manual_seed(0)
        return [sequence_logps(model, batch) for _ in range(2)]

    policy = load_policy(name)
    assert policy.training
    first, second = two_forwards(policy)
    assert torch.equal(first.chosen, second.chosen) and torch.equal(first.rejected, second.rejected)
    first, second = two_forwards(family.from_pretrained(name).train())
    assert not torch.equal(first.chosen, second.chosen)  # the file's own configuration would drop


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_a_folder_saved_by_save_pretrained_is_itself(llama_folder: Path) -> None:
    assert resolve_model(str(llama_folder)) == str(llama_folder)
    assert resolve_model("organisation/model") == "organisation/model"


@pytest.mark.parametrize("load", [resolve_model, load_policy, load_tokenizer])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_weights", r"no weights in this folder.*copied completely"),
        ("no_config", r"no config\.json in this folder.*save_pretrained"),
        ("missing", r"there is no such folder; give a model's folder, a Hub id, or builtin:tiny_reasoner"),
        ("no_config/model.safetensors", r"is a file; give the model's folder"),
        ("builtin:huge", r"no built-in model 'builtin:huge'; there is builtin:tiny_reasoner"),
    ],
)
def test_a_model_that_is_none_is_refused_in_one_line(
    load: Callable[[str], object], name: str, message: str, llama_folder: Path, tmp_path: Path
) -> None:
    for folder, kept in (("no_weights", "config.json"), ("no_config", "model.safetensors")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / kept).write_bytes((llama_folder / kept).read_bytes())
    with pytest.raises(UserError, match=message) as raised:
        load(name if name.startswith("builtin:") else str(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_refused_in_one_line(llama_folder: Path, tmp_path: Path, file: str) -> None:
    for kept in ("config.json", "model.safetensors"):
        content = (llama_folder / kept).read_bytes()
        (tmp_path / kept).write_bytes(content[: len(content) // 2] if kept == file else content)
    with pytest.raises(UserError, match="the model cannot be loaded") as raised:
        load_policy(str(tmp_path))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_weights_that_lack_a_tensor_or_have_another_shape_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    """transformers fills in random numbers for such a tensor: the policy would not be the model that was named."""
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    tensors = load_file(llama_folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    for broken in (None, tensors[name][:, :-1].contiguous()):
        kept = {key: value for key, value in tensors.items() if key != name}
        save_file(kept | ({} if broken is None else {name: broken}), tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=name):
            load_policy(str(tmp_path))
