"""Every notebook runs from a clean kernel, holds narrative and calls, and is committed without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from bvpo import fit
from bvpo.ablation_table import Metric, compare, write
from tests.conftest import make_rows, write_rows

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
FIGURES = {"ablations": 3, "gradient_variance": 7, "mixing_weight": 6, "stochasticity": 3}


def execute(path: Path) -> Any:
    """The notebook, run from a clean kernel in its own folder; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


def figures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def runs(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of six steps with each anchor; the marginal one is measured at every second step."""
    folder = tmp_path_factory.mktemp("notebooks")
    anchors = [{"trace": f" w{k} w{k + 1} ", "logprob": -4.0} for k in range(4)]
    rows = write_rows(folder / "rows.jsonl", [{**row, "anchor_traces": anchors} for row in make_rows(24)])
    options = {
        "--model.policy": str(llama_folder),
        "--model.mixing": "bvpo.mixing.Fixed",
        "--model.mixing.anchor_every": "2",
        "--data.train": str(rows),
        "--trainer.accelerator": "cpu",
        "--trainer.max_steps": "6",
        "--trainer.enable_progress_bar": "false",
    }
    given = [f"{name}={value}" for name, value in options.items()]
    for anchor in ("trace", "marginal"):
        root = folder / anchor
        assert fit.main([*given, f"--model.mixing.anchor={anchor}", f"--trainer.default_root_dir={root}"]) == 0
    return {anchor: folder / anchor / "version_0" for anchor in ("trace", "marginal")}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of a grid of three cells and two seeds; a fit is missing."""
    weights = {"α = 0": 0.0, "α = 0.5": 0.5, "Optimal": 0.31}
    values = {
        cell: {
            seed: {"thinking": 0.8 + 0.1 * a + 0.01 * seed, "α in use": a + 0.02 * seed * (a == 0.31)}
            for seed in (0, 1)
        }
        for cell, a in weights.items()
    }
    del values["Optimal"][1]
    metrics = [Metric("thinking", ("accuracy/thinking",)), Metric("α in use", ("mean mixing/alpha",))]
    folder = tmp_path_factory.mktemp("grid")
    write(compare(values, dict.fromkeys(weights, "α = 0.5"), metrics), values, "A note.", folder)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_definitions_and_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    lines = [line.lstrip() for cell in cells for line in cell.source.splitlines()]
    assert not any(line.startswith(("def ", "class ")) or "lambda" in line for line in lines)
    assert notebook.cells[0].cell_type == "markdown"
    assert set(FIGURES) == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, runs: dict[str, Path], grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN", str(runs["marginal" if path.stem == "gradient_variance" else "trace"]))
    monkeypatch.setenv("OUTPUT", str(grid))
    assert figures(execute(path)) == FIGURES[path.stem]
