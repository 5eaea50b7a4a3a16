"""The benchmarks are scripts beside the package: what they import is there, and figures go with what they need."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python does for a script."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_a_benchmark_can_be_imported(name: str) -> None:
    assert importlib.import_module(name).__doc__


class Enough(Exception):
    """Ends a case, whose steps have no end."""


class TwoSteps:
    """What a case's process is told by its parent, without the two."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def begin(self) -> None:
        self.begun += 1

    def end(self) -> None:
        self.ended += 1
        if self.ended == 2:
            raise Enough


@pytest.mark.parametrize("name", ["joint-cached", "padded-live", "packed-cached+α̂", "product-live"])
def test_a_compared_step_can_be_taken(name: str, tmp_path: Path) -> None:
    variants = importlib.import_module("variants")
    setting = variants.Setting(
        prompt=(3, 5), trace=(4, 9), answer=(2, 4), rows=2, layers=1, hidden=64, vocabulary=64
    ).with_weights(str(tmp_path))
    variant = next(own for own in [*variants.VARIANTS, variants.PRODUCT] if own.name == name)
    turns = TwoSteps()
    with pytest.raises(Enough):
        variants.run(variants.Case(variant, setting), turns)
    assert turns.begun == turns.ended == 2


def test_the_model_for_a_gpu_is_qwen2() -> None:
    variants = importlib.import_module("variants")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(variants.Setting(shape="qwen2-1.5b").config())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.54e9, rel=0.01)


def test_the_work_of_a_step_is_told_by_its_operations() -> None:
    kinds = importlib.import_module("kinds_of_work")
    states, matrix = torch.randn(2, 64, 64), torch.randn(64, 64, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        own = states @ matrix
        torch.nn.functional.scaled_dot_product_attention(own, own, own).log_softmax(-1).sum().backward()
    seconds = kinds.seconds_by_kind(profiler, spent=10.0)
    assert list(seconds) == list(kinds.KINDS)
    assert sum(seconds.values()) == pytest.approx(10.0)  # what it did not see is the rest
    assert all(seconds[kind] > 0 for kind in (kinds.PRODUCTS, kinds.ATTENTION, kinds.VOCABULARY))
    assert kinds.kind_of("aten::_fused_adamw_") == kinds.OPTIMIZER
    assert kinds.kind_of("aten::as_strided") == kinds.REST


def test_a_record_says_what_was_measured_with_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = importlib.import_module("record")
    model = tmp_path / "folder" / "model"
    monkeypatch.setattr(sys, "argv", ["benchmarks/step.py", "--model", str(model), "--rows", "2"])
    facts = record.circumstances()
    assert facts["command"] == "python step.py --model model --rows 2"  # the machine's folders are nobody's business
    assert facts["versions"]["torch"] and "cores" in facts["hardware"]
    record.write(str(tmp_path / "figures.json"), facts, {"ratio": 4.2})
    assert json.loads((tmp_path / "figures.json").read_text()) == facts | {"ratio": 4.2}
    record.write(None, facts, {})
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_kept_record_is_dated_and_complete(path: Path) -> None:
    kept = json.loads(path.read_text())
    assert path.name.startswith(kept["date"])
    assert all(kept[key] for key in ("command", "commit", "versions", "hardware"))
