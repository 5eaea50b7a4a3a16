"""Options that are changed when a run goes on: followed, or refused, or said to start something anew."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from bvpo.checkpoints import read_checkpoint
from bvpo.data import Microbatches, PairLoader
from bvpo.errors import UserError
from bvpo.optimization import learning_rate_scale
from bvpo.order import StepSampler
from tests.conftest import make_rows, write_rows


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_learning_rate_and_weight_decay_are_followed(fit_llama: Callable[..., Path], schedule: str) -> None:
    given = [f"--model.schedule={schedule}", "--trainer.max_steps=4"]
    run = fit_llama(*given[:1], "--trainer.max_steps=2", "--model.learning_rate=1e-3")
    fit_llama(*given, "--model.learning_rate=1e-4", "--model.weight_decay=0.5", "--ckpt_path=last")
    rates = [1e-3 * learning_rate_scale(step, 2, 0, schedule) for step in range(2)]
    rates += [1e-4 * learning_rate_scale(step, 4, 0, schedule) for step in range(2, 4)]
    assert [float(row["learning_rate"]) for row in table(run)] == pytest.approx(rates)
    (group,) = read_checkpoint(run / "checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == 0.5


WINDOW = {
    "longer": ["--model.mixing.window=8"],
    "shorter": ["--model.mixing.window=2"],
    "off": ["--model.mixing.window=0"],
    "sketched": ["--model.sketch_size=100"],
    "per group": ["--model.mixing.per_group=true"],
}


@pytest.mark.parametrize(
    "change", [name if name in ("longer", "off") else pytest.param(name, marks=pytest.mark.slow) for name in WINDOW]
)
def test_statistics_of_other_options_start_anew(fit_llama: Callable[..., Path], tmp_path: Path, change: str) -> None:
    """What they say afterwards is what they say in a run that goes on from a checkpoint without statistics."""
    given = ["--data.batch_size=2", "--model.accumulate=2", "--model.schedule=constant"]
    runs = []
    for root, window in (("with", "4"), ("without", "0")):
        start = [*given, f"--model.mixing.window={window}", "--trainer.max_steps=3"]
        run = fit_llama(*start, root=tmp_path / root)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options = [*given, "--model.mixing.window=4", *WINDOW[change], "--trainer.max_steps=6", "--ckpt_path=last"]
            fit_llama(*options, root=tmp_path / root)
        said = [str(warning.message) for warning in caught if "gradient statistics" in str(warning.message)]
        assert len(said) == (0 if root == "without" and change == "off" else 1)
        runs.append([{name: value for name, value in row.items() if value} for row in table(run)[3:]])
    assert len(runs[0]) == 3 and runs[0] == runs[1]


def test_statistics_of_the_same_options_go_on(fit_llama: Callable[..., Path], tmp_path: Path) -> None:
    given = ["--data.batch_size=2", "--model.accumulate=2", "--model.schedule=constant", "--model.mixing.window=2"]
    whole = fit_llama(*given, "--trainer.max_steps=5", root=tmp_path / "whole")
    parts = fit_llama(*given, "--trainer.max_steps=3", root=tmp_path / "parts")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*gradient statistics")
        fit_llama(*given, "--trainer.max_steps=5", "--ckpt_path=last", root=tmp_path / "parts")
    assert table(parts) == table(whole)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (["--seed_everything=2"], "seed 0 → 2"),
        (["--data.bucket_by_length=true"], "bucket_by_length 0 → 1"),
        (["--data.rows_together=2"], "rows_together 1 → 2"),
        (["--data.train=other"], "rows 32 → 10"),
    ],
)
def test_another_order_of_rows_is_refused(
    fit_llama: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    found: str,
) -> None:
    given = ["--model.mixing.window=0", "--data.on_bad_row=drop"]
    rows = make_rows(32)
    for row in rows:
        row["prompt_id"] = f"p{int(row['prompt_id'][1:]) // 2}"
    source = write_rows(tmp_path / "rows.jsonl", rows)
    fit_llama(*given, f"--data.train={source}", "--trainer.max_steps=1")
    other = write_rows(tmp_path / "other.jsonl", make_rows(10))
    change = [option.replace("=other", f"={other}") for option in change]
    capsys.readouterr()
    with pytest.raises(AssertionError):
        fit_llama(*given, f"--data.train={source}", *change, "--trainer.max_steps=2", "--ckpt_path=last")
    error = capsys.readouterr().err
    assert "optimizer batches were cut otherwise" in error and found in error and "Traceback" not in error


def test_a_loader_takes_its_own_state_and_that_of_older_versions(tokenizer: object) -> None:
    loader = PairLoader(Microbatches(None, 0), StepSampler(10, 2, seed=3))  # type: ignore[arg-type]
    loader.order.advance()
    state = loader.state_dict()
    loader.load_state_dict(state)
    loader.load_state_dict({name: state[name] for name in ("epoch", "served", "batch_size", "accumulate", "processes")})
    with pytest.raises(UserError, match="seed 4 → 3"):
        loader.load_state_dict(state | {"seed": 4})
