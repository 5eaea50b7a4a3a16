"""Models that cannot be trained as they are: refused in a line; and routers that are random in training."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PhimoeConfig

from bvpo.errors import UserError
from bvpo.policy import empty_model, load_policy, load_tokenizer


def bitsandbytes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))


FAULTS: dict[str, tuple[Callable[[Path], Any], Callable[[str], Any], str]] = {
    "quantized": (bitsandbytes, load_policy, "Quantized weights cannot be trained"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[]"), load_policy, "model_type"),
    "config.json is a list, sharded": (lambda f: (f / "config.json").write_text("[]"), empty_model, "model_type"),
    "config.json is a list, tokenizer": (lambda f: (f / "config.json").write_text("[]"), load_tokenizer, "TypeError"),
    "tokenizer.json is empty": (lambda f: (f / "tokenizer.json").write_text("{}"), load_tokenizer, "KeyError"),
    "tokenizer.json is a list": (lambda f: (f / "tokenizer.json").write_text("[]"), load_tokenizer, "TypeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_be_loaded_is_refused_in_a_line(llama_folder: Path, tmp_path: Path, fault: str) -> None:
    broken, load, said = FAULTS[fault]
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    broken(folder)
    with pytest.raises(UserError, match=said) as refused:
        load(str(folder))
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        PhimoeConfig(vocab_size=47, router_jitter_noise=0.3, input_jitter_noise=0.1, **SIZES),
        MixtralConfig(vocab_size=47, router_jitter_noise=0.1, **SIZES),
    ],
    ids=["phimoe", "mixtral"],
)
def test_routers_choose_in_training_as_they_do_in_evaluation(config: Any, tmp_path: Path) -> None:
    """Against the library's own model in evaluation mode, which keeps Phi-MoE's width of a tie; copies do as well."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids = torch.randint(47, (4, 20))
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = plain.eval()(ids).logits
    assert not torch.equal(plain.train()(ids).logits, expected)
    model: Any = load_policy(str(tmp_path))
    for own in (model, copy.deepcopy(model), model.eval().train()):
        assert own.training and torch.equal(own(ids).logits, expected)
