"""The window of units that a run keeps: state around the pure functions of `moments`.

Shapes: U units of one optimizer step, R rows a unit, D numbers of a gradient's sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from bvpo.moments import GradientMoments, pad_columns


class GradientWindow(Metric):
    """The last `capacity` units of a run, kept, moved and checkpointed as a torchmetrics metric.

    Every rank holds the same units (sketches are gathered before `update`), so nothing is synchronised on `compute`.

    Args:
        capacity: Units kept; an older one gives its place to a new one.
        width: D, numbers of a sketch.
        dtype: Of the vectors; products are float64.
    """

    full_state_update = False
    vectors: Tensor
    gram: Tensor
    rows: Tensor
    prompts: Tensor
    steps: Tensor
    seen: Tensor

    def __init__(self, capacity: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(sync_on_compute=False, dist_sync_on_step=False)
        if capacity < 1:
            raise ValueError(f"a window holds at least one unit, got a capacity of {capacity}")
        self.capacity = capacity
        self._keep("vectors", torch.zeros(2, capacity, width, dtype=dtype))
        self._keep("gram", torch.zeros(2, 2, capacity, capacity, dtype=torch.float64))
        self._keep("rows", torch.zeros(capacity, dtype=torch.float64))
        self._keep("prompts", torch.full((capacity, 1), -1))
        self._keep("steps", torch.full((capacity,), -1))
        self._keep("seen", torch.tensor(0))

    def _keep(self, name: str, default: Tensor) -> None:
        self.add_state(name, default, dist_reduce_fx=None, persistent=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Follow the model to its device, but not to bf16: sums of products need their precision."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

        return super()._apply(move, exclude_state)

    def update(self, trace: Tensor, empty: Tensor, rows: Tensor, prompts: Tensor, step: int) -> None:
        """Add the units of one optimizer step: (U, D) trace and empty gradients, (U,) rows, (U, R) prompt keys."""
        new = torch.stack([trace, empty])[:, -self.capacity :].to(self.vectors)
        units = new.shape[1]
        slots = (int(self.seen) + torch.arange(units, device=new.device)) % self.capacity
        self.vectors[:, slots] = new
        products = torch.einsum("aud,bcd->abuc", new.double(), self.vectors.double())
        self.gram[:, :, slots, :] = products
        self.gram[:, :, :, slots] = products.permute(1, 0, 3, 2)
        self.rows[slots] = rows[-units:].to(self.rows)
        self.prompts = pad_columns(self.prompts, prompts.shape[1])
        self.prompts[slots] = pad_columns(prompts[-units:].to(self.prompts), self.prompts.shape[1])
        self.steps[slots] = step
        self.seen += units

    def compute(self) -> Tensor:
        """(2, 2) trΣ_ab per row, of trace and empty gradients. Raises ValueError where no unit is held."""
        return self.moments().statistics().covariance[..., 0]

    def moments(self) -> GradientMoments:
        """The units held, as they are. Raises ValueError where there is none."""
        units = min(int(self.seen), self.capacity)
        if units == 0:
            raise ValueError("the window holds no unit yet")
        return GradientMoments(
            self.vectors[:, :units],
            self.gram[:, :, :units, :units].cpu(),
            self.rows[:units].cpu(),
            self.prompts[:units].cpu(),
            self.steps[:units].cpu(),
        )
