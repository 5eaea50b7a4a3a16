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
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    CTRLConfig,
    ElectraConfig,
    GPT2Config,
    MambaConfig,
    MixtralConfig,
    PhimoeConfig,
    PreTrainedTokenizerFast,
    XLNetConfig,
)

from bvpo import doctor, fit, sample
from bvpo.errors import UserError
from bvpo.packed import sees_ahead
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


ENCODER: dict[str, Any] = {
    "vocab_size": 47,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LAYERS: dict[str, Any] = {"vocab_size": 47, "n_layer": 2, "n_head": 4}
BIDIRECTIONAL: dict[str, Any] = {
    "bert": BertConfig(**ENCODER),
    "electra": ElectraConfig(**ENCODER, embedding_size=32),
    "xlnet": XLNetConfig(**LAYERS, d_model=32, d_inner=48),  # its embeddings are (T, 1, D)
}
CAUSAL: dict[str, Any] = {
    "bert, as a decoder": BertConfig(**ENCODER, is_decoder=True),
    "gpt2": GPT2Config(**LAYERS, n_embd=32),
    "ctrl": CTRLConfig(**LAYERS, n_embd=32, dff=48),  # changes its embeddings in place
    "mamba": MambaConfig(vocab_size=47, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mixtral": MixtralConfig(vocab_size=47, **SIZES),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*BIDIRECTIONAL, *CAUSAL])
def test_whether_logits_depend_on_later_tokens(family: str, dtype: torch.dtype) -> None:
    """Against the model's own logits, where the last token is another one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((BIDIRECTIONAL | CAUSAL)[family]).to(dtype)
    ids = torch.randint(47, (1, 8))
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 47], 1)
    with torch.no_grad():
        values = [model.eval()(input_ids=own, use_cache=False).logits[:, :-1] for own in (ids, other)]
    change = float((values[1] - values[0]).norm() / values[0].norm())
    assert dtype != torch.float32 or (change < 1e-5) == (family in CAUSAL)  # experts round otherwise in other batches
    model.train()
    assert sees_ahead(model) == (family in BIDIRECTIONAL)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def folder_of(config: Any, tokenizer: PreTrainedTokenizerFast, path: Path) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_bidirectional_encoder_is_refused_by_every_command(
    tokenizer: PreTrainedTokenizerFast, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    policy = folder_of(BIDIRECTIONAL["bert"], tokenizer, tmp_path / "bert")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1 w2"}\n')
    given = [f"--model.policy={policy}", f"--data.train={pairs_file}", "--trainer.accelerator=cpu"]
    commands: list[tuple[Any, list[str]]] = [
        (fit, [*given, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=1"]),
        (doctor, [*given, "--rows=0"]),
        (
            sample,
            [
                f"--policy={policy}",
                f"--prompts={prompts}",
                f"--output={tmp_path}/o.jsonl",
                "--max_new_tokens=8",
                "--stage=generate",
            ],
        ),
    ]
    for command, options in commands:
        code = command.main(options)
        last = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and last.startswith("error: ") and "its logits depend on later tokens" in last, command


def test_the_decoder_of_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 47, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    AutoModelForCausalLM.from_config(BartConfig(**small)).save_pretrained(tmp_path)
    BartConfig(**small).save_pretrained(tmp_path)  # that of the whole model
    for load in (load_policy, empty_model):
        with pytest.raises(UserError, match=r"an encoder-decoder \(bart\), whose decoder alone"):
            load(str(tmp_path))


def test_checkpointing_that_a_model_does_not_have_is_refused_in_one_line(
    tokenizer: PreTrainedTokenizerFast, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = folder_of(CAUSAL["ctrl"], tokenizer, tmp_path / "ctrl")
    given = [f"--model.policy={policy}", f"--data.train={pairs_file}", "--trainer.accelerator=cpu"]
    root = f"--trainer.default_root_dir={tmp_path}"
    assert fit.main([*given, root, "--trainer.max_steps=1", "--model.activation_checkpointing=true"]) == 2
    assert "--model.activation_checkpointing: CTRLLMHeadModel has none in transformers" in capsys.readouterr().err
