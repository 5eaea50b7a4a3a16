"""What a fit refuses before it trains wrongly: a trainer that is set up otherwise, a checkpoint of another model."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from bvpo.errors import UserError
from bvpo.sharding import FSDP2

State = dict[str, Any]


def check_trainer(trainer: L.Trainer) -> None:
    """Raises UserError where the trainer is set up in a way that the module would train wrongly."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | FSDP2):
        raise UserError(
            f"strategy {type(trainer.strategy).__name__}: gradients are mixed and summed over processes for one "
            "device, ddp and fsdp2 only: set --trainer.strategy fsdp2, which divides parameters over all processes"
        )
    if trainer.precision in ("16-mixed", "16-true"):
        raise UserError(
            f"precision {trainer.precision}: fp16 gradients are scaled, which clipping and statistics do not undo; "
            "use bf16-mixed, bf16-true or 32-true"
        )


def check_policy(state: State, own: State, name: str, policy: str) -> None:
    """Raises UserError where a checkpoint's tensors are not those of the policy.

    Args:
        state, own: Of the checkpoint's module and of this one.
        name, policy: What their policies are called.
    """
    found = {key: tuple(value.shape) for key, value in state.items() if key.startswith("policy.")}
    expected = {key: tuple(value.shape) for key, value in own.items() if key.startswith("policy.")}
    if found == expected:
        return
    differing = sum(found.get(key) != expected.get(key) for key in found.keys() | expected.keys())
    raise UserError(
        f"the checkpoint is of {name}, the policy is {policy}: {differing} tensors differ. "
        "Give the checkpoint's own policy with --model.policy, or another checkpoint"
    )


def with_fitting_statistics(state: State, own: State) -> State:
    """A checkpoint's state; with this module's own, empty statistics where its were kept with other options."""
    if _statistics(state) == _statistics(own):
        return state
    rank_zero_warn(
        "the checkpoint's gradient statistics were kept with other options (model.mixing, model.sketch_size): "
        "they are left out, and the window starts anew"
    )
    kept = {name: value for name, value in state.items() if not name.startswith("monitor.")}
    return kept | {name: own[name] for name in _statistics(own)}


def _statistics(state: State) -> dict[str, tuple[int, ...]]:
    """Shapes of the windows' tensors in a module's state; of prompts, whose number a unit grows, the units alone."""
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items() if name.startswith("monitor.")}
    return {name: shape[:1] if name.endswith(".prompts") else shape for name, shape in shapes.items()}
