"""Figures of runs, grids of fits and the oracle, from what `analysis` has read. Needs the `notebooks` extra.

An estimator keeps its colour; the palette is one that colour-blind readers can part.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvpo.ablation_table import literal
from bvpo.analysis import GridResults, Run, alpha_interval, last_error_terms, measured_trace_variance, running_mean
from bvpo.mixing import AlphaEstimate, mean_squared_error, optimal_alpha
from bvpo.oracle import ExactMoments, Oracle

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
OF = {"trace": COLORS[1], "empty": COLORS[0], "mixed": "black"}
NAMES = {"trace": "trace gradient", "empty": "empty-trace gradient"}
STEPS = "optimizer steps"


# ---------------------------------------------------------------------- runs


def plot_variance(run: Run) -> Figure:
    """Variance of one optimizer batch's trace, empty-trace and mixed gradient over the run."""
    title = "Variance of one optimizer batch's gradient"
    if not any(run.logged(f"variance/{of}") for of in OF):
        return _absent(title, "no variance is in this log:\nit needs --model.mixing.window and two units")
    axes = make_axes(title, f"trΣ / B, summed over parameters, B = {run.batch_size}")
    for name in ("trace", "empty"):
        _curve(axes, run.batch_variance(name), OF[name], NAMES[name])
    _curve(axes, run.series("variance/mixed"), OF["mixed"], "mixed gradient, at the α in use")
    axes.set_ylim(bottom=0)
    return finish(axes)


def plot_noise_scale(run: Run) -> Figure:
    """trΣ/‖E g‖² of both gradients beside the optimizer batch; a gap where the estimate of ‖E g‖² is not positive."""
    axes = make_axes("Noise scale", "trΣ / ‖E g‖², rows")
    for name in ("trace", "empty"):
        scale = run.series(f"gradient/noise_scale_{name}") * run.overlap()[name]  # pairs → rows
        _curve(axes, scale.where(scale > 0), OF[name], NAMES[name])
    axes.axhline(run.batch_size, color="0.4", linestyle="--", label=f"optimizer batch, {run.batch_size} rows")
    axes.set_yscale("log")
    return finish(axes)


def plot_cosine(run: Run) -> Figure:
    """Cosine of each batch's trace and empty-trace gradient, and its mean over the window ± one standard error."""
    axes = make_axes("Cosine of the batch's two gradients", "⟨g_t, g_e⟩ / ‖g_t‖ ‖g_e‖")
    cosine = run.series("gradient/cosine")
    axes.plot(cosine.index, cosine, ".", color="0.6", label="one optimizer batch")
    window = max(run.window, 1)
    _line_with_error(axes, running_mean(cosine, window), "black", f"mean of the last {window} ± standard error")
    axes.axhline(0, color="0.4", linewidth=0.8)
    return finish(axes)


def plot_trace_variance(run: Run) -> Figure:
    """What the sampled traces add to the variance of one optimizer batch's gradient, and Theorem 1 applied to it."""
    title = "Variance that the traces cause, of one optimizer batch's gradient"
    key = "variance/trace_conditional"
    if not run.logged(key):
        return _absent(title, f"{key} is not in this log:\nit needs --model.mixing.anchor marginal")
    axes = make_axes(title, f"trΣ / B, summed over parameters, B = {run.batch_size}")
    own = run.batch_variance("trace", key)
    mean = running_mean(own, max(run.window, 1), run.series("anchor/conditional_rows"))
    alpha_sq = run.series("mixing/alpha").reindex(mean.index) ** 2
    axes.plot(own.index, own, ".", color=OF["trace"], alpha=0.4)
    _line_with_error(axes, mean, OF["trace"], "trace gradient: measured, mean ± standard error")
    mixed = mean.mul(alpha_sq, axis=0)
    _line_with_error(axes, mixed, OF["mixed"], "mixed gradient: α² of it, by Theorem 1", "--")
    total = run.batch_variance("trace")
    axes.plot(total.index, total, ":", color=OF["trace"], label="trace gradient: of all causes")
    axes.set_ylim(bottom=0)
    return finish(axes)


def plot_alpha(run: Run, level: float = 0.95) -> Figure:
    """α in use, and α̂ with its interval."""
    axes = make_axes(f"Mixing weight, optimizer batch of {run.batch_size} rows", "weight of the trace gradient")
    _curve(axes, run.series("mixing/alpha"), "black", "α in use")
    if run.logged("mixing/alpha_estimate"):
        estimate, interval = run.series("mixing/alpha_estimate"), alpha_interval(run, level)
        axes.plot(
            estimate.index,
            estimate,
            ".-",
            markersize=3,
            color=COLORS[0],
            label=f"α̂, {run.anchor} anchor, {level:.0%} interval",
        )
        axes.fill_between(interval.index, interval["low"], interval["high"], color=COLORS[0], alpha=0.2, linewidth=0)
    axes.set_ylim(0, 1)
    return finish(axes)


def plot_batch_sizes(run: Run) -> Figure:
    """α̂ that the run's last window gives for other optimizer batches, and with its interval for the batch in use."""
    title, terms = "Weight of least error for other optimizer batches", last_error_terms(run)
    if terms is None:
        return _absent(title, "the log has no terms of the error:\nthey need --model.mixing.anchor trace and a window")
    step = run.series("mixing/alpha_estimate").last_valid_index()
    axes = make_axes(title, f"α̂, after step {step}", "optimizer batch, rows")
    sizes = [2.0**k for k in range(15)]
    axes.plot(sizes, [float(optimal_alpha(*terms.values(), size)) for size in sizes], color=COLORS[0])
    estimate, interval = run.series("mixing/alpha_estimate")[step], alpha_interval(run).loc[step]
    label = f"B = {run.batch_size}: α̂ = {estimate:.2f}"
    axes.plot([run.batch_size], [estimate], "o", color="black", label=label)
    if interval.notna().all():
        axes.plot([run.batch_size] * 2, interval, color="black", label="95% interval")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1)
    return finish(axes)


def plot_rewards(run: Run) -> Figure:
    """Implicit rewards of chosen and rejected completions in both branches."""
    axes = make_axes("Implicit reward", "β log π/π_ref, nats")
    for branch in ("trace", "empty"):
        for side, style in (("chosen", "-"), ("rejected", "--")):
            own = run.series(f"reward/{branch}_{side}")
            _curve(axes, own, OF[branch], f"{branch}, {side}", style)
    axes.axhline(0, color="0.4", linewidth=0.8)
    return finish(axes)


# ---------------------------------------------------------------------- grids of fits


def plot_cells(grid: GridResults) -> Figure:
    """Every cell's mean with its 95% interval, and its seeds; a panel a metric."""
    panels = _panels(grid.metrics, grid.cells)
    for metric, axes in panels.items():
        table = grid.of(metric)
        _rows(axes, grid.cells, grid.by_seed(metric), table["mean"], table["low"], table["high"])
        axes.set(title=literal(metric), xlabel="mean over seeds, 95% interval")
    return _whole(panels)


def plot_differences(grid: GridResults, leave_out: Sequence[str] = ("start",)) -> Figure:
    """Every cell's difference from its baseline, paired by seed: mean, 95% interval and seeds; a panel a metric.

    Cells named in `leave_out` would hide the others' differences by a large one of their own.
    """
    compared = grid.table[grid.table["baseline"].notna() & ~grid.table["cell"].isin(leave_out)]
    compared = compared[compared["baseline"] != compared["cell"]]
    cells, baselines = list(compared["cell"].unique()), compared["baseline"].unique()
    if not cells:
        return _absent("Differences", "this grid has no baseline, or no cell beside it")
    panels = _panels(grid.metrics, cells)
    for metric, axes in panels.items():
        table, seeds = grid.of(metric).reindex(cells), grid.by_seed(metric)
        paired = seeds.reindex(cells) - seeds.reindex(table["baseline"]).to_numpy()
        mean, low, high = (table[f"difference_{name}"] for name in ("mean", "low", "high"))
        _rows(axes, cells, paired, mean, low, high)
        axes.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        than = literal(baselines[0]) if len(baselines) == 1 else "baseline"
        axes.set(title=literal(metric), xlabel=f"difference from {than}, 95% interval")
    return _whole(panels)


def plot_against(grid: GridResults, x: str, leave_out: Sequence[str] = ("start",)) -> Figure:
    """All other metrics against the metric `x`: means with 95% intervals, and seeds; a panel a metric.

    Cells that share a baseline have a colour; those with the same `x` at several seeds are joined, others are named.
    Cells named in `leave_out` are left out.
    """
    metrics, places = [metric for metric in grid.metrics if metric != x], grid.of(x)
    if not metrics:
        return _absent(literal(x), "this grid has no other metric")
    figure = Figure(figsize=(1 + 3.6 * len(metrics), 4), layout="constrained")
    panels = dict(zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True))
    for metric, axes in panels.items():
        plain(axes).set(title=literal(metric), xlabel=literal(x), ylabel="mean over seeds, 95% interval")
        table = grid.of(metric)
        shown = table[table.index.isin(places.index) & ~table.index.isin(leave_out)]
        series = shown.groupby(shown["baseline"].fillna(""), sort=False)
        for (baseline, cells), color in zip(series, itertools.cycle(COLORS)):
            _points(axes, cells, places, grid.by_seed(metric), grid.by_seed(x), color)
            if series.ngroups > 1:
                axes.plot([], [], "o", color=color, label=f"beside {literal(baseline)}")
        if series.ngroups > 1:
            axes.legend(frameon=False)
    return figure


def _points(
    axes: Axes, cells: pd.DataFrame, places: pd.DataFrame, y: pd.DataFrame, x: pd.DataFrame, color: str
) -> None:
    own = x.loc[cells.index]
    fixed = (own.count(axis=1) > 1) & (own.nunique(axis=1) == 1)  # one seed cannot tell
    for cell in cells.index:
        place, mean, low, high = places["mean"][cell], *(cells[name][cell] for name in ("mean", "low", "high"))
        both = pd.DataFrame({"x": own.loc[cell], "y": y.loc[cell]}).dropna()  # a seed may have one of the metrics only
        axes.plot(both["x"], both["y"], ".", color=color, alpha=0.3)
        axes.plot([place], [mean], "o", color=color)
        axes.plot([place, place], [low, high], color=color)
        if not fixed[cell]:
            name = literal(cell)
            axes.annotate(name, (place, mean), (8, -12), textcoords="offset points", fontsize="small", color="0.2")
    joined = places["mean"][cells.index][fixed].sort_values()
    axes.plot(joined, cells["mean"][joined.index], color=color, linewidth=0.8)


def _panels(metrics: Sequence[str], cells: Sequence[str]) -> dict[str, Axes]:
    """A panel a metric, with a line a cell."""
    figure = Figure(figsize=(2 + 3 * len(metrics), 1.2 + 0.4 * len(cells)), layout="constrained")
    panels = dict(zip(metrics, figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], strict=True))
    first = panels[metrics[0]]
    first.set_yticks(range(len(cells)), [literal(cell) for cell in cells])
    first.invert_yaxis()
    return panels


def _rows(
    axes: Axes,
    cells: Sequence[str],
    seeds: pd.DataFrame,
    means: pd.Series[float],
    lows: pd.Series[float],
    highs: pd.Series[float],
) -> None:
    plain(axes)
    for place, cell in enumerate(cells):
        if cell not in means.index:
            continue
        axes.plot(seeds.loc[cell], np.full(seeds.shape[1], place + 0.25), ".", color="0.6")  # below the interval
        axes.plot([lows[cell], highs[cell]], [place, place], color=COLORS[0])
        axes.plot([means[cell]], [place], "o", color=COLORS[0])


def _whole(panels: Mapping[str, Axes]) -> Figure:
    figure = next(iter(panels.values())).figure
    assert isinstance(figure, Figure)
    return figure


# ---------------------------------------------------------------------- the oracle


def plot_theorem_1(oracle: Oracle, rows: int = 512, alphas: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)) -> Figure:
    """Variance of one row's g_c against α: all of it, the traces' part by Theorem 1, and that part by drawing."""
    axes = make_axes("Theorem 1: the traces' part shrinks by α²", "trΣ of one row, summed over parameters", "α")
    m, grid = oracle.moments, [k / 100 for k in range(101)]
    of_all = [float(mean_squared_error(a, 0, 0, 0, m.trace_variance, m.empty_variance, m.covariance, 1)) for a in grid]
    axes.plot(grid, of_all, color="0.4", linestyle=":", label="g_c: of all causes, exact")
    by_traces = [a**2 * float(m.trace_conditional_variance) for a in grid]
    axes.plot(grid, by_traces, color="black", label="α² Var(g_t over traces), exact")
    measured = np.array([measured_trace_variance(oracle, a, rows, seed) for seed, a in enumerate(alphas)])
    label = f"Var(g_c over traces), {rows} draws each, 95% interval"
    axes.errorbar(alphas, measured[:, 0], 1.96 * measured[:, 1], fmt="o", color=OF["trace"], label=label)
    axes.set_ylim(bottom=0)
    return finish(axes)


def plot_error(moments: ExactMoments, estimate: AlphaEstimate, batch_size: int) -> Figure:
    """The exact MSE_B(α) of an enumerable model, its minimum, and α̂ with its interval."""
    axes = make_axes(f"Squared error of the mixed gradient, B = {batch_size}", "E‖g_c − μ‖²", "α")
    alphas = [k / 200 for k in range(201)]
    axes.plot(alphas, [moments.mean_squared_error(a, batch_size) for a in alphas], color="black", label="exact")
    best = moments.optimal_alpha(batch_size)
    axes.plot([best], [moments.mean_squared_error(best, batch_size)], "o", color="black", label=f"α* = {best:.3f}")
    interval = estimate.interval()
    if estimate.value is not None and interval is not None:
        axes.axvline(estimate.value, color=COLORS[1], label=f"α̂ = {estimate.value:.3f}, 95% interval")
        axes.axvspan(*interval, color=COLORS[1], alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    return finish(axes)


def plot_optimum(curves: Mapping[str, Mapping[float, float]], xlabel: str, logarithmic: bool = False) -> Figure:
    """α* against the batch size or the distance from the reference: a curve a label, x → α."""
    axes = make_axes("Weight of least error", "α*", xlabel)
    for (label, curve), color in zip(curves.items(), COLORS, strict=False):
        axes.plot(list(curve), list(curve.values()), "o-", color=color, label=label)
    axes.set_ylim(0, 1)
    if logarithmic:
        axes.set_xscale("log", base=2)
    return finish(axes)


# ---------------------------------------------------------------------- axes


def make_axes(title: str, ylabel: str, xlabel: str = STEPS) -> Axes:
    """The axes of a figure of one panel."""
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if xlabel == STEPS:
        axes.locator_params(axis="x", integer=True)
    return plain(axes)


def plain(axes: Axes) -> Axes:
    """A faint grid, and no frame where nothing is measured."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def finish(axes: Axes) -> Figure:
    """The axes' figure, with a legend below."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _curve(axes: Axes, values: pd.Series[float], color: str, label: str, style: str = "-") -> None:
    """A line by optimizer step; a point where there is one value only, of which a line shows nothing."""
    alone = values.count() == 1
    axes.plot(values.index, values, style, marker="o" if alone else None, color=color, label=label)


def _line_with_error(axes: Axes, means: pd.DataFrame, color: str, label: str, style: str = "-") -> None:
    axes.plot(means.index, means["mean"], style, color=color, label=label)
    low, high = means["mean"] - means["standard_error"], means["mean"] + means["standard_error"]
    axes.fill_between(means.index, low, high, color=color, alpha=0.2, linewidth=0)


def _absent(title: str, why: str) -> Figure:
    """A figure that says why it shows nothing."""
    figure = Figure(figsize=(7, 1.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", color="0.3")
    return figure
