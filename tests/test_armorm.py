"""ArmoRM: a small random checkpoint of the published layout, against its equation written out once more.

The published files, read from their headers: `model.*`, `regression_layer.weight`, `reward_transform_matrix`,
`gating.layers.{0..3}.{weight,bias}` and `gating.logit_scale`; there is no `score.weight`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from bvpo.armorm import GATING_PATTERN, Head, gating_position, load_armorm
from bvpo.errors import UserError
from bvpo.rewards import Item, SequenceRewardModel

OBJECTIVES, HIDDEN, GATING_HIDDEN = 5, 16, 12
LLAMA3 = {  # the ids that the published tokenizer gives to the parts of Llama 3's template
    "<|begin_of_text|>": 128000,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
    "assistant": 78191,
    "user": 882,
    "\n\n": 271,
}
WORDS = ["a", "b", "c", "d", "é", "日本", " "]


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<unk>", *WORDS])} | LLAMA3
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\s|[^\s<]+"), "isolated")
    special = [token for token in LLAMA3 if token.startswith("<")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], unk_token="<unk>", extra_special_tokens=special[1:]
    )
    tokenizer.chat_template = (files("trl") / "chat_templates" / "llama3.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The head, in the published names."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    widths = [HIDDEN, GATING_HIDDEN, GATING_HIDDEN, GATING_HIDDEN, OBJECTIVES]
    head = {
        "regression_layer.weight": random(OBJECTIVES, HIDDEN),
        "reward_transform_matrix": random(OBJECTIVES, OBJECTIVES),
        "gating.logit_scale": torch.tensor([1.7]),
    }
    for index in range(4):
        head[f"gating.layers.{index}.weight"] = random(widths[index + 1], widths[index])
        head[f"gating.layers.{index}.bias"] = random(widths[index + 1])
    return head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint in one file."""
    folder = tmp_path_factory.mktemp("armorm") / "single"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=64,
        num_labels=1,
        num_objectives=OBJECTIVES,
        gating_hidden_dim=GATING_HIDDEN,
        gating_n_hidden=3,
        gating_temperature=0.5,
    )
    body = LlamaModel(config)
    config.save_pretrained(folder)
    edit = json.loads((folder / "config.json").read_text())
    edit["architectures"] = ["LlamaForRewardModelWithGating"]
    edit["auto_map"] = {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"}
    (folder / "config.json").write_text(json.dumps(edit))
    (folder / "modeling_custom.py").write_text("raise SystemExit('remote code was run')")
    state = {f"model.{name}": tensor for name, tensor in body.state_dict().items()} | tensors
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    llama3_tokenizer().save_pretrained(folder)
    return folder


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of the checkpoint with its tensors changed in place."""
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def sharded(folder: Path, target: Path) -> Path:
    """A copy in three files with an index; the head lies in two of them."""
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = dict(list(state.items())[number::3])
        save_file(part, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


ITEMS = [
    Item([{"role": "user", "content": question}], answer)
    for question, answer in [("a b", "c"), ("a b", "c d é"), ("日本 a", "b a b a b a"), ("d", ""), ("a b", "c")]
]
TURNS = [("user", "a"), ("assistant", "b"), ("user", "c d")]
ITEMS.append(Item([{"role": role, "content": content} for role, content in TURNS], "é a"))


def recomputed(folder: Path, item: Item) -> float:
    """The score of one conversation, term by term, from the file's tensors."""
    tokenizer = llama3_tokenizer()
    messages = [*item.conversation, {"role": "assistant", "content": item.answer}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids.count(LLAMA3["<|begin_of_text|>"]) == 1
    state = load_file(folder / "model.safetensors")
    body = LlamaModel(LlamaConfig.from_pretrained(folder))
    body.load_state_dict({key[6:]: value for key, value in state.items() if key.startswith("model.")})
    with torch.no_grad():
        hidden = body.eval()(torch.tensor([ids])).last_hidden_state[0]
    prompt_end = max(i for i in range(len(ids)) if ids[i : i + 5] == [128009, 128006, 78191, 128007, 271])
    x = hidden[prompt_end]
    for index in range(3):
        x = torch.relu(state[f"gating.layers.{index}.weight"] @ x + state[f"gating.layers.{index}.bias"])
    x = state["gating.layers.3.weight"] @ x + state["gating.layers.3.bias"]
    gates = torch.exp(x / 0.5) / torch.exp(x / 0.5).sum() * state["gating.logit_scale"]
    rewards = state["regression_layer.weight"] @ hidden[-1]
    score = 0.0
    for k in range(OBJECTIVES):
        adjusted = sum(float(rewards[j] * state["reward_transform_matrix"][j, k]) for j in range(OBJECTIVES))
        score += float(gates[k]) * adjusted
    return score


def reward(folder: Path, **settings: Any) -> SequenceRewardModel:
    return SequenceRewardModel(str(folder), dtype="float32", device="cpu", **settings)


def test_scores_are_those_of_the_equation(folder: Path, tmp_path: Path) -> None:
    """In one file or in three, alone or in batches; fp32 sums in another order differ in the last digits."""
    expected = torch.tensor([recomputed(folder, item) for item in ITEMS])
    assert expected.unique().numel() == 5  # the first and the fifth item are the same
    for path in (folder, sharded(folder, tmp_path / "sharded")):
        for batch_size in (1, 2, 6):
            scores = reward(path, batch_size=batch_size).scores(ITEMS)
            assert_close(torch.tensor(scores), expected, atol=1e-5, rtol=1e-5)


def test_the_published_temperature_and_sizes_are_the_defaults() -> None:
    head = Head(LlamaConfig(hidden_size=8, num_attention_heads=2))
    assert head.gating.temperature == 10
    shapes = {key: tuple(tensor.shape) for key, tensor in head.state_dict().items() if key.endswith("weight")}
    assert shapes == {
        "regression_layer.weight": (19, 8),
        "gating.layers.0.weight": (1024, 8),
        "gating.layers.1.weight": (1024, 1024),
        "gating.layers.2.weight": (1024, 1024),
        "gating.layers.3.weight": (19, 1024),
    }
    assert head.reward_transform_matrix.shape == (19, 19)


def test_the_body_may_be_in_bfloat16_and_the_head_is_not(folder: Path) -> None:
    network = load_armorm(str(folder), torch.bfloat16)
    assert {p.dtype for p in network.body.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in network.head.parameters()} == {torch.float32}
    scores = SequenceRewardModel(str(folder), dtype="bfloat16", device="cpu").scores(ITEMS)
    rounded = torch.tensor(scores).bfloat16().float()
    assert (torch.tensor(scores) != rounded).any()


@pytest.mark.parametrize("key", ["regression_layer.weight", "gating.layers.3.bias", "gating.logit_scale"])
def test_a_missing_tensor_of_the_head_is_refused(folder: Path, tmp_path: Path, key: str) -> None:
    path = changed(folder, tmp_path / "copy", lambda state: state.pop(key))
    with pytest.raises(UserError, match=rf"{key} is missing"):
        reward(path).scores(ITEMS)


def test_a_missing_tensor_of_the_body_is_refused(folder: Path, tmp_path: Path) -> None:
    path = changed(folder, tmp_path / "copy", lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        reward(path).scores(ITEMS)


@pytest.mark.parametrize("key", ["score.weight", "gating.layers.4.weight", "model.layers.2.mlp.up_proj.weight"])
def test_an_unknown_tensor_is_refused(folder: Path, tmp_path: Path, key: str) -> None:
    path = changed(folder, tmp_path / "copy", lambda state: state.update({key: torch.zeros(1, HIDDEN)}))
    with pytest.raises(UserError, match=rf"{key.removeprefix('model.')} is unknown"):
        reward(path).scores(ITEMS)


@pytest.mark.parametrize("key", ["reward_transform_matrix", "model.norm.weight"])
def test_a_tensor_of_another_shape_is_refused(folder: Path, tmp_path: Path, key: str) -> None:
    path = changed(folder, tmp_path / "copy", lambda state: state.update({key: torch.zeros(3)}))
    with pytest.raises(UserError, match=rf"{key.removeprefix('model.')} is of another shape"):
        reward(path).scores(ITEMS)


def test_a_lost_shard_is_refused(folder: Path, tmp_path: Path) -> None:
    path = sharded(folder, tmp_path / "sharded")
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003"):
        reward(path).scores(ITEMS)


def test_another_template_is_refused(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "copy")
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="isn't Llama 3's"):
        reward(path).scores(ITEMS)


def test_gating_reads_the_last_start_of_the_pattern() -> None:
    assert gating_position([1, *GATING_PATTERN, 2, *GATING_PATTERN, 3]) == 7
    assert gating_position(GATING_PATTERN) == 0
    for ids in ([], GATING_PATTERN[:-1], GATING_PATTERN[1:]):
        with pytest.raises(UserError):
            gating_position(ids)
