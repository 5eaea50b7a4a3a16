"""The optimizer, and what its learning rate does over the steps of a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bvpo import ranks
from bvpo.errors import UserError


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
