"""LoRA: the adapters' start, the reference that is the policy without them, their checkpoints, the merged export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from bvpo import export, fit
from bvpo.checkpoints import read_checkpoint
from bvpo.errors import UserError
from bvpo.lora import LoRA, adapters_off, add_adapters, is_adapter_layer, merge_adapters, start_adapters
from bvpo.module import BVPO
from bvpo.packed import use_packed_attention
from bvpo.policy import completion_logps, load_policy
from tests.conftest import make_rows, write_rows
from tests.test_packed import make_batch


@pytest.fixture
def adapted(llama_folder: Path) -> PreTrainedModel:
    """A policy whose adapters are away from their start."""
    model = load_policy(str(llama_folder))
    add_adapters(model, LoRA(rank=4))
    start_adapters(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("packed", [True, False])
def test_without_its_adapters_the_policy_is_the_base_model_to_the_bit(
    adapted: PreTrainedModel, llama_folder: Path, packed: bool
) -> None:
    base, batch = load_policy(str(llama_folder)), make_batch()
    batch = batch._replace(input_ids=batch.input_ids % base.config.vocab_size)
    if packed:
        assert use_packed_attention(base) is None and use_packed_attention(adapted) is None
    expected = completion_logps(base, batch)
    assert not torch.equal(completion_logps(adapted, batch), expected)
    with adapters_off(adapted):
        assert torch.equal(completion_logps(adapted, batch), expected)
    assert not torch.equal(completion_logps(adapted, batch), expected)


def test_adapters_start_alike_and_without_effect(llama_folder: Path) -> None:
    starts, batch = [], make_batch()
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = load_policy(str(llama_folder))
        expected = completion_logps(model, batch._replace(input_ids=batch.input_ids % model.config.vocab_size))
        add_adapters(model, LoRA(rank=4))
        start_adapters(model)
        found = completion_logps(model, batch._replace(input_ids=batch.input_ids % model.config.vocab_size))
        torch.testing.assert_close(found, expected)
        starts.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    assert starts[0] and all("lora_" in name for name in starts[0])
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


def test_merged_adapters_give_what_they_gave(adapted: PreTrainedModel, llama_folder: Path) -> None:
    batch = make_batch()
    batch = batch._replace(input_ids=batch.input_ids % adapted.config.vocab_size)
    expected = completion_logps(adapted, batch)
    merge_adapters(adapted)
    assert adapted.state_dict().keys() == load_policy(str(llama_folder)).state_dict().keys()
    torch.testing.assert_close(completion_logps(adapted, batch), expected, rtol=1e-5, atol=1e-5)


def test_a_fit_of_adapters_resumes_bit_by_bit_and_is_exported_merged(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(12))

    def run(root: str, *options: str) -> Path:
        given = {
            "--model.policy": str(llama_folder),
            "--data.train": str(rows),
            "--model.lora": "{rank: 4, alpha: 8}",
            "--model.reference_logps": "adapter",
            "--model.learning_rate": "1e-2",
            "--trainer.accelerator": "cpu",
            "--trainer.enable_progress_bar": "false",
            "--trainer.default_root_dir": str(tmp_path / root),
        }
        assert fit.main([f"{key}={value}" for key, value in given.items()] + list(options)) == 0
        return tmp_path / root / "version_0"

    whole = run("whole", "--trainer.max_steps=4", "--model.schedule=constant")
    run("parts", "--trainer.max_steps=2", "--model.schedule=constant")
    parts = run("parts", "--trainer.max_steps=4", "--model.schedule=constant", "--ckpt_path=last")
    states = [read_checkpoint(folder / "checkpoints/last.ckpt") for folder in (whole, parts)]
    weights = [name for name in states[0]["state_dict"] if name.startswith("policy.")]
    assert all(torch.equal(states[0]["state_dict"][name], states[1]["state_dict"][name]) for name in weights)
    assert weights and all("lora_" in name for name in weights)  # the base model is not in the checkpoint

    assert export.main([str(whole), str(tmp_path / "out")]) == 0
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    policy = load_policy(str(llama_folder))
    add_adapters(policy, LoRA(rank=4, alpha=8))
    policy.load_state_dict({n.removeprefix("policy."): states[0]["state_dict"][n] for n in weights}, strict=False)
    batch = make_batch()
    batch = batch._replace(input_ids=batch.input_ids % policy.config.vocab_size)
    torch.testing.assert_close(completion_logps(merged, batch), completion_logps(policy, batch), rtol=1e-5, atol=1e-5)
    assert "lora" in (tmp_path / "out" / "README.md").read_text().lower()


def test_what_cannot_be_adapted_is_refused(llama_folder: Path) -> None:
    with pytest.raises(UserError, match="rank must be"):
        LoRA(rank=0)
    with pytest.raises(UserError, match=r"no layer has a name of lora\.target: nowhere"):
        add_adapters(load_policy(str(llama_folder)), LoRA(target=["q_proj", "nowhere"]))
    with pytest.raises(UserError, match="head cannot be adapted"):
        add_adapters(load_policy(str(llama_folder)), LoRA(target=["lm_head", "q_proj"]))
    with pytest.raises(UserError, match=r"embed_tokens is no linear layer \(Embedding\)"):  # both factors start at 0
        add_adapters(load_policy(str(llama_folder)), LoRA(target=["embed_tokens", "q_proj"]))
    with pytest.raises(UserError, match=r"needs --model\.lora"):
        BVPO(str(llama_folder), reference_logps="adapter")


SIZES: dict[str, Any] = {
    "vocab_size": 47,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DENSE: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=47, n_embd=32, n_layer=2, n_head=4),  # its layers are Conv1D
    "falcon": FalconConfig(vocab_size=47, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),  # FalconLinear
}
EXPERTS: dict[str, tuple[PreTrainedConfig, set[str]]] = {
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=4), set()),
    "phimoe": (PhimoeConfig(**SIZES, num_local_experts=4), set()),  # routers of a subclass of nn.Linear
    "qwen3_moe": (
        Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        set(),
    ),
    "deepseek_v3": (
        DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4},
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        {"gate_proj", "up_proj", "down_proj"},  # of the dense layer and of the shared experts
    ),
}


def adapted_names(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if is_adapter_layer(module)}


@pytest.mark.parametrize("family", DENSE)
def test_all_linear_is_what_it_is_to_peft(family: str) -> None:
    own, theirs = (AutoModelForCausalLM.from_config(DENSE[family]) for _ in range(2))
    add_adapters(own, LoRA(rank=2))
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), theirs)
    assert adapted_names(own) and adapted_names(own) == adapted_names(theirs)


@pytest.mark.parametrize("family", EXPERTS)
def test_all_linear_leaves_routers_and_stacked_experts_as_they_are(family: str) -> None:
    """peft's own goes by the names that experts had in transformers 4, and wraps routers that give tuples."""
    config, feed_forward = EXPERTS[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(47, (2, 9))
    expected = model(ids).logits
    add_adapters(model, LoRA(rank=2))
    start_adapters(model)
    names = adapted_names(model)
    assert all("self_attn" in name or name.rpartition(".")[2] in feed_forward for name in names)
    assert {"0", "1"} == {name.split(".")[2] for name in names}
    assert feed_forward <= {name.rpartition(".")[2] for name in names}
    assert torch.equal(model(ids).logits, expected)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found = model(ids).logits
    assert not torch.allclose(found, expected)
    merge_adapters(model)
    torch.testing.assert_close(model(ids).logits, found, rtol=1e-4, atol=1e-5)


def test_a_router_is_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(EXPERTS["phimoe"][0])
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.router is no linear layer \(PhimoeTopKRouter\)"):
        add_adapters(model, LoRA(target=["q_proj", "router"]))


def test_layers_whose_output_mamba_s_kernels_do_not_take_are_left_out() -> None:
    config = FalconH1Config(**SIZES, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"Mamba's kernels go past model\.layers\.0\.mamba\.out_proj's adapter"):
        add_adapters(model, LoRA(target=["out_proj"]))
    add_adapters(model, LoRA(rank=2))
    names = {name.rpartition(".")[2] for name in adapted_names(model)}
    assert {"in_proj", "q_proj", "o_proj"} <= names and "out_proj" not in names


@pytest.mark.slow
def test_adamw_8bit_learns_and_resumes(llama_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(12))
    given = [
        f"--model.policy={llama_folder}",
        f"--data.train={rows}",
        "--model.optimizer=adamw_8bit",
        "--model.learning_rate=1e-3",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert fit.main([*given, "--trainer.max_steps=2"]) == 0
    assert fit.main([*given, "--trainer.max_steps=3", "--ckpt_path=last"]) == 0
    state = read_checkpoint(tmp_path / "version_0/checkpoints/last.ckpt")
    assert state["global_step"] == 3
    assert export.main([str(tmp_path / "version_0"), str(tmp_path / "out")]) == 0
