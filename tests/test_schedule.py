"""How many optimizer steps a fit has, and the learning rate of each."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from bvpo.errors import UserError
from bvpo.optimization import follow_options, learning_rate_scale, scheduled
from bvpo.order import StepSampler
from tests.conftest import make_rows, write_rows


def learning_rates(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["learning_rate"]) for row in csv.DictReader(file) if row["learning_rate"]]


@pytest.mark.parametrize("limit", [1.0, 0.5, 0.01, 0, 1, 3, 5, 1000])
@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_steps_of_epochs_that_are_cut_short_are_those_that_are_served(limit: float, accumulate: int) -> None:
    """Against microbatches taken one by one: 41 rows are 21 microbatches of 2, the last optimizer batch is a part."""
    for epochs in range(9):
        sampler, closed = StepSampler(41, 2, accumulate), 0
        most = limit if isinstance(limit, int) else int(limit * len(sampler))
        for _ in range(epochs):
            for microbatch in islice(sampler, most):
                sampler.advance()
                closed += microbatch.closes_step
        assert StepSampler(41, 2, accumulate).steps_in(epochs, limit) == closed


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.max_steps=100", "--trainer.max_epochs=1"], 4),
        (["--trainer.max_steps=3", "--trainer.max_epochs=10"], 3),
        # of the rows' 8 microbatches 6 are an epoch, then the 2 that are left, then 6: two microbatches are a step
        (["--trainer.limit_train_batches=6", "--model.accumulate=2", "--trainer.max_epochs=3"], 7),
    ],
)
def test_the_schedule_ends_with_the_first_of_the_limits(
    fit_llama: Callable[..., Path], tmp_path: Path, options: list[str], steps: int
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", make_rows(16))
    size = "2" if "--model.accumulate=2" in options else "4"
    limits = [] if "--trainer.max_steps" in options[0] else ["--trainer.max_steps=-1"]
    run = fit_llama(*limits, *options, f"--data.train={source}", f"--data.batch_size={size}")
    expected = [1e-2 * learning_rate_scale(step, steps, 0, "cosine") for step in range(steps)]
    assert learning_rates(run) == pytest.approx(expected)


def test_a_fit_without_a_last_step_has_a_constant_learning_rate(
    fit_llama: Callable[..., Path], llama_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = ["--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:02"]
    run = fit_llama(*endless, "--model.schedule=constant")
    assert set(learning_rates(run)) == {1e-2}
    capsys.readouterr()
    with pytest.raises(AssertionError):
        fit_llama(*endless)
    error = capsys.readouterr().err
    assert "cosine schedule" in error and "--trainer.max_steps" in error and "Traceback" not in error


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_needs_an_end(schedule: str) -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(UserError, match=schedule):
        scheduled(optimizer, math.inf, 0, schedule)
    assert scheduled(optimizer, math.inf, 3, "constant").get_last_lr() == [pytest.approx(0.1 / 4)]


def optimizers() -> list[Callable[[float, float], Any]]:
    def plain(learning_rate: float, weight_decay: float) -> Any:
        return AdamW([nn.Parameter(torch.ones(3))], lr=learning_rate, weight_decay=weight_decay)

    def of_tensors(learning_rate: float, weight_decay: float) -> Any:  # as torchao keeps its learning rate
        return plain(torch.tensor(learning_rate), weight_decay)  # type: ignore[arg-type]

    return [plain, of_tensors]


def taken(optimizer: Any, scheduler: Any, steps: int) -> list[tuple[float, float, float]]:
    """Learning rate, logged learning rate and weight decay of some steps."""
    found = []
    for _ in range(steps):
        (group,) = optimizer.param_groups
        found.append((float(group["lr"]), float(scheduler.get_last_lr()[0]), group["weight_decay"]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("make", optimizers())
@pytest.mark.parametrize(("rate", "decay"), [(0.3, 0.0), (0.1, 0.0), (0.3, 0.5)])
def test_restored_options_give_way_to_those_that_were_given(make: Any, rate: float, decay: float) -> None:
    """Exactly those of a run that had them from the start: so, too, where nothing has changed."""
    old, new = make(0.3, 0.0), make(rate, decay)
    first, second = (scheduled(optimizer, 7, 2, "cosine") for optimizer in (old, new))
    taken(old, first, 4)
    whole = make(rate, decay)
    expected = taken(whole, scheduled(whole, 7, 2, "cosine"), 7)[4:]
    new.load_state_dict(old.state_dict())
    second.load_state_dict(first.state_dict())
    follow_options(second, rate, decay)
    assert taken(new, second, 3) == expected


def test_nothing_is_logged_every_0_steps(fit_llama: Callable[..., Path]) -> None:
    assert not (fit_llama("--trainer.log_every_n_steps=0", "--trainer.max_steps=2") / "metrics.csv").read_text()
