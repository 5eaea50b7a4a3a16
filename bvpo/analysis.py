"""Run folders → data frames and plots: all that the notebooks import. Needs the `notebooks` extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from bvpo.errors import UserError
from bvpo.mixing import AlphaEstimate
from bvpo.oracle import ExactMoments


def read_run(folder: str | Path) -> pd.DataFrame:
    """The run's log: one row an optimizer step, one column a log key.

    Raises:
        UserError: The folder holds no metrics.csv.
    """
    path = Path(folder) / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{folder}: no metrics.csv in this folder; give a run folder such as runs/version_0")
    return pd.read_csv(path).groupby("step").first()


def newest_run(root: str | Path = "runs") -> Path:
    """The `version_N` folder with the highest N. Raises UserError where there is none."""
    versions = {int(p.name.removeprefix("version_")): p for p in Path(root).glob("version_[0-9]*") if p.is_dir()}
    if not versions:
        raise UserError(f"{root}: no run in this folder; start one with python -m bvpo.fit")
    return versions[max(versions)]


def plot_variance(run: pd.DataFrame, batch_size: int) -> Figure:
    """Variance of one optimizer batch's trace, empty-trace and mixed gradient over the run."""
    axes = _axes("Variance of one optimizer batch's gradient", "trΣ, summed over parameters")
    for key, label in (("trace", "trace"), ("empty", "empty trace")):
        axes.plot(run.index, run[f"variance/{key}"] / batch_size, label=label)
    axes.plot(run.index, run["variance/mixed"], label="mixed, at the α in use")
    return _finish(axes)


def plot_alpha(run: pd.DataFrame, window: int, level: float = 0.95) -> Figure:
    """α in use, and α̂ with its interval over a window of `window` steps."""
    axes = _axes("Mixing weight", "weight of the trace gradient")
    axes.plot(run.index, run["mixing/alpha"], color="black", label="α in use")
    (line,) = axes.plot(run.index, run["mixing/alpha_estimate"], label=f"α̂, {level:.0%} interval")
    half = student_t.ppf((1 + level) / 2, window - 1) * run["mixing/alpha_standard_error"]
    low, high = (run["mixing/alpha_estimate"] - half).clip(0, 1), (run["mixing/alpha_estimate"] + half).clip(0, 1)
    axes.fill_between(run.index, low, high, alpha=0.2, color=line.get_color())
    axes.set_ylim(0, 1)
    return _finish(axes)


def plot_rewards(run: pd.DataFrame) -> Figure:
    """Implicit rewards of chosen and rejected completions in both branches."""
    axes = _axes("Implicit reward", "β log π/π_ref, nats")
    for branch, style in (("trace", "-"), ("empty", "--")):
        for side, color in (("chosen", "C0"), ("rejected", "C3")):
            axes.plot(run.index, run[f"reward/{branch}_{side}"], style, color=color, label=f"{branch}, {side}")
    return _finish(axes)


def plot_error(moments: ExactMoments, estimate: AlphaEstimate, batch_size: int) -> Figure:
    """The exact MSE_B(α) of an enumerable model, its minimum, and α̂ with its interval."""
    axes = _axes(f"Squared error of the mixed gradient, B = {batch_size}", "E‖g_c − μ‖²", "α")
    alphas = [k / 200 for k in range(201)]
    axes.plot(alphas, [moments.mean_squared_error(a, batch_size) for a in alphas], color="black", label="exact")
    best = moments.optimal_alpha(batch_size)
    axes.plot([best], [moments.mean_squared_error(best, batch_size)], "o", color="black", label=f"α* = {best:.3f}")
    interval = estimate.interval()
    if estimate.value is not None and interval is not None:
        axes.axvline(estimate.value, color="C1", label=f"α̂ = {estimate.value:.3f}, 95% interval")
        axes.axvspan(*interval, color="C1", alpha=0.2)
    axes.set_yscale("log")
    return _finish(axes)


def plot_optimum(curves: Mapping[str, Mapping[float, float]], xlabel: str, logarithmic: bool = False) -> Figure:
    """α* against the batch size or the distance from the reference: a curve a label, x → α."""
    axes = _axes("Weight of least error", "α*", xlabel)
    for label, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), "o-", label=label)
    axes.set_ylim(0, 1)
    if logarithmic:
        axes.set_xscale("log", base=2)
    return _finish(axes)


def _axes(title: str, ylabel: str, xlabel: str = "optimizer steps") -> Axes:
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return axes


def _finish(axes: Axes) -> Figure:
    axes.legend(frameon=False)
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure
