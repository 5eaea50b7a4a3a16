"""What makes cached log-probabilities those of another reference: each byte of the weights, and the configuration."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bvpo.packed import use_packed_attention
from bvpo.policy import load_policy
from bvpo.reference_cache import weights_fingerprint


def changed(folder: Path, target: Path, **facts: object) -> Path:
    """A copy of a model with other configuration values."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | facts))
    return target


def test_one_row_of_a_large_embedding_is_seen() -> None:
    embedding = nn.Embedding(151_000, 4)
    before = weights_fingerprint(embedding)
    with torch.no_grad():
        embedding.weight[1, 2] += 1
    assert weights_fingerprint(embedding) != before
    with torch.no_grad():
        embedding.weight[[1, 2]] = embedding.weight[[2, 1]]
    assert weights_fingerprint(embedding) != before


@pytest.mark.parametrize(
    "facts",
    [
        {"rope_parameters": {"rope_theta": 20.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 1e-3},
    ],
)
def test_the_same_weights_with_another_configuration_are_another_reference(
    llama_folder: Path, tmp_path: Path, facts: dict[str, object]
) -> None:
    before = weights_fingerprint(load_policy(str(llama_folder)))
    assert weights_fingerprint(load_policy(str(changed(llama_folder, tmp_path / "other", **facts)))) != before


def test_what_changes_no_value_changes_no_fingerprint(llama_folder: Path, tmp_path: Path) -> None:
    """Another folder, another version's note, another way to compute attention."""
    model = load_policy(str(llama_folder))
    before = weights_fingerprint(model)
    copied = changed(llama_folder, tmp_path / "other", transformers_version="4.0.0", dtype="bfloat16")
    assert weights_fingerprint(load_policy(str(copied))) == before
    assert use_packed_attention(model) is None and weights_fingerprint(model) == before


def test_a_fit_does_not_take_another_configurations_values(
    fit_llama: Callable[..., Path], llama_folder: Path, tmp_path: Path
) -> None:
    """The policy is its own reference: at step 0 both losses are ln 2."""
    options = [
        "--model.reference_logps=cached",
        f"--model.reference_cache={tmp_path / 'cache'}",
        "--trainer.max_steps=1",
    ]
    fit_llama(*options)
    other = changed(llama_folder, tmp_path / "theta", rope_parameters={"rope_theta": 20.0, "rope_type": "default"})
    run = fit_llama(*options, f"--model.policy={other}")
    with (run / "metrics.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert float(first["loss/trace"]) == pytest.approx(math.log(2), rel=1e-5)
