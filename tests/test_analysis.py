"""What the notebooks read and compute: against hand arithmetic, the fit's own estimates and exact moments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text

from bvpo import plots
from bvpo.ablation_table import Metric, compare, write
from bvpo.analysis import (
    GridResults,
    Run,
    alpha_interval,
    last_error_terms,
    measured_trace_variance,
    newest_run,
    read_grid,
    read_run,
    running_mean,
)
from bvpo.errors import UserError
from bvpo.mixing import AlphaEstimate, optimal_alpha
from bvpo.oracle import Oracle
from bvpo.runs import note_ranks
from tests.conftest import make_rows, write_rows

RUN_PLOTS = [
    plots.plot_variance,
    plots.plot_noise_scale,
    plots.plot_cosine,
    plots.plot_trace_variance,
    plots.plot_alpha,
    plots.plot_batch_sizes,
    plots.plot_rewards,
]


def run_of(steps: int, anchor: str = "trace", window: int = 4, **keys: Any) -> Run:
    """A log of `mixing/alpha` 0.5 and the keys given; `/` is written `__`."""
    log = {name.replace("__", "/"): values for name, values in {"mixing__alpha": [0.5] * steps, **keys}.items()}
    return Run(pd.DataFrame(log, pd.RangeIndex(steps, name="step")), 16, window, anchor, 2)


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


# ---------------------------------------------------------------------- run folders


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder whose trainer has the options given."""

    def make(**trainer: Any) -> Path:
        config = {
            "model": {
                "accumulate": 4,
                "mixing": {"init_args": {"window": 16, "anchor": "trace", "anchor_every": 4, "alpha": 0.5}},
            },
            "data": {"batch_size": 2},
            "trainer": {"accelerator": "cpu", "devices": "auto", "num_nodes": 1} | trainer,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / "metrics.csv").write_text("step,mixing/alpha,accuracy/thinking\n0,0.5,\n1,0.5,\n1,,0.75\n")
        return tmp_path

    return make


def test_a_run_is_a_row_a_step(folder: Callable[..., Path]) -> None:
    """What was logged at a step in several lines is one row."""
    run = read_run(folder())
    assert len(run) == 2 and (run.window, run.anchor, run.anchor_every) == (16, "trace", 4)
    assert run.log.loc[1].to_dict() == {"mixing/alpha": 0.5, "accuracy/thinking": 0.75}
    assert run.logged("mixing/alpha") and not run.logged("mixing/alpha", "loss/trace")
    assert run.series("loss/trace").isna().all()


@pytest.mark.parametrize(
    ("trainer", "ranks"),
    [
        ({}, 1),
        ({"devices": 4}, 4),
        ({"devices": "4", "num_nodes": 2}, 8),
        ({"accelerator": "gpu", "devices": [0, 3]}, 2),
    ],
)
def test_the_optimizer_batch_counts_all_processes(
    trainer: dict[str, Any], ranks: int, folder: Callable[..., Path]
) -> None:
    assert read_run(folder(**trainer)).batch_size == 8 * ranks


@pytest.mark.parametrize("trainer", [{"accelerator": "auto"}, {"accelerator": "gpu", "devices": -1}])
def test_processes_that_the_configuration_leaves_open_are_asked_for(
    trainer: dict[str, Any], folder: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=r"trainer.devices is .* give it, as in read_run\(RUN, ranks=8\)"):
        read_run(folder(**trainer))
    assert read_run(folder(**trainer), ranks=8).batch_size == 64


def test_processes_are_read_as_the_run_noted_them(folder: Callable[..., Path]) -> None:
    """`devices: auto` on GPUs, as experiments/scale has it; what is given comes first."""
    path = folder(accelerator="gpu")
    note_ranks(path, 8)
    assert read_run(path).batch_size == 64 and read_run(path, ranks=2).batch_size == 16


def test_a_fit_notes_its_processes(fit_llama: Callable[..., Path]) -> None:
    run = fit_llama("--trainer.max_steps=1")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["accelerator"] = "auto"  # alone it leaves the processes open
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_run(run).batch_size == config["model"]["accumulate"] * config["data"]["batch_size"]


def test_a_torn_last_row_is_no_row(folder: Callable[..., Path]) -> None:
    """As a kill, a full disk or a copy of a running run leaves it: 0.5 of step 2 was to be 0.55."""
    path = folder() / "metrics.csv"
    whole = path.read_text()
    for torn in ("2", "2,0.5", "2,0.5,0.7"):
        path.write_text(whole + torn)
        assert list(read_run(path.parent).log.index) == [0, 1]
    path.write_text("step,mixing/alpha")
    with pytest.raises(UserError, match="nothing is logged yet"):
        read_run(path.parent)


def test_what_is_no_run_is_refused(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "metrics.csv").write_text("step,mixing/alpha\n")
    with pytest.raises(UserError, match="nothing is logged yet"):
        read_run(path)
    (path / "metrics.csv").write_text("")
    with pytest.raises(UserError, match="nothing is logged yet"):
        read_run(path)
    (path / "config.yaml").unlink()
    (path / "metrics.csv").write_text("step,mixing/alpha\n0,0.5\n")
    with pytest.raises(UserError, match=r"no config.yaml beside metrics.csv"):
        read_run(path)
    (path / "metrics.csv").unlink()
    with pytest.raises(UserError, match=r"no metrics.csv in this folder"):
        read_run(path)


def test_the_newest_run_has_the_highest_number(tmp_path: Path) -> None:
    for name in ("version_2", "version_10", "version_9.csv"):
        (tmp_path / name).mkdir()
    assert newest_run(tmp_path) == tmp_path / "version_10"
    with pytest.raises(UserError, match=r"no run in this folder; start one with python -m bvpo.fit"):
        newest_run(tmp_path / "version_2")


# ---------------------------------------------------------------------- statistics of a log


def test_the_interval_is_that_of_the_estimate() -> None:
    """As `AlphaEstimate.interval`: at step 2 the window holds 3 steps, at step 9 it is full with 4."""
    run = run_of(10, mixing__alpha_estimate=[0.4] * 10, mixing__alpha_standard_error=[None, None] + [0.05] * 8)
    found = alpha_interval(run)
    assert found.iloc[:2].isna().all(axis=None)
    for step, steps in ((2, 3), (3, 4), (9, 4)):
        expected = AlphaEstimate(0.4, 0.05, 0.4, steps, steps, 0.0).interval()
        assert expected is not None and tuple(found.loc[step]) == pytest.approx(expected)


def test_the_interval_counts_measurements_of_the_marginal_anchor() -> None:
    """At every second step; the first of them was refused: by step 8 there are 5 − 1."""
    refused = [1.0, None] * 5
    keys: dict[str, Any] = {"mixing__alpha_estimate": [0.4] * 10, "mixing__alpha_standard_error": [0.05] * 10}
    found = alpha_interval(run_of(10, "marginal", 16, anchor__refused=refused, **keys))
    for step, steps in ((6, 3), (7, 3), (8, 4)):
        expected = AlphaEstimate(0.4, 0.05, 0.4, steps, steps, 0.0).interval()
        assert expected is not None and tuple(found.loc[step]) == pytest.approx(expected)


def test_prompts_met_again_leave_no_interval() -> None:
    keys: dict[str, Any] = {"mixing__alpha_estimate": [0.4] * 4, "mixing__alpha_standard_error": [0.05] * 4}
    found = alpha_interval(run_of(4, mixing__reused_fraction=[0.0, 0.0, 0.0, 0.1], **keys))
    assert found.loc[2].notna().all() and found.loc[3].isna().all()


def test_a_running_mean_by_hand() -> None:
    # the last two of 1, –, 3, 7: means 1, 2, 5; standard errors –, √2/√2 = 1, √8/√2 = 2
    found = running_mean(pd.Series([1.0, None, 3.0, 7.0]), 2)
    assert list(found.index) == [0, 2, 3] and list(found["mean"]) == [1.0, 2.0, 5.0]
    assert pd.isna(found["standard_error"].iloc[0])
    assert list(found["standard_error"].iloc[1:]) == pytest.approx([1.0, 2.0])
    # 1 with weight 3 and 5 with weight 1: mean 2; √(2 · (9·1 + 1·9))/4 = 1.5
    weighted = running_mean(pd.Series([1.0, 5.0]), 2, pd.Series([3.0, 1.0])).iloc[-1]
    assert tuple(weighted) == pytest.approx((2.0, 1.5))


def test_the_log_gives_the_estimate_that_the_fit_made(fit_llama: Callable[..., Path]) -> None:
    """α̂ for the batch in use, from logged terms alone; float32 in the log."""
    run = read_run(fit_llama("--model.accumulate=2", "--data.batch_size=2", "--trainer.max_steps=6"))
    terms, estimate = last_error_terms(run), run.series("mixing/alpha_estimate").iloc[-1]
    assert terms is not None and 0 < estimate < 1
    assert float(optimal_alpha(*terms.values(), run.batch_size)) == pytest.approx(estimate, rel=1e-4)
    assert len(run) == 6 and run.logged("variance/mixed", "gradient/cosine")


def table_values(text: str) -> dict[str, float]:
    """The numbers of the table that a fit ends with."""
    rows = [line.split("│")[1:3] for line in text.splitlines() if line.startswith("│ variance")]
    return {name.strip(): float(value) for name, value in rows}


@pytest.mark.parametrize(("alpha", "estimator"), [(0, "empty"), (1, "trace")])
def test_rows_with_one_pair_only_count_where_they_have_one(
    alpha: int, estimator: str, fit_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four rows, two have both pairs, one the trace pair, one the empty-trace pair. At α = 0 the mixed gradient is
    the empty-trace one and at α = 1 the trace gradient: figure, table and log give one variance."""
    without = {1: "empty_", 3: ("prompt", "chosen", "rejected")}
    rows = [
        {k: v for k, v in row.items() if k == "prompt_id" or not k.startswith(without.get(i % 4, "-"))}
        for i, row in enumerate(make_rows(48))
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--data.on_one_sided=keep", "--data.batch_size=8", "--trainer.max_steps=5"]
    run = read_run(fit_llama(f"--data.train={source}", f"--model.mixing.alpha={alpha}", *options))
    mixed = run.series("variance/mixed").iloc[-1]
    pairs = run.log[[f"pairs/{of}" for of in ("trace", "empty", "both")]].iloc[-1]
    assert 0.5 < pairs["pairs/trace"] < 1 and pairs["pairs/both"] == pytest.approx(pairs.iloc[:2].sum() - 1)
    (axes,) = plots.plot_variance(run).axes
    drawn = {str(line.get_label()): np.asarray(line.get_ydata())[-1] for line in axes.lines}
    assert drawn[plots.NAMES[estimator]] == pytest.approx(mixed, rel=1e-6)
    shown = table_values(capsys.readouterr().out)
    assert shown[f"variance, {estimator}"] == shown["variance, mixed"] == pytest.approx(mixed, rel=0.01)
    terms, estimate = last_error_terms(run), run.series("mixing/alpha_estimate").iloc[-1]
    assert terms is not None and float(optimal_alpha(*terms.values(), run.batch_size)) == pytest.approx(estimate)


def test_pairs_of_a_row_scale_what_is_of_one_pair() -> None:
    """B = 16 with 0.5 trace pairs a row, 0.8 empty ones, 0.3 both: of 8 pairs, of 12.8, and 0.3/(0.5 · 0.8) = 0.75 of
    the covariance. A run without these keys has both pairs in every row; 0 of both leaves no covariance."""
    keys: dict[str, Any] = {f"variance__{name}": [8.0] for name in ("trace", "empty", "covariance")}
    keys |= {"bias__empty_sq": [1.0], "mixing__alpha_estimate": [0.5], "gradient__noise_scale_trace": [10.0]}
    run = run_of(1, pairs__trace=[0.5], pairs__empty=[0.8], pairs__both=[0.3], **keys)
    assert run.batch_variance("trace").iloc[0] == 1.0 and run.batch_variance("empty").iloc[0] == pytest.approx(0.625)
    terms = last_error_terms(run)
    assert terms is not None and [float(value) for value in terms.values()[3:]] == pytest.approx([16.0, 10.0, 6.0])
    (axes,) = plots.plot_noise_scale(run).axes
    assert list(np.asarray(axes.lines[0].get_ydata())) == [20.0]  # 10 pairs are in 20 rows
    assert run_of(1, **keys).batch_variance("trace").iloc[0] == 0.5
    del keys["variance__covariance"]
    terms = last_error_terms(run_of(1, pairs__trace=[0.5], pairs__empty=[0.5], pairs__both=[0.0], **keys))
    assert terms is not None and [float(value) for value in terms.values()[3:]] == [16.0, 16.0, 0.0]


def test_the_terms_need_the_trace_anchor() -> None:
    keys: dict[str, Any] = {f"variance__{name}": [1.0] for name in ("trace", "empty", "covariance")}
    keys |= {"bias__empty_sq": [1.0], "mixing__alpha_estimate": [0.5]}
    assert last_error_terms(run_of(1, **keys)) is not None
    assert last_error_terms(run_of(1, "marginal", **keys)) is None
    assert last_error_terms(run_of(1)) is None


# ---------------------------------------------------------------------- plots of a run


@pytest.mark.parametrize("plot", RUN_PLOTS)
def test_a_run_without_statistics_can_be_drawn(plot: Callable[[Run], Figure], tmp_path: Path) -> None:
    """With `window: 0`, or before two units: what is not there is left out, or the figure says so."""
    for run in (run_of(1), run_of(3, "marginal", window=0)):
        plot(run).savefig(tmp_path / "plot.png")


def test_the_pictures_are_drawn_of_runs_alone(tmp_path: Path) -> None:
    program = Path(__file__).parent.parent / "docs" / "images" / "draw.py"
    environment = os.environ | {"PYTHONPATH": str(program.parents[2])}
    words = [sys.executable, str(program), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: no metrics.csv in this folder")
    assert "Traceback" not in done.stderr


def test_figures_say_what_is_absent() -> None:
    assert "needs --model.mixing.anchor marginal" in texts(plots.plot_trace_variance(run_of(2)))
    assert "need --model.mixing.anchor trace" in texts(plots.plot_batch_sizes(run_of(2, "marginal")))
    assert "it needs --model.mixing.window" in texts(plots.plot_variance(run_of(3, window=0)))


@pytest.mark.parametrize("steps", [1, 2])
def test_the_figures_of_a_single_step_are_points(steps: int) -> None:
    keys: dict[str, Any] = {f"variance__{name}": [1.0] * steps for name in ("trace", "empty", "mixed")}
    for figure, lines in ((plots.plot_variance(run_of(steps, **keys)), 3), (plots.plot_alpha(run_of(steps)), 1)):
        assert [line.get_marker() for line in figure.axes[0].lines] == ["o" if steps == 1 else "None"] * lines


@pytest.mark.parametrize(("reused", "intervals"), [(0.0, 1), (0.1, 0)])
def test_the_batch_in_use_has_the_interval_of_its_own_step(reused: float, intervals: int) -> None:
    """Prompts met again in the last step leave it none, whatever the steps before had."""
    keys: dict[str, Any] = {f"variance__{name}": [1.0] * 4 for name in ("trace", "empty", "covariance")}
    keys |= {"bias__empty_sq": [1.0] * 4, "mixing__alpha_estimate": [0.1, 0.2, 0.3, 0.4]}
    keys |= {"mixing__alpha_standard_error": [0.05] * 4, "mixing__reused_fraction": [0.0, 0.0, 0.0, reused]}
    (axes,) = plots.plot_batch_sizes(run_of(4, **keys)).axes
    assert [line.get_label() for line in axes.lines].count("95% interval") == intervals
    assert axes.get_ylabel() == "α̂, after step 3"
    assert "B = 16: α̂ = 0.40" in [line.get_label() for line in axes.lines]


def test_theorem_1_is_applied_to_what_was_measured() -> None:
    """Batch of 16 rows: 32 and 64 over the traces of one pair are 2 and 4, in the mean 3; at α = 0.5 a quarter."""
    conditional, rows = [32.0, None, 64.0], [8.0, None, 8.0]
    keys: dict[str, Any] = {"variance__trace_conditional": conditional, "anchor__conditional_rows": rows}
    (axes,) = plots.plot_trace_variance(run_of(3, "marginal", **keys)).axes
    drawn = {str(line.get_label()): list(np.asarray(line.get_ydata())) for line in axes.lines}
    assert drawn["trace gradient: measured, mean ± standard error"] == [2.0, 3.0]
    assert drawn["mixed gradient: α² of it, by Theorem 1"] == [0.5, 0.75]


# ---------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_drawn_trace_variance_is_the_exact_one(alpha: float) -> None:
    """Theorem 1 by drawing; 4 standard errors."""
    oracle = Oracle.build(prompts=3, traces=4, answers=3).drifted(0.3)
    mean, error = measured_trace_variance(oracle, alpha, 1000, seed=0)
    exact = alpha**2 * float(oracle.moments.trace_conditional_variance)
    assert abs(mean - exact) <= 4 * error and (error > 0) is (alpha > 0)


# ---------------------------------------------------------------------- grids


@pytest.fixture
def grid(tmp_path: Path) -> GridResults:
    """Three cells, seeds 0 to 2; Optimal lacks the last, and a fourth has no fit."""
    values = {
        "start": {seed: {"accuracy": 0.5, "α in use": 0.5} for seed in range(3)},
        "α = 0.5": {seed: {"accuracy": 0.7 + 0.01 * seed, "α in use": 0.5} for seed in range(3)},
        "Optimal": {seed: {"accuracy": 0.8 + 0.02 * seed, "α in use": 0.3 + 0.01 * seed} for seed in range(2)},
    }
    cells = dict.fromkeys([*values, "none yet"], "α = 0.5")
    metrics = [Metric("accuracy", ("a",)), Metric("α in use", ("b",))]
    write(compare(values, cells, metrics), values, "A note.", tmp_path)
    return read_grid(tmp_path)


def test_a_grid_is_read_as_it_was_written(grid: GridResults) -> None:
    assert (grid.metrics, grid.cells) == (["accuracy", "α in use"], ["start", "α = 0.5", "Optimal"])
    seeds = grid.by_seed("accuracy")
    assert list(seeds.loc["α = 0.5"]) == [0.7, 0.71, 0.72] and pd.isna(seeds.loc["Optimal", 2])
    assert grid.of("accuracy").loc["Optimal", "difference_seeds"] == 2
    with pytest.raises(UserError, match="no metric 'loss' in this grid; it has accuracy, α in use"):
        grid.of("loss")


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"table.csv: there is no such file; python -m bvpo.ablate GRID.yaml --report"):
        read_grid(tmp_path)


def test_dollars_in_names_are_no_formula(tmp_path: Path) -> None:
    """Between two of them matplotlib would read a formula, and refuse this one."""
    values = {"$x_$": {0: {"$y_$": 1.0, "$z_$": 2.0}}, "a$b_$": {0: {"$y_$": 1.5, "$z_$": 2.5}}}
    metrics = (Metric("$y_$", ("y",)), Metric("$z_$", ("z",)))
    write(compare(values, {"$x_$": None, "a$b_$": "$x_$"}, metrics), values, "", tmp_path)
    grid = read_grid(tmp_path)
    for figure in (plots.plot_cells(grid), plots.plot_differences(grid), plots.plot_against(grid, "$y_$")):
        figure.savefig(tmp_path / "plot.png")
        assert r"\$z_\$" in texts(figure)


def test_differences_are_drawn_as_they_are_in_the_table(grid: GridResults) -> None:
    """0.80 − 0.70 and 0.82 − 0.71: 0.105 in the mean; `start` and the baseline are left out."""
    axes = plots.plot_differences(grid).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Optimal"]
    seeds, interval, mean, _ = (np.asarray(line.get_xdata()) for line in axes.lines)
    assert list(seeds[:2]) == pytest.approx([0.10, 0.11]) and np.isnan(seeds[2])
    assert list(mean) == pytest.approx([0.105])
    low, high = grid.of("accuracy").loc["Optimal", ["difference_low", "difference_high"]]
    assert list(interval) == [low, high]


def test_cells_with_a_weight_of_their_own_are_named(grid: GridResults, tmp_path: Path) -> None:
    figure = plots.plot_against(grid, "α in use")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["Optimal"]
    assert axes.get_xlabel() == "α in use" and axes.get_title() == "accuracy"
    for own in (figure, plots.plot_cells(grid)):
        own.savefig(tmp_path / "plot.png")


def test_metrics_of_different_seeds_are_drawn_over_the_common_ones(tmp_path: Path) -> None:
    """BVPO logs the weight at seeds 0 and 1, and the loss at 1 and 2; DPO has no weight at all."""
    values = {
        "BVPO": {0: {"α": 0.3}, 1: {"loss": 0.5, "α": 0.4}, 2: {"loss": 0.6}},
        "DPO": {seed: {"loss": 0.7} for seed in range(3)},
    }
    metrics = [Metric("loss", ("l",)), Metric("α", ("a",))]
    write(compare(values, dict.fromkeys(values, "DPO"), metrics), values, "A note.", tmp_path)
    grid = read_grid(tmp_path)
    (axes,) = plots.plot_against(grid, "α").axes
    seeds = axes.lines[0]
    assert (list(np.asarray(seeds.get_xdata())), list(np.asarray(seeds.get_ydata()))) == ([0.4], [0.5])
    for figure in (plots.plot_against(grid, "loss"), plots.plot_cells(grid), plots.plot_differences(grid)):
        figure.savefig(tmp_path / "plot.png")


def test_a_grid_of_single_fits_without_a_baseline_can_be_drawn(tmp_path: Path) -> None:
    values = {"a": {0: {"loss": 1.0}}, "b": {0: {"loss": 2.0}}}
    write(compare(values, {"a": None, "b": None}, [Metric("loss", ("l",))]), values, "A note.", tmp_path)
    grid = read_grid(tmp_path)
    plots.plot_cells(grid).savefig(tmp_path / "plot.png")
    assert "no baseline" in texts(plots.plot_differences(grid))
    assert "no other metric" in texts(plots.plot_against(grid, "loss"))
