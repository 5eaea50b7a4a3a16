"""The default fit on the tiny reasoner, shortened, and its statistics from sketches beside those of whole gradients."""

from __future__ import annotations

import io
from pathlib import Path

import lightning as L
import pytest
from rich.console import Console

from bvpo.data import PairData
from bvpo.mixing import Fixed
from bvpo.module import BVPO
from bvpo.report import print_report
from bvpo.task_accuracy import TaskAccuracy


def fit(module: BVPO, data: PairData, steps: int, root: Path, *callbacks: L.Callback) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        default_root_dir=root,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, datamodule=data)
    return trainer


def test_a_short_default_fit_raises_held_out_accuracy(tmp_path: Path) -> None:
    """30 of the default's 75 steps, 400 questions a mode. The paired difference has a standard error near 1.5 points; a
    sign error in the loss, or branches that learn nothing, would not raise it by 1 point."""
    module = BVPO(beta=0.5, learning_rate=2e-4, accumulate=4)
    accuracy = TaskAccuracy(questions=400)
    trainer = fit(module, PairData(batch_size=4, accumulate=4), 30, tmp_path, accuracy)
    gains = {mode: accuracy.after[mode].mean - accuracy.before[mode].mean for mode in accuracy.after}
    assert sum(gains.values()) / 2 > 0.01
    assert module.metrics["reward/trace_margin"] > 0 and module.metrics["reward/empty_margin"] > 0
    assert module.metrics["variance/trace"] > module.metrics["variance/empty"]

    shown = io.StringIO()
    print_report(trainer, module, str(tmp_path), Console(file=shown, width=100))
    for line in ("thinking", "no_thinking", "mean of both", "α in use", "α̂", "variance, mixed", "tensorboard --logdir"):
        assert line in shown.getvalue()


@pytest.mark.parametrize("alpha", [0.0, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.5, 1.0))])
def test_sketches_stand_for_whole_gradients(alpha: float, tmp_path: Path) -> None:
    """The same fit twice, 622,080 numbers a gradient beside 32,768: ‖g‖² within 3%, cosines within 0.02, α̂ within one
    standard error. The bounds are 3.8 and more standard deviations of a sketch's inner product."""
    runs = []
    for size in (32_768, 10**7):
        module = BVPO(beta=0.5, learning_rate=2e-4, accumulate=4, mixing=Fixed(alpha, window=6), sketch_size=size)
        fit(module, PairData(batch_size=2, accumulate=4), 6, tmp_path)
        assert module.monitor is not None and module.monitor.estimate is not None
        runs.append((module.metrics, module.monitor.estimate))
    (sketched, estimate), (whole, exact) = runs
    for branch in ("trace", "empty"):
        key = f"gradient/{branch}_norm"
        assert sketched[key] ** 2 == pytest.approx(whole[key] ** 2, rel=0.03)
    assert sketched["gradient/cosine"] == pytest.approx(whole["gradient/cosine"], abs=0.02)
    assert sketched["gradient/mixed_norm"] == whole["gradient/mixed_norm"]
    assert estimate.value is not None and exact.value is not None and exact.standard_error is not None
    assert abs(estimate.value - exact.value) < exact.standard_error
