"""The optimizer, what its learning rate does over the steps of a fit, and which steps are not taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch._functorch.config
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bvpo import ranks
from bvpo.errors import UserError

WATCHED = ("gradient/trace_norm", "gradient/empty_norm", "gradient/mixed_norm")
SKIPS_IN_A_ROW = 10


def adamw(name: str, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW with moments in the weights' precision, or in 8 bits. Raises UserError where torchao is not installed."""
    if name == "adamw":
        return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError("--model.optimizer adamw_8bit needs torchao: pip install 'bvpo[8bit]'") from error
    if ranks.count() > 1:  # compiled steps are cached by the whole tensor's shape: slices may have different ones
        torch._functorch.config.enable_autograd_cache = False
    return cast(Optimizer, AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay))


def scheduled(optimizer: Optimizer, total: float, warmup: int, schedule: str) -> LambdaLR:
    """The learning rate of each of a fit's `total` optimizer steps.

    Raises:
        UserError: The fit has no last step (`total` is inf) and the schedule would need one.
    """
    if math.isinf(total) and schedule != "constant":
        raise UserError(
            f"the {schedule} schedule ends at the fit's last optimizer step, and nothing says which that is: set "
            "--trainer.max_steps or --trainer.max_epochs, or --model.schedule constant"
        )
    return LambdaLR(optimizer, lambda step: learning_rate_scale(step, total, warmup, schedule))


def follow_options(scheduler: LambdaLR, learning_rate: float, weight_decay: float) -> None:
    """Go on with these options where a checkpoint has brought back those that it was written with.

    The learning rate is set to that of the scheduler's own step: where no option has changed, it is what it was, to
    the bit.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [  # torchao's are tensors
        torch.full_like(group["lr"], learning_rate) if isinstance(group["lr"], Tensor) else learning_rate
        for group in groups
    ]
    scale = [schedule(scheduler.last_epoch) for schedule in scheduler.lr_lambdas]
    scheduler._last_lr = [peak * share for peak, share in zip(scheduler.base_lrs, scale, strict=True)]
    for group, peak, share in zip(groups, scheduler.base_lrs, scale, strict=True):
        group |= {"lr": peak * share, "initial_lr": peak, "weight_decay": weight_decay}


def learning_rate_scale(step: int, total: float, warmup: int, schedule: str) -> float:
    """Learning rate over its peak at optimizer step `step` of `total`: a linear warm-up, then the schedule to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0


class SkippedSteps:
    """Optimizer steps that are not taken, as their gradient is not finite: it touches neither weights nor window.

    Attributes:
        total: Of the whole run.
    """

    def __init__(self) -> None:
        self.total = self._in_a_row = 0

    def may_step(self, metrics: Mapping[str, float], number: int) -> bool:
        """Whether a step with these norms is taken; a warning says why not. Raises UserError at the tenth in a row."""
        broken = [name for name in WATCHED if not math.isfinite(metrics.get(name, 0.0))]
        if not broken:
            self._in_a_row = 0
            return True
        self.total += 1
        self._in_a_row += 1
        found = ", ".join(f"{name} = {metrics[name]}" for name in broken)
        if self._in_a_row >= SKIPS_IN_A_ROW:
            raise UserError(
                f"step {number}: {found}; {SKIPS_IN_A_ROW} optimizer steps in a row had a gradient that is not finite. "
                "Lower the learning rate, train in bf16-mixed or fp32, or look for broken rows"
            )
        rank_zero_warn(f"step {number} skipped ({self.total} so far): {found}")
        return False
