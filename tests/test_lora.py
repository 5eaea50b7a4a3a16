"""LoRA: the adapters' start, the reference that is the policy without them, their checkpoints, the merged export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bvpo import export, fit
from bvpo.checkpoints import read_checkpoint
from bvpo.errors import UserError
from bvpo.lora import LoRA, adapters_off, add_adapters, merge_adapters, start_adapters
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
    with pytest.raises(UserError, match="nowhere"):
        add_adapters(load_policy(str(llama_folder)), LoRA(target=["nowhere"]))
    with pytest.raises(UserError, match="head cannot be adapted"):
        add_adapters(load_policy(str(llama_folder)), LoRA(target=["lm_head", "q_proj"]))
    with pytest.raises(UserError, match=r"embed_tokens is no linear layer \(Embedding\)"):  # both factors start at 0
        add_adapters(load_policy(str(llama_folder)), LoRA(target=["embed_tokens", "q_proj"]))
    with pytest.raises(UserError, match=r"needs --model\.lora"):
        BVPO(str(llama_folder), reference_logps="adapter")


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
