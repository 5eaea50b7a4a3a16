"""Validation: what is logged where, what callbacks see, and the rows that it takes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import make_rows, write_rows
from tests.test_anchor import with_anchors


def table(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    return f"--data.validation={write_rows(tmp_path / 'held_out.jsonl', make_rows(8, seed=5))}"


def test_validation_is_logged_by_optimizer_steps_and_mixed_as_the_next_step_is(
    fit_llama: Callable[..., Path], held_out: str
) -> None:
    """α falls from 1 to 0 over four steps; a validation behind 2 and 4 of them is mixed by the α that comes next."""
    schedule = ["--model.mixing=bvpo.mixing.Schedule", "--model.mixing.start=1", "--model.mixing.end=0"]
    run = fit_llama(
        held_out,
        *schedule,
        "--model.mixing.steps=4",
        "--model.accumulate=2",
        "--trainer.val_check_interval=4",
        "--trainer.max_steps=4",
    )
    rows = [row for row in table(run) if "validation/loss/trace" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for row, alpha in zip(rows, (0.5, 0.0), strict=True):
        trace, empty = row["validation/loss/trace"], row["validation/loss/empty"]
        assert trace != empty and "epoch" not in row
        assert row["validation/loss/mixed"] == pytest.approx(alpha * trace + (1 - alpha) * empty)


def test_a_checkpoint_is_named_by_optimizer_steps(fit_llama: Callable[..., Path], held_out: str) -> None:
    """Behind a validation too: Lightning takes the name's step from a metric of that name, where there is one."""
    run = fit_llama(
        held_out,
        "--checkpoint.monitor=validation/loss/mixed",
        "--checkpoint.save_top_k=-1",
        "--checkpoint.every_n_train_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.max_steps=4",
    )
    from bvpo.checkpoints import read_checkpoint

    named = {path.stem.rpartition("step=")[2]: path for path in (run / "checkpoints").glob("*step=*.ckpt")}
    assert named
    for step, path in named.items():
        assert read_checkpoint(path)["global_step"] == int(step)


def test_early_stopping_watches_the_mixed_loss(fit_llama: Callable[..., Path], held_out: str) -> None:
    """A loss that may not fall by a nat has not improved: the second validation is the last."""
    run = fit_llama(
        held_out,
        "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
        "--trainer.callbacks.monitor=validation/loss/mixed",
        "--trainer.callbacks.min_delta=1",
        "--trainer.callbacks.patience=1",
        "--trainer.val_check_interval=2",
        "--trainer.max_steps=8",
    )
    assert sum("validation/loss/mixed" in row for row in table(run)) == 2


def test_validation_rows_need_no_anchor_traces(fit_llama: Callable[..., Path], tmp_path: Path, held_out: str) -> None:
    anchored = write_rows(tmp_path / "anchored.jsonl", with_anchors(make_rows(8)))
    run = fit_llama(
        held_out,
        f"--data.train={anchored}",
        "--model.mixing.anchor=marginal",
        "--trainer.val_check_interval=2",
        "--trainer.max_steps=2",
    )
    rows = table(run)
    assert "anchor/effective_size" in rows[0] and "validation/loss/trace" in rows[-1]
