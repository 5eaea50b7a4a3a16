"""Grids of fits: what a YAML file may say, the table's arithmetic, and what kills and failures leave behind."""

from __future__ import annotations

import csv
import fcntl
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from bvpo import ablate, ablation_table, fit
from bvpo.ablation_table import Metric, compare, estimate, fits_csv, table_csv, table_markdown
from bvpo.cell import ATTEMPT, last_words
from bvpo.errors import UserError
from bvpo.grid import load_grid
from bvpo.grid_run import check_settings, time_left
from tests.conftest import make_rows, write_rows

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, llama_folder: Path, pairs_file: Path) -> Write:
    """Writes a grid of two-step fits of a random Llama; its keys are replaced or removed (None) by those given."""
    base = {
        "model": {"policy": str(llama_folder), "learning_rate": 1e-2},
        "data": {"train": str(pairs_file)},
        "trainer": {"accelerator": "cpu", "max_steps": 2},
        "threads": 1,
    }

    def grid(**keys: Any) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        given = {
            "base": {"config": "base.yaml"},
            "cells": {"a": {}, "b": {"model.beta": 0.3}},
            "metrics": {"loss": "loss/mixed"},
            "baseline": "a",
            "output": str(tmp_path / "out"),
        }
        kept = {key: value for key, value in (given | keys).items() if value is not None}
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(kept, allow_unicode=True, sort_keys=False))
        return path

    return grid


# --- The file ---------------------------------------------------------------------------------------------------------


def test_cells_grid_and_seeds_give_every_combination(write: Write) -> None:
    path = write(grid={"model.beta": [0.1, 0.5], "data.batch_size": [2]}, cells={"a": {}, "α = 1": {}}, seeds=2)
    grid = load_grid(path, ["--trainer.max_steps=7"])
    names = ["a, beta=0.1, batch_size=2", "a, beta=0.5, batch_size=2"]
    names += ["α = 1, beta=0.1, batch_size=2", "α = 1, beta=0.5, batch_size=2"]
    assert [cell.name for cell in grid.cells] == names
    assert [cell.baseline for cell in grid.cells] == [*names[:2], *names[:2]]  # at the same point of the grid
    assert [(fit.cell.name, fit.seed) for fit in grid.fits[:5]] == [*((name, 0) for name in names), (names[0], 1)]
    assert grid.fits[3].folder == grid.output / "α_=_1_beta=0.5_batch_size=2" / "seed_0"
    settings = yaml.safe_load(grid.cells[1].settings)
    assert (settings["model"]["beta"], settings["data"]["batch_size"]) == (0.5, 2)
    assert {cell.steps for cell in grid.cells} == {7}  # options of the command line come last
    assert len({cell.caches for cell in grid.cells}) == 1


def test_a_grid_without_cells_may_name_one_point_as_the_baseline(write: Write) -> None:
    grid = load_grid(write(cells=None, grid={"model.beta": [0.1, 0.5]}, baseline="beta=0.1"), seeds=[3, 1])
    assert [(cell.name, cell.baseline) for cell in grid.cells] == [("beta=0.1", "beta=0.1"), ("beta=0.5", "beta=0.1")]
    assert grid.seeds == (3, 1)


def test_options_of_every_kind_reach_the_fit(write: Write) -> None:
    own = {
        "model.mixing": {"class_path": "bvpo.mixing.Schedule", "init_args": {"steps": 5}},
        "model.learning_rate": 1e-06,
        "model.reference": None,
        "data.bucket_by_length": True,
        "data.train": "1.jsonl",
        "trainer.callbacks": [],
    }
    settings = yaml.safe_load(load_grid(write(cells={"a": own})).cells[0].settings)
    assert settings["model"]["mixing"]["class_path"] == "bvpo.mixing.Schedule"
    assert settings["model"]["mixing"]["init_args"]["steps"] == 5
    assert (settings["model"]["learning_rate"], settings["model"]["reference"]) == (1e-6, None)
    assert (settings["data"]["bucket_by_length"], settings["data"]["train"]) == (True, "1.jsonl")
    assert settings["trainer"]["callbacks"] == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"cell": {}}, "there is no key cell; expected base, cells"),
    "unknown option": ({"cells": {"a": {"model.betta": 1}}}, "cell a: .*betta"),
    "wrong type": ({"cells": {"a": {"model.beta": "large"}}}, "cell a: .*beta"),
    "unknown class": ({"cells": {"a": {"model.mixing": "bvpo.mixing.Best"}}}, "cell a: .*Best"),
    "no such config": ({"base": {"config": "none.yaml"}}, "base: config .*none.yaml: there is no such file"),
    "the command's own option": ({"cells": {"a": {"seed_everything": 1}}}, "a: seed_everything is not .*: give seeds"),
    "the same, nested": ({"cells": {"a": {"trainer": {"default_root_dir": "x"}}}}, "a: trainer.default.* give output"),
    "no log": (
        {"base": {"trainer": {"logger": False}}},
        "base: trainer.logger is not .*: results are read from metrics",
    ),
    "neither cells nor grid": ({"cells": None}, "expected cells or a grid"),
    "cells as a list": ({"cells": ["a"]}, "cells: expected names with values"),
    "options as a text": ({"cells": {"a": "fast"}}, "cell a: expected options with values, found 'fast'"),
    "a value for a list": ({"grid": {"model.beta": 0.1}}, "grid: model.beta: expected a list of values, found 0.1"),
    "no values": ({"grid": {"model.beta": []}}, "grid: model.beta: expected a list of values"),
    "unknown baseline": ({"baseline": "c"}, "there is no cell 'c'; expected one of a, b"),
    "a list as baseline": ({"baseline": ["a"]}, r"baseline: expected the name of a cell, found \['a'\]"),
    "a mapping as baseline": ({"baseline": {"a": 1}}, "baseline: expected the name of a cell, found {'a': 1}"),
    "an open quote": ({"prepare": ["python -c 'print(1)"]}, "prepare: python -c 'print.1.: No closing quotation"),
    "a blank command": ({"prepare": ["  "]}, "prepare: expected commands, found '  '"),
    "the jobs' own folder": (
        {"cells": {"jobs": {}}, "baseline": None},
        "cell 'jobs': its folder would be no cell's own",
    ),
    "a folder above": ({"cells": {"..": {}}, "baseline": None}, "cell '..': its folder would be no cell's own"),
    "the same name twice": ({"grid": {"model.beta": [0.1, 0.1]}}, "2 cells of that name 'a, beta=0.1'"),
    "the same folder twice": ({"cells": {"a/b": {}, "a b": {}}, "baseline": None}, "2 cells whose folder is 'a_b'"),
    "no seeds": ({"seeds": 0}, "seeds: expected how many"),
    "a seed twice": ({"seeds": [1, 1]}, "2 seeds '1'"),
    "a seed below 0": ({"seeds": [-1]}, "seeds: expected how many"),
    "no metrics": ({"metrics": None}, "metrics: expected labels"),
    "a number for a key": ({"metrics": {"loss": 3}}, "metrics: expected a text"),
    "no output": ({"output": None}, "output: expected a text, found None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_grid_may_not_say(case: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything runs, in one line, exit code 2."""
    keys, message = REFUSED[case]
    path = write(**keys)
    with pytest.raises(UserError, match=message):
        load_grid(path)
    assert ablate.main([str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: {path}: ")
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cells: {a: {model.beta: 0.1}, b: {},\n  a: {model.beta: 0.2}}", "line 2: 'a' is there twice"),
        ("seeds: 1\ncells: {a: {}}\n\nseeds: 2", "line 4: 'seeds' is there twice"),
        ("cells: {1: {}, '1': {}}", "line 1: '1' is there twice"),
        ("cells: {a: !cell {}}", "line 1: could not determine a constructor for the tag '!cell'"),
    ],
)
def test_a_name_that_is_there_twice_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """YAML's own loader takes the last one and says nothing."""
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {message}"):
        load_grid(path)


def test_words_and_dates_are_texts_and_numbers_are_names(write: Write) -> None:
    """`off` is a choice of model.packing, and YAML's own loader makes a boolean of it; 2026-01-01 may name rows."""
    path = write(cells=None, baseline=None)
    own = "{model.packing: off, data.train: 2026-01-01, data.bucket_by_length: true}"
    merged = "2.0: {<<: *own, model.packing: auto}"
    path.write_text(path.read_text() + f"cells: {{1.0: &own {own}, {merged}}}\nbaseline: 1.0\n")
    grid = load_grid(path)
    assert [(cell.name, cell.baseline) for cell in grid.cells] == [("1.0", "1.0"), ("2.0", "1.0")]
    first, second = (yaml.safe_load(cell.settings) for cell in grid.cells)
    assert (first["model"]["packing"], second["model"]["packing"]) == ("off", "auto")
    assert first["data"]["train"] == second["data"]["train"] == "2026-01-01"
    assert first["data"]["bucket_by_length"] is True


def test_a_config_without_a_log_is_refused(write: Write) -> None:
    path = write()
    (path.parent / "silent.yaml").write_text("trainer: {logger: false}")
    with pytest.raises(UserError, match=r"cell a: a config sets trainer.logger to false: results are read from"):
        load_grid(path, [f"--config={path.parent / 'silent.yaml'}"])


def test_a_file_that_is_no_grid(tmp_path: Path) -> None:
    broken, text = tmp_path / "broken.yaml", tmp_path / "text.yaml"
    broken.write_text("cells: [")
    text.write_text("alpha")
    for path, message in ((broken, "as YAML"), (text, "expected the keys"), (tmp_path / "none.yaml", "No such file")):
        with pytest.raises(UserError, match=message):
            load_grid(path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--jobs=0", "jobs must be ≥ 1, got 0"),
        ("--slurm={}", 'Could not detect "srun"'),
        ("--model.betta=1", "cell a: .*betta"),
        ("--seeds=[]", "seeds: expected how many"),
        ("--seed_everything=5", "the command line: seed_everything is not .*: give seeds"),
        ("--trainer.default_root_dir x", "the command line: trainer.default_root_dir is not .*: give output"),
        ("--trainer={logger: false}", "the command line: trainer.logger is not .*: results are read"),
    ],
)
def test_options_of_the_command(option: str, message: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    if option.startswith("--slurm") and shutil.which("srun"):
        pytest.skip("there is a Slurm here")
    words = option.split() if " x" in option else [option]
    assert ablate.main([str(write()), *words]) == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)


def test_a_table_names_the_command_that_made_it() -> None:
    """Its overrides too, quoted for a shell; how many fits ran at once and where says nothing about the numbers."""
    words = ["my grids/g.yaml", "--jobs=3", "--report", "--seeds", "[3, 1]", "--output", "out dir", "--slurm={}"]
    found = ablate.command(*ablate.parse([*words, "--trainer.max_epochs=3", "--model.mixing", "bvpo.mixing.Optimal"]))
    assert found == (
        "python -m bvpo.ablate 'my grids/g.yaml' '--output=out dir' '--seeds=[3, 1]' --trainer.max_epochs=3 "
        "--model.mixing bvpo.mixing.Optimal"
    )
    assert ablate.command(*ablate.parse(["g.yaml"])) == "python -m bvpo.ablate g.yaml"


@pytest.mark.parametrize("trace", ["none", "log", "finished", "checkpoint", "lock"])
def test_a_cell_can_be_mended_until_one_of_its_fits_has_taken_a_step(trace: str, write: Write, tmp_path: Path) -> None:
    """A fit that failed before it leaves a folder, a lock that nobody holds and perhaps a log without a row."""
    check_settings(load_grid(write(seeds=2)))
    before, after = (tmp_path / "out" / cell / "settings.yaml" for cell in "ab")
    seed = before.parent / "seed_1"
    run = seed / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.csv").write_text("loss/mixed,step\n" + "0.7,0\n" * (trace == "log"))
    written = {"finished": "finished.json", "checkpoint": "checkpoints/last.ckpt"}
    if trace in written:
        (run / written[trace]).touch()
    mended = load_grid(write(seeds=2, cells={"a": {"model.beta": 0.7}, "b": {"model.beta": 0.3}}))
    with (seed / "lock_0").open("ab") as lock:
        if trace == "lock":
            fcntl.flock(lock, fcntl.LOCK_EX)
        if trace == "none":
            check_settings(mended)
            assert yaml.safe_load(before.read_text())["model"]["beta"] == 0.7
        else:
            with pytest.raises(UserError, match=r"cell a with other settings .model.beta: None → 0.7"):
                check_settings(mended)
            assert yaml.safe_load(before.read_text())["model"]["beta"] is None
    assert yaml.safe_load(after.read_text())["model"]["beta"] == 0.3


def test_a_name_that_is_too_long_for_a_folder_is_an_error(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        check_settings(load_grid(write(cells={"a" * 300: {}}, baseline=None)))


def test_a_report_runs_nothing(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate.main([str(write()), "--report"]) == 0
    assert "no fit is finished: there is no table" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_command_that_prepares_rows_comes_first(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it fails nothing is run."""
    path = write(prepare=['python -c "print(1)"', 'python -c "raise SystemExit(3)"'])
    assert ablate.main([str(path)]) == 2
    assert 'prepare: python -c "raise SystemExit(3)": ended with exit code 3' in capsys.readouterr().err
    assert not list((path.parent / "out").glob("*/seed_*"))


# --- The table --------------------------------------------------------------------------------------------------------


def test_an_estimate_by_hand() -> None:
    # 1, 2, 3, 6: mean 3, squares of deviations 4 + 1 + 0 + 9 = 14, s² = 14/3, standard error √(14/12) = 1.080123;
    # t with 3 degrees of freedom at 97.5% is 3.182446, so ± 3.437434
    found = estimate([1.0, 2.0, 3.0, 6.0])
    assert found.mean == 3.0 and found.seeds == 4
    assert found.standard_error == pytest.approx(1.080123, abs=1e-6)
    assert (found.low, found.high) == (pytest.approx(-0.437434, abs=1e-5), pytest.approx(6.437434, abs=1e-5))


def test_one_seed_has_no_interval_and_none_has_no_mean() -> None:
    assert estimate([2.0]).standard_error is None and estimate([2.0]).low is None
    assert math.isnan(estimate([]).mean)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_seed_that_is_no_number_is_shown_and_leaves_no_interval(broken: float, tmp_path: Path) -> None:
    """A metric of a fit that diverged: the table is made, in which the other cells are as they were."""
    values = {"a": {0: {"x": 1.0}, 1: {"x": 2.0}}, "b": {0: {"x": 1.5}, 1: {"x": broken}}}
    a, b = compare(values, {"a": "a", "b": "a"}, METRICS)
    assert (b.value.standard_error, b.value.low, b.value.seeds) == (None, None, 2)
    lines = table_markdown([a, b], "how it was made").splitlines()[4:]
    assert lines == ["| a | 2 | 1.50 ± 0.50 |  |", f"| b | 2 | {broken} | +{broken} |"]
    ablation_table.plot([a, b], tmp_path / "table.png")


def test_the_t_interval_covers_as_often_as_it_says() -> None:
    """5 seeds, 4,000 draws: 95% ± 3 standard errors of that share, √(0.95 · 0.05/4000) = 0.0034."""
    import numpy as np

    rng = np.random.default_rng(0)
    found = [estimate(list(rng.normal(1.0, 2.0, 5))) for _ in range(4000)]
    share = np.mean([e.low is not None and e.high is not None and e.low <= 1.0 <= e.high for e in found])
    assert abs(share - 0.95) < 3 * 0.0034


METRICS = (Metric("x", ("x",)),)
VALUES = {
    "a": {0: {"x": 1.0}, 1: {"x": 2.0}, 2: {"x": 9.0}},
    "b": {0: {"x": 1.5}, 1: {"x": 3.5}},
    "c": {5: {"x": 4.0}},
}


def test_differences_are_taken_between_the_same_seeds() -> None:
    """b − a over seeds 0 and 1 is 0.5 and 1.5: 1 ± 0.5. Seed 2 has no partner, and c has none at all."""
    a, b, c, d = compare(VALUES, {"a": "a", "b": "a", "c": "a", "d": "a"}, METRICS)
    assert a.difference is None and a.value.mean == 4.0
    assert b.difference is not None and (b.difference.mean, b.difference.standard_error) == (1.0, 0.5)
    assert b.difference.seeds == 2 and b.difference.high == pytest.approx(1 + 12.7062 * 0.5, abs=1e-3)
    assert c.difference is not None and c.difference.seeds == 0 and c.value.seeds == 1
    assert d.value.seeds == 0


def test_the_files(tmp_path: Path) -> None:
    entries = compare(VALUES, {"a": "a", "b": "a", "c": "a", "d": "a"}, METRICS)
    lines = table_markdown(entries, "how it was made").splitlines()
    assert lines[:2] == ["how it was made", ""]
    assert lines[2:] == [
        "| cell | seeds | x | x − a |",
        "| --- | --- | --- | --- |",
        "| a | 3 | 4.0 ± 2.5 |  |",
        "| b | 2 | 2.5 ± 1.0 | +1.00 [-5.35, +7.35] |",
        "| c | 1 | 4.0000 |  |",
        "| d | 0 | — |  |",
    ]
    rows = list(csv.DictReader(table_csv(entries).splitlines()))
    assert [row["cell"] for row in rows] == ["a", "b", "c", "d"]
    assert (rows[1]["mean"], rows[1]["seeds"], rows[1]["difference_mean"]) == ("2.5", "2", "1.0")
    assert fits_csv(VALUES).splitlines()[:3] == ["cell,seed,metric,value", "a,0,x,1.0", "a,1,x,2.0"]


def test_values_that_are_equal_but_for_their_rounding_have_no_error() -> None:
    """0.3 − 0.1 and 0.4 − 0.2 differ in the last bit; their difference is not known to twelve places."""
    values = {"a": {0: {"x": 0.1}, 1: {"x": 0.2}}, "b": {0: {"x": 0.3}, 1: {"x": 0.4}}}
    entries = compare(values, {"a": "a", "b": "a"}, METRICS)
    assert entries[1].difference is not None and entries[1].difference.standard_error  # the mean's, above 0
    assert table_markdown(entries, "").splitlines()[-1] == "| b | 2 | 0.350 ± 0.050 | +0.2000 [+0.2000, +0.2000] |"


def test_dollars_in_a_name_are_no_formula(tmp_path: Path) -> None:
    names = ["$x_$", "a$\\frac$b", "one $", "$$"]
    assert all(ablation_table.literal(name).replace("\\$", "$") == name for name in names)
    entries = compare(dict.fromkeys(names, VALUES["a"]), dict.fromkeys(names, names[0]), METRICS)
    ablation_table.plot(entries, tmp_path / "table.png")


@pytest.mark.parametrize("name", ["[b]out[/b]", "out[", ":warning:"])
def test_what_was_written_is_named_as_it_is(
    name: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {cell: {0: {"loss": 0.5}} for cell in ("a", "b")}
    monkeypatch.setattr(ablate, "results", lambda grid: found)
    output = tmp_path / name
    assert ablate.main([str(write()), "--report", f"--output={output}"]) == 0
    files = ", ".join(str(output / file) for file in ("table.csv", "fits.csv", "table.md", "table.png"))
    assert f"written: {files}\n" in capsys.readouterr().out


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    from bvpo.ablation_table import plot

    plot(compare(VALUES, {"a": "a", "b": "a", "c": "a", "d": "a"}, METRICS), tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_is_the_last_value_or_the_mean_of_a_run() -> None:
    rows = [{"x": "1", "y": "5"}, {"x": "2", "y": ""}, {"x": "", "y": "8"}]
    assert Metric("m", ("x",)).of(rows) == 2.0
    assert Metric("m", ("mean x",)).of(rows) == 1.5
    assert Metric("m", ("x", "y")).of(rows) == 5.0
    assert Metric("m", ("x", "z")).of(rows) is None
    with pytest.raises(UserError, match="metric m: no finished fit has logged z"):
        compare({"a": {0: {}}}, {"a": None}, [Metric("m", ("z",))])


@pytest.mark.parametrize(
    ("elapsed", "done", "to_do", "expected"),
    [(60, 0.0, 5, "—"), (60, 2.0, 1, "30 s"), (60, 1.0, 5, "5 min"), (3600, 2.0, 3, "1 h 30 min")],
)
def test_the_time_left(elapsed: float, done: float, to_do: float, expected: str) -> None:
    assert time_left(elapsed, done, to_do) == expected


def test_the_last_words_are_those_of_the_newest_attempt(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_words(log) == ""
    log.write_text(f"{ATTEMPT}first\nerror: old\n{ATTEMPT}second\nstep 1\n\nerror: new\nmore\n")
    assert last_words(log) == "error: new\nmore"
    log.write_text(f"{ATTEMPT}first\nerror: old\n{ATTEMPT}second\n")
    assert last_words(log) == ""


# --- Fits -------------------------------------------------------------------------------------------------------------


def metrics_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "seed_0" / "version_0" / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


def test_a_grid_runs_its_cells_and_a_failing_one_leaves_the_others_standing(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two fits at once. Cells of equal settings give equal numbers; what is finished is not run again."""
    cached = {"model.reference_logps": "cached", "model.reference_cache": str(tmp_path / "reference")}
    cells = {"a": {}, "twin": {}, "broken": {"data.train": str(tmp_path / "none.jsonl")}}
    path, out = write(cells=cells, base={"config": "base.yaml", **cached}), tmp_path / "out"
    assert ablate.main([str(path), "--jobs=2"]) == 1
    said = capsys.readouterr()
    assert "no such file" in said.err and said.err.startswith("error: broken, seed 0 failed: error: ")
    assert "finished: a, seed 0" in said.out and "2 of 3, 1 failed" in said.out
    assert metrics_of(out / "a") == metrics_of(out / "twin")
    assert len(list((tmp_path / "reference").glob("*/*.arrow"))) == 1
    table = (out / "table.md").read_text()
    assert "1 of 3 fits missing" in table and "| twin | 1 |" in table and "| broken | 0 | — |" in table
    assert (out / "table.png").exists()

    del cells["broken"]
    before = {file: file.stat().st_mtime_ns for file in out.rglob("seed_*/**/*") if file.is_file()}
    assert ablate.main([str(write(cells=cells))]) == 2  # no cache
    assert "cell a with other settings (model.reference_logps: cached → live" in capsys.readouterr().err
    assert ablate.main([str(write(cells=cells, base={"config": "base.yaml", **cached}))]) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_a_failed_fit_is_tried_again(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    path = write(cells={"a": {"data.train": str(rows)}}, baseline=None)
    assert ablate.main([str(path)]) == 1
    assert "no fit is finished: there is no table" in capsys.readouterr().out
    write_rows(rows, make_rows(8))
    assert ablate.main([str(path)]) == 0


@pytest.mark.slow
def test_a_failed_cell_is_mended_in_the_file(write: Write, tmp_path: Path, pairs_file: Path) -> None:
    assert ablate.main([str(write(cells={"a": {"data.train": str(tmp_path / "typo.jsonl")}}, baseline=None))]) == 1
    assert ablate.main([str(write(cells={"a": {"data.train": str(pairs_file)}}, baseline=None)), "--seeds=1"]) == 0
    assert f"--seeds=1`, {date.today()}" in (tmp_path / "out" / "table.md").read_text()


def start(path: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bvpo.ablate", str(path), *options]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about in time"
        time.sleep(0.1)


def locked(folder: Path) -> bool:
    """Whether a fit runs in the folder."""
    with (folder / "lock_0").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_grid_that_was_stopped_goes_on(number: signal.Signals, write: Write, tmp_path: Path) -> None:
    """SIGINT and SIGTERM end the running fit behind a step, with a checkpoint; after SIGKILL it goes on by itself, and
    the next start waits for it. Either way the numbers are those of a grid that ran through."""
    steps = {"trainer.max_steps": 300, "checkpoint.every_n_train_steps": 1000}
    whole = write(cells={"a": steps}, output=str(tmp_path / "whole"))
    assert fit.main(load_grid(whole).fits[0].arguments) == 0
    path, seed = write(cells={"a": steps}), tmp_path / "out" / "a" / "seed_0"
    process = start(path)
    wait_for(lambda: (seed / "version_0" / "metrics.csv").exists())
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert b"Traceback" not in error
    if number != signal.SIGKILL:
        wait_for(lambda: not locked(seed))
        assert not (seed / "version_0" / "finished.json").exists()
        assert (seed / "version_0" / "checkpoints" / "last.ckpt").exists()
    assert ablate.main([str(path)]) == 0
    assert [run.name for run in seed.glob("version_*")] == ["version_0"]
    assert metrics_of(seed.parent) == metrics_of(tmp_path / "whole" / "a")
    assert not locked(seed)


@pytest.mark.slow
def test_a_fit_that_was_killed_says_so_and_is_taken_up_again(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(cells={"a": {"trainer.max_steps": 300}, "b": {}})
    seed = tmp_path / "out" / "a" / "seed_0"
    process = start(path)
    wait_for(lambda: (seed / "version_0" / "metrics.csv").exists())
    holders = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(seed).encode() in _command_line(entry)
    ]
    assert len(holders) == 1
    os.kill(holders[0], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and b"a, seed 0 failed" in error and b"killed by SIGKILL" in error
    assert (tmp_path / "out" / "b" / "seed_0" / "version_0" / "finished.json").exists()
    assert ablate.main([str(path)]) == 0


def _command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""
