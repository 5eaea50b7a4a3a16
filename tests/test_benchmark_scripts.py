"""The benchmarks are scripts beside the package: what they import is there, and figures go with what they need."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python does for a script."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_a_benchmark_can_be_imported(name: str) -> None:
    assert importlib.import_module(name).__doc__


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
