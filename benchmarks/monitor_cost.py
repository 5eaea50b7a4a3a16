"""Cost of the gradient statistics: optimizer steps with and without them, in one fit of the tiny reasoner.

    python benchmarks/monitor_cost.py [--steps 400] [--threads 1]

Steps come in pairs, one of each kind, in random order. Prints the median step of each kind and their ratio with its
95% interval, from 2,000 bootstrap draws of pairs. Times are the process's CPU time: on a shared machine wall time
varies by more than what is measured. Both kinds run the same two backward passes a microbatch; "with" adds the
sketches, the Gram matrix, α̂ and its jackknife.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import record
import torch
from datasets import Dataset

from bvpo.data import PairData
from bvpo.mixing import Fixed
from bvpo.module import BVPO
from bvpo.pairs import load_rows

WARM_UP = 10  # first steps of each kind that are not counted


class Alternate(L.Callback):
    """Turns the statistics on for one step of each pair, at random which, and times every step."""

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.random = np.random.default_rng(0)
        self.order: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if module._step is None:
            first = bool(self.random.integers(2))
            self.order = self.order or [first, not first]
            self.on = self.order.pop(0)
            self.monitor = getattr(self, "monitor", module.monitor)
            module.monitor = self.monitor if self.on else None
            module.gradients.sketching = self.on
            self.started = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.closes_step:
            self.seconds[self.on].append(time.process_time() - self.started)
            module.monitor = self.monitor  # checkpoints and the end of the fit find it in place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the figures to this file too")
    options = parser.parse_args()
    if options.steps % 2 or options.steps <= 2 * WARM_UP:
        parser.error(
            f"--steps {options.steps}: must be even and over {2 * WARM_UP}, as the first {WARM_UP} pairs warm up"
        )
    facts = record.circumstances()
    torch.set_num_threads(options.threads)
    L.seed_everything(0, verbose=False)
    rows = load_rows("builtin:tiny_reasoner")
    row = sorted(rows, key=lambda row: len(row["chosen"]) + len(row["rejected"]))[len(rows) // 2]
    folder = Path(tempfile.mkdtemp())  # 16 prompts of one length, so that every step is the same work
    Dataset.from_list([{**row, "prompt_id": str(k)} for k in range(16)]).to_parquet(folder / "rows.parquet")
    timer = Alternate()
    module = BVPO(mixing=Fixed(0.5), beta=0.5, learning_rate=2e-4, accumulate=4)
    L.Trainer(
        max_steps=options.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timer],
    ).fit(module, datamodule=PairData(str(folder / "rows.parquet"), batch_size=4, accumulate=4))
    with_, without = (np.array(timer.seconds[on][WARM_UP:]) for on in (True, False))
    draws = np.random.default_rng(0).integers(len(with_), size=(2000, len(with_)))
    ratios = np.median(with_[draws], 1) / np.median(without[draws], 1)
    figures = {
        "with_seconds": float(np.median(with_)),
        "without_seconds": float(np.median(without)),
        "ratio_of_medians": float(np.median(with_) / np.median(without)),
        "ratio_95_interval": np.quantile(ratios, [0.025, 0.975]).tolist(),
        "median_of_paired_ratios": float(np.median(with_ / without)),
        "steps": options.steps,
        "threads": options.threads,
    }
    for name, value in figures.items():
        print(f"{name:24} {value}")
    record.show(facts)
    record.write(options.json, facts, figures)


if __name__ == "__main__":
    main()
