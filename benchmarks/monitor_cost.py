"""Cost of the gradient statistics: optimizer steps with and without them, in turn, in one fit of the tiny reasoner.

    python benchmarks/monitor_cost.py [--steps 120] [--threads 1]

Prints the median step of each kind, their ratio, and the ratio's range over the quartiles of paired steps. Both kinds
run the same two backward passes a microbatch; "with" adds the sketches, the Gram matrix, α̂ and its jackknife.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning as L
import torch
from datasets import Dataset

from bvpo.data import PairData
from bvpo.mixing import Fixed
from bvpo.module import BVPO
from bvpo.pairs import load_rows


class Alternate(L.Callback):
    """Turns the statistics on and off from one optimizer step to the next, and times every step."""

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = defaultdict(list)
        self.started = 0.0
        self.on = False

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if module._step is None:
            self.on = not self.on
            self.monitor = getattr(self, "monitor", module.monitor)
            module.monitor = self.monitor if self.on else None
            module.gradients.sketching = self.on
            self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.closes_step:
            self.seconds[self.on].append(time.perf_counter() - self.started)
            module.monitor = self.monitor  # checkpoints and the end of the fit find it in place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the figures to this file too")
    options = parser.parse_args()
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
    with_, without = (timer.seconds[on][5:] for on in (True, False))  # the first steps warm up
    ratios = [a / b for a, b in zip(with_, without, strict=False)]
    low, _, high = quantiles(ratios, n=4)
    figures = {
        "with_seconds": median(with_),
        "without_seconds": median(without),
        "ratio_of_medians": median(with_) / median(without),
        "paired_ratio_quartiles": [low, high],
        "steps": options.steps,
        "threads": options.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    for name, value in figures.items():
        print(f"{name:24} {value}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
