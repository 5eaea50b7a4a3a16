from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def test_a_model_of_another_architecture_trains(fit_llama: Callable[..., Path]) -> None:
    run = fit_llama("--model.accumulate=2")
    print(run, list(run.rglob("*")))
    print((run / "metrics.csv").read_text())
