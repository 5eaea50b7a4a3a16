"""What a run shows: a progress bar that counts optimizer steps, and the table it ends with."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from bvpo.module import BVPO
from bvpo.monitor import GradientMonitor
from bvpo.task_accuracy import TaskAccuracy, standard_error
from bvpo.traces import MODES
from bvpo.window import GradientWindow

SHOWN = {  # key → its name and format on the progress bar
    "loss/mixed": ("loss", ".3f"),
    "reward/trace_margin": ("margin", ".3f"),
    "mixing/alpha": ("α", ".3f"),
    "mixing/alpha_estimate": ("α̂", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "throughput/mfu": ("MFU", ".1%"),
    "memory/peak_gib": ("GiB", ".1f"),
}


class StepProgress(ProgressBar):
    """Optimizer steps done and to do, with rate, time left and the last step's figures."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, BVPO)
        total, done = pl_module.total_steps, trainer.global_step
        self._bar = tqdm(total=total, initial=done, desc="training", unit="step", disable=not self._enabled)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, BVPO) and self._bar is not None
        if trainer.global_step > self._bar.n:
            metrics = pl_module.metrics
            figures = {name: format(metrics[key], form) for key, (name, form) in SHOWN.items() if key in metrics}
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def print_report(trainer: L.Trainer, module: BVPO, root: str, console: Console | None = None) -> None:
    """Accuracies before and after, the mixing weight, the variances, and where everything lies."""
    console = console or Console()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TaskAccuracy) and callback.before and callback.after:
            console.print(_accuracy_table(callback))
    console.print(_mixing_table(module))
    # `trainer.log_dir` would ask all processes
    folder = getattr(trainer.logger, "log_dir", None) or trainer.default_root_dir
    console.out(f"run folder   {folder}", highlight=False)  # as it is: a name may look like markup
    console.out(f"curves       tensorboard --logdir {root}", highlight=False)


def _accuracy_table(accuracy: TaskAccuracy) -> Table:
    table = Table(
        title=f"Accuracy on {len(accuracy.questions)} held-out questions, T = {accuracy.decoding.temperature}"
    )
    for column in ("mode", "before %", "after %", "difference", "truncated after %"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode in MODES:
        before, after = accuracy.before[mode].correct, accuracy.after[mode].correct
        table.add_row(mode, *_before_after(before, after), f"{100 * accuracy.after[mode].truncated:.1f}")
    both = [torch.stack([side[mode].correct for mode in MODES]).mean(0) for side in (accuracy.before, accuracy.after)]
    table.add_row("mean of both", *_before_after(*both))
    return table


def _before_after(before: Tensor, after: Tensor) -> tuple[str, str, str]:
    """Means and paired difference of (Q,) values a question, in percent with standard errors."""
    return _percent(before), _percent(after), _percent(after - before, sign="+")


def _percent(values: Tensor, sign: str = "") -> str:
    return f"{100 * float(values.mean()):{sign}.1f} ± {100 * standard_error(values):.1f}"


def held(monitor: GradientMonitor | None) -> str:
    """What the windows hold, for the table's title; nothing where there are none."""
    if monitor is None:
        return ""
    steps = _count(_steps(monitor.window), "step")
    anchored = monitor.anchored
    return f", last {steps}" + ("" if anchored is None else f", α̂ of {_count(_steps(anchored), 'measurement')}")


def _steps(window: GradientWindow) -> int:
    """Optimizer steps whose units a window holds."""
    held = window.steps[: min(int(window.seen), window.capacity)]
    return len(held.unique())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _mixing_table(module: BVPO) -> Table:
    metrics, rows = module.metrics, module.batch_rows
    table = Table(title=f"Gradients, optimizer batch of {rows} rows{held(module.monitor)}")
    for column in ("quantity", "value", "meaning"):
        table.add_column(column, justify="right" if column == "value" else "left")

    def row(name: str, value: float | None, meaning: str, error: float | None = None) -> None:
        if value is not None:
            table.add_row(name, f"{value:.3g}" + (f" ± {error:.2g}" if error is not None else ""), meaning)

    estimate = module.monitor.estimate if module.monitor is not None else None
    row("α in use", metrics.get("mixing/alpha"), "weight of the trace gradient")
    if estimate is not None:
        row("α̂", estimate.value, f"weight of least error, {module.mixing.anchor} anchor", estimate.standard_error)
        if estimate.value is None:
            table.add_row("α̂", "—", estimate.reason)
        row("reused", estimate.reused_fraction or None, "fraction of products left out: prompts met again, no interval")
    own = ", each parameter group's own" if module.mixing.per_group else ""
    row("error ratio", metrics.get("mixing/mse_ratio"), f"squared error at α over that at α̂{own}")
    for key, name in (("trace", "trace gradient"), ("empty", "empty-trace gradient")):
        variance = metrics.get(f"variance/{key}")
        pairs = rows * metrics.get(f"pairs/{key}", 1.0)
        row(f"variance, {key}", None if variance is None else variance / pairs, f"of one batch's {name}")
    row("variance, mixed", metrics.get("variance/mixed"), "of one batch's mixed gradient, at α")
    row("skipped steps", metrics.get("skipped_steps") or None, "gradients that were not finite")
    return table
