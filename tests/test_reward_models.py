"""Reward models: a score is the model's own, of the answer alone, whatever else is in the batch.

They are small and random, with DeepSeek's real tokenizer and the chat templates that `trl` ships.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from bvpo.errors import UserError
from bvpo.rewards import CachedReward, Item, SequenceRewardModel
from tests.test_traces import deepseek, template

TINY: dict[str, Any] = {
    "vocab_size": 129000,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,  # scores differ by far more than the tolerances
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_labels": 1,
}
MODELS: dict[str, PreTrainedConfig] = {
    "without pad token": LlamaConfig(**TINY),
    "pad token beyond the vocabulary": LlamaConfig(**TINY, pad_token_id=-1),
    "pad token is EOS": Qwen3Config(**TINY, pad_token_id=1),
    "learned positions": GPT2Config(
        vocab_size=129000, n_embd=16, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3, num_labels=1
    ),
}
ANSWERS = ["It is 4.", "", "Ja — été 日本 🙂\n\n    x = 1\n", "w " * 40 + "end", "4", "It is 4.", "  spaced  "]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ITEMS = [Item(user("What is 2 + 2?"), answer) for answer in ANSWERS]
ITEMS += [Item([*user("Hi."), {"role": "assistant", "content": "Hello."}, *user("Bye?")], "Bye.")]


def save(folder: Path, config: PreTrainedConfig, chat_template: str = "deepseek_r1_distill") -> Path:
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    deepseek(template(chat_template), adds_bos=True).save_pretrained(folder)
    return folder


def plain(folder: Path, **settings: Any) -> SequenceRewardModel:
    return SequenceRewardModel(str(folder), dtype="float32", device="cpu", **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "llama", MODELS["without pad token"])


@pytest.fixture(scope="module")
def tiny(folder: Path) -> SequenceRewardModel:
    """Loaded once."""
    return plain(folder)


def test_an_item_has_no_trace() -> None:
    assert [entry.name for entry in fields(Item)] == ["conversation", "answer", "reference"]


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_the_models_own_whatever_the_batch(kind: str, tmp_path: Path) -> None:
    """Against transformers, one unpadded conversation at a time.

    fp32 sums over a padded row differ in the last digits.
    """
    path = save(tmp_path / "model", MODELS[kind])
    plain_model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = deepseek(template("deepseek_r1_distill"), adds_bos=True)
    expected = []
    for item in ITEMS:
        messages = [*item.conversation, {"role": "assistant", "content": item.answer}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        with torch.no_grad():
            expected.append(float(plain_model(input_ids=torch.tensor([ids])).logits))
    assert len(set(expected)) == len(ITEMS) - 1  # the first answer comes twice
    model = plain(path, batch_size=3)
    alone = [score for item in ITEMS for score in model.scores([item])]
    for scores in (model.scores(ITEMS), model.scores(ITEMS[::-1])[::-1], alone):
        assert_close(torch.tensor(scores), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_equal_answers_tie_exactly(tiny: SequenceRewardModel) -> None:
    """Of five equal rows of one batch, a matrix product may round one another way."""
    scores = tiny.scores([ITEMS[0]] * 5)
    assert len(set(scores)) == 1


def test_nothing_to_score_is_no_scores(tiny: SequenceRewardModel) -> None:
    assert tiny.scores([]) == []


def test_the_head_is_in_fp32(folder: Path, tiny: SequenceRewardModel) -> None:
    """In bfloat16 scores would have 8 bits, and different answers would tie."""
    scores = torch.tensor(SequenceRewardModel(str(folder), dtype="bfloat16", device="cpu").scores(ITEMS))
    assert (scores != scores.bfloat16().float()).any()
    exact = torch.tensor(tiny.scores(ITEMS))
    assert_close(scores, exact, atol=0.1 * float(exact.abs().max()), rtol=0)  # the body's bfloat16


def test_an_overlong_conversation_has_no_score_and_is_counted(folder: Path, tiny: SequenceRewardModel) -> None:
    long = replace(ITEMS[0], answer="word " * 300)  # beyond the model's 256 positions
    with pytest.warns(UserWarning, match="of 2 answers have no score: 1 longer than 256 tokens"):
        assert tiny.scores([long, ITEMS[0]]) == [None, *tiny.scores([ITEMS[0]])]
    with pytest.warns(UserWarning, match="of 1 answers have no score: 1 longer than 5 tokens"):
        assert plain(folder, max_length=5).scores([ITEMS[0]]) == [None]


def test_an_answer_that_the_template_cuts_has_no_score_and_is_counted(tiny: SequenceRewardModel) -> None:
    """R1's template takes all up to `</think>` out of an assistant's turn."""
    with pytest.warns(UserWarning, match="1 cut by the chat template"):
        assert tiny.scores([replace(ITEMS[0], answer="so</think>4")]) == [None]


def test_a_randomly_initialised_head_is_refused(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "copy")
    state = load_file(path / "model.safetensors")
    state.pop("score.weight")
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing .* score\.weight"):
        plain(path).scores(ITEMS)


@pytest.mark.parametrize("labels", [2, 3])
def test_other_than_one_label_is_refused(folder: Path, tmp_path: Path, labels: int) -> None:
    path = save(tmp_path / "model", LlamaConfig(**(TINY | {"num_labels": labels})))
    with pytest.raises(UserError, match=f"has {labels} labels"):
        plain(path).scores(ITEMS)


def test_a_language_model_is_refused(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "copy")
    config = AutoConfig.from_pretrained(path, num_labels=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    with pytest.raises(UserError, match="may be a language model"):
        plain(path).scores(ITEMS)


def test_scores_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "copy")
    state = load_file(path / "model.safetensors")
    state["score.weight"][:] = math.inf
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not finite in float32"):
        plain(path).scores(ITEMS)


def test_a_tokenizer_without_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "copy")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        plain(path).scores(ITEMS)


def test_what_cannot_be_loaded_is_said_without_a_traceback(tmp_path: Path) -> None:
    for name in ("nobody/no-such-reward-model", str(tmp_path / "absent")):
        with pytest.raises(UserError, match=name):
            SequenceRewardModel(name).scores(ITEMS)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Item([], "x"), "an empty list"),
        (Item([{"role": "assistant", "content": "x"}], "x"), "expected a user turn"),
        (Item(user("x"), "\ud800"), "answer 1: character 1 is a lone surrogate"),
    ],
)
def test_what_is_no_conversation_is_refused(tiny: SequenceRewardModel, item: Item, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.scores([item])


def test_a_device_that_is_absent_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot be put on device 'cuda:99'"):
        SequenceRewardModel(str(folder), dtype="float32", device="cuda:99").scores(ITEMS)


def test_a_configuration_that_makes_no_sense_is_refused(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hidden_size": 17}))
    with pytest.raises(UserError, match="hidden size"):
        plain(path).scores(ITEMS)


@pytest.mark.parametrize("setting", ["batch_size", "max_length"])
def test_settings_below_one_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=setting):
        SequenceRewardModel("x", **{setting: 0})


def test_a_cache_loads_no_model_for_what_it_knows(folder: Path, tiny: SequenceRewardModel, tmp_path: Path) -> None:
    path = tmp_path
    scores = CachedReward(tiny, path).scores(ITEMS)
    inner = plain(folder)
    assert CachedReward(inner, path).scores(ITEMS) == scores
    assert "_network" not in vars(inner)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "no config.json in this folder"),
        ("config.json", b"{", "cannot be loaded"),
        ("config.json", b'{"model_type": "llama", "num_labels": 2}', "has 2 labels"),
        ("model.safetensors", None, "no weights in this folder"),
        ("tokenizer.json", b"{", "cannot be loaded"),
        ("chat_template.jinja", None, "no chat template"),
        ("", None, "there is no such folder"),
    ],
)
def test_what_is_no_reward_model_is_seen_before_anything_is_scored(
    name: str, content: bytes | None, message: str, folder: Path, tmp_path: Path
) -> None:
    """By its fingerprint, which loads no weights."""
    path = shutil.copytree(folder, tmp_path / "copy")
    if content is not None:
        (path / name).write_bytes(content)
    elif name:
        (path / name).unlink()
    with pytest.raises(UserError, match=message):
        _ = plain(path if name else path / "absent").fingerprint


def test_other_weights_in_the_same_folder_are_another_reward(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "copy")
    before = plain(path).fingerprint
    assert plain(path).fingerprint == before != plain(path, max_length=7).fingerprint
    (path / "model.safetensors").write_bytes(b"")
    assert plain(path).fingerprint != before
