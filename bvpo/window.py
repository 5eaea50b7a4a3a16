"""The window of units that a run keeps: state around the pure functions of `moments`.

Shapes: U units of one optimizer step, C units kept, E estimators, R rows a unit, G parameter groups,
D numbers of a gradient's sketch: its groups' numbers one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from bvpo.moments import GradientMoments, inner_products, pad_columns


class GradientWindow(Metric):
    """The last `capacity` units of a run, kept, moved and checkpointed as a torchmetrics metric.

    Every rank holds the same units (sketches are gathered before `update`), so nothing is synchronised on `compute`.

    Args:
        capacity: Units kept; an older one gives its place to a new one.
        widths: Numbers of each parameter group's sketch.
        estimators: 2 (trace, empty), or 3 with an anchor.
        dtype: Of the vectors; products are float64.
    """

    full_state_update = False
    vectors: Tensor  # (E, C, D)
    grams: Tensor  # (G, E, E, C, C)
    counts: Tensor  # (E, E, C)
    prompts: Tensor  # (C, R)
    steps: Tensor  # (C,)
    seen: Tensor  # ()

    def __init__(
        self, capacity: int, widths: Sequence[int], estimators: int = 2, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(sync_on_compute=False, dist_sync_on_step=False)
        if capacity < 1:
            raise ValueError(f"a window holds at least one unit, got a capacity of {capacity}")
        self.capacity = capacity
        self.cuts = [slice(*ends) for ends in pairwise([0, *accumulate(widths)])]
        self._keep("vectors", torch.zeros(estimators, capacity, sum(widths), dtype=dtype))
        self._keep("grams", torch.zeros(len(widths), estimators, estimators, capacity, capacity, dtype=torch.float64))
        self._keep("counts", torch.zeros(estimators, estimators, capacity, dtype=torch.float64))
        self._keep("prompts", torch.full((capacity, 1), -1))
        self._keep("steps", torch.full((capacity,), -1))
        self._keep("seen", torch.tensor(0))

    def _keep(self, name: str, default: Tensor) -> None:
        self.add_state(name, default, dist_reduce_fx=None, persistent=True)
        self._defaults[name] = default.reshape(-1)[0].clone().expand(default.shape)  # else a copy as large

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Follow the model to its device, but not to bf16: sums of products need their precision."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

        return super()._apply(move, exclude_state)

    def update(self, gradients: Tensor, counts: Tensor, prompts: Tensor, step: int) -> None:
        """Add the units of one optimizer step: (E, U, D) gradients, (E, E, U) or (U,) rows, (U, R) prompt keys."""
        new = gradients[:, -self.capacity :].to(self.vectors)
        units = new.shape[1]
        slots = (int(self.seen) + torch.arange(units, device=new.device)) % self.capacity
        self.vectors[:, slots] = new
        for gram, cut in zip(self.grams, self.cuts, strict=True):
            products = inner_products(new[..., cut], self.vectors[..., cut]).to(gram)
            gram[:, :, slots, :] = products
            gram[:, :, :, slots] = products.permute(1, 0, 3, 2)
        self.counts[:, :, slots] = counts[..., -units:].to(self.counts)
        self.prompts = pad_columns(self.prompts, prompts.shape[1])
        self.prompts[slots] = pad_columns(prompts[-units:].to(self.prompts), self.prompts.shape[1])
        self.steps[slots] = step
        self.seen += units

    def compute(self) -> Tensor:
        """(E, E) trΣ_ab per row, of all estimators. Raises ValueError where no unit is held."""
        return self.moments().statistics().covariance[..., 0]

    def moments(self, group: int | None = None) -> GradientMoments:
        """The units held: of one parameter group, or of all parameters. Raises ValueError where no unit is held."""
        units = min(int(self.seen), self.capacity)
        if units == 0:
            raise ValueError("the window holds no unit yet")
        gram, cut = (self.grams.sum(0), slice(None)) if group is None else (self.grams[group], self.cuts[group])
        return GradientMoments(
            self.vectors[:, :units, cut],
            gram[:, :, :units, :units].cpu(),
            self.counts[:, :, :units].cpu(),
            self.prompts[:units].cpu(),
            self.steps[:units].cpu(),
        )
