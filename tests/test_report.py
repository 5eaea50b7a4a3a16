"""The table that a fit ends with, and lines that name files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bvpo.anchor import AnchorQuality
from bvpo.gradients import Group, Sketch
from bvpo.mixing import Optimal
from bvpo.monitor import GradientMonitor, Units
from bvpo.report import held
from bvpo.sample_report import Summary, print_summary

Fit = Callable[..., Path]
MARKUP = ["[lr=2e-4]", "[b]sweep[/b]", "a[/x]", ":warning:"]


@pytest.mark.parametrize("name", MARKUP)
def test_the_run_folder_is_named_as_it_is(
    name: str, fit_llama: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit_llama("--trainer.max_steps=1", root=tmp_path / name)
    assert run.is_dir()
    assert f"run folder   {run}\ncurves       tensorboard --logdir {tmp_path / name}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", MARKUP)
def test_the_rows_file_is_named_as_it_is(name: str, tmp_path: Path) -> None:
    shown = io.StringIO()
    print_summary(Summary(4, 0, 2, rows=4), f"{name}.parquet", tmp_path, Console(file=shown))
    assert f"rows        {name}.parquet\n" in shown.getvalue()
    assert f"python -m bvpo.doctor --data.train {name}.parquet ...\n" in shown.getvalue()


@pytest.mark.parametrize(
    ("options", "title"),
    [
        (["--trainer.max_steps=1"], ", last 1 step"),
        (["--trainer.max_steps=2"], ", last 2 steps"),
        (["--trainer.max_steps=5", "--model.mixing.window=3"], ", last 3 steps"),
        (["--trainer.max_steps=2", "--model.mixing.window=0"], ""),
    ],
)
def test_the_title_names_the_steps_that_the_window_holds(
    options: list[str], title: str, fit_llama: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_llama(*options)
    words = " ".join(capsys.readouterr().out.split())
    assert f"Gradients, optimizer batch of 4 rows{title} ┏" in words


def test_of_the_marginal_anchor_measurements_are_counted() -> None:
    """Five steps, of which 0, 2 and 4 measure the anchor, in a window of four."""
    monitor = GradientMonitor(Optimal(window=4, anchor="marginal", anchor_every=2), [Group("all", [0], Sketch(4))], 2)
    monitor.resume(batch_rows=8)
    assert held(monitor) == ", last 0 steps, α̂ of 0 measurements"
    good, counts = AnchorQuality(torch.tensor([4.0, 1.0, 0.1, 1.0])), torch.ones(3, 3, 2, dtype=torch.float64)
    for step in range(5):
        units = Units(torch.randn(3, 2, 4), counts, torch.tensor([[2 * step], [2 * step + 1]]))
        monitor.update(units, step, good if monitor.measures_anchor(step) else None)
    assert held(monitor) == ", last 4 steps, α̂ of 3 measurements"
    assert held(None) == ""
