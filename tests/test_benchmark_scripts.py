"""The benchmarks are scripts beside the package: what they import is there, and figures go with what they need."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL_STEP = "--repeats=1 --rows=1 --layers=1 --hidden=128 --vocabulary=512"
RUNS = [  # every script and every kind of work that it has, as small as its options allow
    "coverage truth",
    "generation --prompts=2 --responses=2 --alone=2 --rounds=1",
    "generation --model=large --prompts=2 --responses=2 --alone=1 --rounds=1",
    "monitor_cost --steps=22",
    "packed --pairs=1 --rounds=1",
    "packed --pairs=1 --profile --dtype=bfloat16",
    "scaling --axes rows --repeats=1 --reference=cached",
    f"step --dtype=fp32 {SMALL_STEP} --only trl-live trl-cached joint-cached padded-cached+α̂ packed-live+α̂",
    f"step --dtype=bf16 {SMALL_STEP} --only padded-live packed-cached",
    "tokenize_rows --rows=60",
    "tokenize_rows --rows=60 --parquet",
    "trace_share --prompts=24 --samples=8",
]


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python does for a script."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_a_benchmark_can_be_imported(name: str) -> None:
    assert importlib.import_module(name).__doc__


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_a_benchmark_runs(command: str, tmp_path: Path) -> None:
    name, *options = command.split()
    wanted = bool({"truth", "--profile"}.isdisjoint(options))  # else it prints, and keeps nothing
    words = [sys.executable, str(FOLDER / f"{name}.py"), *options, *(["--json=figures.json"] if wanted else [])]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() and "cannot run and is left out" not in done.stdout
    assert not wanted or json.loads((tmp_path / "figures.json").read_text())["versions"]


@pytest.mark.slow
def test_the_tables_of_many_draws_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    coverage = importlib.import_module("coverage")
    monkeypatch.setattr(coverage, "RUNS", 2)
    coverage.intervals()
    coverage.descent(steps=2, seeds=2)


def test_every_benchmark_is_run() -> None:
    programs = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
    assert {command.split()[0] for command in RUNS} == programs


@pytest.mark.parametrize("steps", ["8", "20", "41"])
def test_steps_that_leave_no_pairs_to_compare_are_refused_before_the_fit(
    steps: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["monitor_cost.py", "--steps", steps])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("monitor_cost").main()
    assert ended.value.code == 2
    assert f"--steps {steps}: must be even and over 20" in capsys.readouterr().err


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
