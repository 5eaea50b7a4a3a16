"""Two gradients from two backward passes: each sketched as it is produced, then added, weighted, to their mixture.

Shapes: P parameters (the flat gradient's length), D numbers of a sketch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CHUNK = 1 << 22  # elements sketched at a time: bounds the scratch memory, 20 bytes an element


@dataclass(frozen=True)
class Sketch:
    """A random linear map from P to D numbers whose inner products are unbiased for those of the gradients.

    Element i is added to entry i mod D with a random sign s(i), so E⟨Sa, Sb⟩ = ⟨a, b⟩ over the signs, and the standard
    deviation is at most about ‖a‖‖b‖ √(2/D): 0.4% of the norms at the default D. The sign is a hash of (seed, i) alone:
    it is the same for every sharding and every order, and none is stored. Where P ≤ D the map is the identity.
    """

    parameters: int
    size: int = 65_536
    seed: int = 0

    @property
    def exact(self) -> bool:
        return self.parameters <= self.size

    @property
    def width(self) -> int:
        """Numbers of one sketch: min(P, D)."""
        return min(self.parameters, self.size)

    def add_(self, sketch: Tensor, values: Tensor, offset: int) -> None:
        """Add elements `offset … offset + len(values)` of the flat gradient to `sketch`, (D,), in place."""
        if self.exact:
            sketch[offset : offset + len(values)] += values
            return
        for start in range(0, len(values), CHUNK):
            chunk = values[start : start + CHUNK].to(sketch.dtype)
            first = offset + start
            chunk = chunk * signs(first, len(chunk), self.seed, chunk.device)
            self._fold_(sketch, chunk, first % self.size)

    def _fold_(self, sketch: Tensor, chunk: Tensor, column: int) -> None:
        head = min(self.size - column, len(chunk))
        sketch[column : column + head] += chunk[:head]
        rows = (len(chunk) - head) // self.size
        if rows:
            sketch += chunk[head : head + rows * self.size].view(rows, self.size).sum(0)
        tail = chunk[head + rows * self.size :]
        sketch[: len(tail)] += tail


def signs(first: int, count: int, seed: int, device: torch.device) -> Tensor:
    """s(first) … s(first + count − 1), ±1 as int8: 32 signs from each 32-bit hash (lowbias32) of the index over 32."""
    words = torch.arange(first // 32, (first + count - 1) // 32 + 1, device=device)
    words = (words + seed * 0x9E3779B1) & 0xFFFFFFFF
    words = ((words ^ (words >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    words = ((words ^ (words >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    words = words ^ (words >> 16)
    octets = words.view(torch.uint8).view(-1, 8)[:, :4]  # the low 32 bits, as bytes
    masks = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
    bits = (octets.unsqueeze(-1) & masks).ne(0).view(-1)[first % 32 : first % 32 + count]
    return 1 - 2 * bits.to(torch.int8)


class GradientMixer:
    """Collects Σ_k w_k g_k over the backward passes of one optimizer step, and a sketch of each g_k.

    Hooks take every parameter's gradient the moment it is accumulated: it is sketched unweighted, added to the mixture
    with its pass's weight, and freed. No second gradient-sized buffer is kept, and a weight of 0 erases no statistics.

    Args:
        parameters: Those that are trained, in an order that does not change between runs.
        sketch: None where no statistics are wanted.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sketch: Sketch | None) -> None:
        self.parameters, self.sketch = list(parameters), sketch
        self.offsets = [0, *accumulate(p.numel() for p in self.parameters)]
        self._mixed: list[Tensor | None] = [None] * len(self.parameters)
        self._weight = 1.0
        self._target: Tensor | None = None
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._hook(i)) for i, p in enumerate(self.parameters)
        ]

    def _hook(self, index: int):  # type: ignore[no-untyped-def]
        offset = self.offsets[index]

        @torch.no_grad()
        def collect(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            if self._target is not None and self.sketch is not None:
                self.sketch.add_(self._target, gradient.flatten(), offset)
            mixed = self._mixed[index]
            if mixed is not None:
                mixed.add_(gradient, alpha=self._weight)
            elif self._weight != 0.0:
                self._mixed[index] = gradient if self._weight == 1.0 else gradient.mul_(self._weight)

        return collect

    @contextmanager
    def collecting(self, weight: float) -> Iterator[Tensor | None]:
        """The backward pass inside goes into the mixture with this weight; yields its sketch (D,), filled on exit."""
        self._weight = weight
        if self.sketch is not None:
            first = self.parameters[0]
            dtype = torch.promote_types(first.dtype, torch.float32)
            self._target = torch.zeros(self.sketch.width, dtype=dtype, device=first.device)
        yield self._target
        self._target = None

    def release(self) -> None:
        """Hand the mixture to the parameters' `.grad` and start afresh."""
        for parameter, mixed in zip(self.parameters, self._mixed, strict=True):
            parameter.grad = mixed
        self._mixed = [None] * len(self.parameters)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
