"""Small real parts: a random Llama saved as a Hugging Face folder, its tokenizer, and rows of the design's schema."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # tiny matrices, and tests may run side by side

WORDS = [f"w{i}" for i in range(40)]
EOS = "<eos>"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test process caches its data sets in a folder of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words, spaces and think tags are one token each; pad is not EOS."""
    special = ["<pad>", EOS, "<think>", "</think>"]
    vocabulary = {token: i for i, token in enumerate([*special, "<unk>", " ", "\n", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = decoders.Fuse()  # nothing is put between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=special[2:]
    )


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random two-layer Llama of another architecture than the built-in model."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # far from uniform predictions, so that rows differ
        attention_dropout=0.1,  # must be turned off
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random words; chosen and rejected differ in length and content."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    rows = []
    for index in range(count):
        prompt = words(2, 6)
        sides = {
            side: {"trace": f"<think> {words(3, 12)} </think> {words(1, 4)} {last}", "empty": f"{words(1, 5)} {last}"}
            for side, last in (("chosen", "w1"), ("rejected", "w2"))
        }
        rows.append(
            {
                "prompt_id": f"p{index}",
                "prompt": prompt + " ",
                "chosen": sides["chosen"]["trace"] + EOS,
                "rejected": sides["rejected"]["trace"] + EOS,
                "empty_prompt": prompt + " <think> </think> ",
                "empty_chosen": sides["chosen"]["empty"] + EOS,
                "empty_rejected": sides["rejected"]["empty"] + EOS,
            }
        )
    return rows


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 rows as JSONL."""
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", make_rows(32))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def fit_llama(llama_folder: Path, pairs_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs the command on the random Llama and returns its run folder."""
    from bvpo import fit

    def run(*options: str, root: Path = tmp_path / "runs") -> Path:
        arguments = {
            "--model.policy": str(llama_folder),
            "--data.train": str(pairs_file),
            "--trainer.default_root_dir": str(root),
            "--trainer.accelerator": "cpu",
            "--trainer.enable_progress_bar": "false",
            "--model.learning_rate": "1e-2",
            "--trainer.max_steps": "5",
        }
        given = [*(f"{key}={value}" for key, value in arguments.items()), *options]
        assert fit.main(given) == 0
        return max(root.glob("version_*"), key=lambda path: int(path.name.split("_")[1]))

    return run
