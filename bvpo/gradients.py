"""Two gradients from two backward passes: each sketched as it is produced, then added, weighted, to their mixture.

Shapes: P parameters (the flat gradient's length), D numbers of a sketch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bvpo import ranks
from bvpo.slices import local, local_elements

CHUNK = 1 << 22  # elements sketched at a time: bounds the scratch memory, 20 bytes an element
KEPT = 1 << 26  # parameters of a model whose signs are kept: hashing them takes longer than adding; a byte each


@dataclass(frozen=True)
class Sketch:
    """A random linear map from P to D numbers whose inner products are unbiased for those of the gradients.

    Element i is added to entry i mod D with a random sign s(i), so E⟨Sa, Sb⟩ = ⟨a, b⟩ over the signs. The standard
    deviation is about ‖a‖‖b‖ √(2/D), 0.8% of the norms at the default size, where the gradient's mass is spread evenly
    over the entries, and more where it gathers on few. D is therefore a prime: no width of a matrix divides it, so
    neither a row nor a column gathers. The sign is a hash of (seed, i) alone: it is the same for every sharding and
    every order. Where P ≤ size the map is the identity.

    Attributes:
        parameters: P.
        size: Numbers that a sketch may have.
    """

    parameters: int
    size: int = 32_768
    seed: int = 0

    @property
    def exact(self) -> bool:
        return self.parameters <= self.size

    @property
    def width(self) -> int:
        """D, the numbers of one sketch: P, or the largest prime up to `size`."""
        return self.parameters if self.exact else largest_prime(self.size)

    def add_(self, sketch: Tensor, values: Tensor, offset: int) -> None:
        """Add elements `offset … offset + len(values)` of the flat gradient to `sketch`, (D,), in place."""
        if self.exact:
            sketch[offset : offset + len(values)] += values
            return
        for start in range(0, len(values), CHUNK):
            chunk = values[start : start + CHUNK].to(sketch.dtype)
            sign = signs(offset + start, len(chunk), self.seed, chunk.device).to(chunk.dtype)
            self._fold_(sketch, chunk * sign, (offset + start) % self.width)

    def _fold_(self, sketch: Tensor, chunk: Tensor, column: int) -> None:
        width = self.width
        head = min(width - column, len(chunk))
        sketch[column : column + head] += chunk[:head]
        rows = (len(chunk) - head) // width
        if rows:
            sketch += chunk[head : head + rows * width].view(rows, width).sum(0)
        tail = chunk[head + rows * width :]
        sketch[: len(tail)] += tail


@cache
def largest_prime(limit: int) -> int:
    """The largest prime up to `limit`; 1 where there is none."""
    return next((n for n in range(limit, 1, -1) if all(n % d for d in range(2, math.isqrt(n) + 1))), 1)


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


@dataclass(frozen=True)
class Group:
    """Parameters with one mixing weight: their places among the trained ones, and the sketch of their gradient."""

    name: str
    members: list[int]
    sketch: Sketch


def single_group(parameters: Sequence[nn.Parameter], sketch_size: int) -> list[Group]:
    """All parameters in one group."""
    total = sum(p.numel() for p in parameters)
    return [Group("all", list(range(len(parameters))), Sketch(total, sketch_size))]


def layer_groups(parameters: Mapping[str, nn.Parameter], sketch_size: int) -> list[Group]:
    """The embedding, each layer, and the rest (final norm, head), by the parameters' names.

    The sketch's numbers are shared out evenly; a group with fewer parameters than its share is kept exactly.
    """
    members: dict[str, list[int]] = {}
    for index, name in enumerate(parameters):
        layer = re.search(r"\.(\d+)\.", name)
        embedding = re.search(r"embed|wte|wpe", name)
        members.setdefault(f"layer_{layer[1]}" if layer else "embedding" if embedding else "head", []).append(index)
    sizes = [p.numel() for p in parameters.values()]
    share = max(1, sketch_size // len(members))
    return [Group(name, own, Sketch(sum(sizes[i] for i in own), share)) for name, own in members.items()]


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter's gradient that go to consecutive numbers of the sketch.

    Attributes:
        elements: Which of the flat parameter's.
        target: (N,) the numbers they are added to: a view of the sketch.
        signs: (N,) ±1, in the sketch's dtype, or int8 where the model is not that small.
    """

    elements: slice
    target: Tensor
    signs: Tensor

    def add_(self, flat: Tensor) -> None:
        """Add the parameter's flat gradient, whatever its dtype."""
        own, signs = flat[self.elements], self.signs
        if own.dtype is signs.dtype is self.target.dtype:
            self.target.addcmul_(own, signs)
        else:
            self.target.addcmul_(own.to(self.target.dtype), signs.to(self.target.dtype))


class GradientMixer:
    """Collects Σ_k w_k g_k over the backward passes of one optimizer step, and a sketch of each g_k.

    Hooks take every parameter's gradient the moment it is accumulated: it is sketched unweighted, added to the mixture
    with its pass's weight, and freed. No second gradient-sized buffer is kept, and a weight of 0 erases no statistics.

    Where parameters are divided over ranks, gradients are too, and each rank's sketch is of its slices: their sum over
    ranks is the gradient's.

    Args:
        parameters: Those that are trained, in an order that does not change between runs.
        groups: A partition of them; a sketch is its groups' sketches one after the other.
        sketching: False where no statistics are wanted.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Sequence[Group], sketching: bool = True) -> None:
        self.parameters, self.groups, self.sketching = list(parameters), list(groups), sketching
        self.width = sum(group.sketch.width for group in groups)
        self._mixed: list[Tensor | None] = [None] * len(self.parameters)
        self._weights = [1.0] * len(self.groups)
        first = self.parameters[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        self._sketch = torch.zeros(self.width if sketching else 0, dtype=dtype, device=local(first).device)
        self._collecting = False
        self._places = self._layout()
        self._pieces = {i: self._cut(i) for i in range(len(self.parameters))} if sketching else {}
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._hook(i)) for i, p in enumerate(self.parameters)
        ]

    def _layout(self) -> dict[int, tuple[int, int, int]]:
        """Of each parameter: its group, where the group's sketch starts, and its offset in the group's gradient."""
        places, start = {}, 0
        for number, group in enumerate(self.groups):
            offset = 0
            for index in group.members:
                places[index] = (number, start, offset)
                offset += self.parameters[index].numel()
            start += group.sketch.width
        return places

    def _cut(self, index: int) -> list[Piece] | None:
        """A parameter cut where the sketch begins anew, with its signs; None where the model is too large to keep them.

        Small gradients are many: views and signs that are ready are most of the cost of their sketch.
        """
        number, start, offset = self._places[index]
        sketch, own = self.groups[number].sketch, local_elements(self.parameters[index])
        if sketch.parameters > KEPT:
            return None
        offset, end = offset + own.start, offset + own.stop
        kept = self._sketch.dtype if sketch.parameters <= CHUNK else torch.int8
        borders = range((offset // sketch.width + 1) * sketch.width, end, sketch.width)
        target = self._sketch[start : start + sketch.width]
        count = end - offset
        flips = target.new_ones(count) if sketch.exact else signs(offset, count, sketch.seed, target.device)
        parts = [(slice(a - offset, b - offset), a % sketch.width) for a, b in pairwise([offset, *borders, end])]
        flips = flips.to(kept)
        return [Piece(part, target[first:][: part.stop - part.start], flips[part]) for part, first in parts]

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        number, start, offset = self._places[index]
        sketch, pieces = self.groups[number].sketch, self._pieces.get(index)
        offset += local_elements(self.parameters[index]).start

        @torch.no_grad()
        def collect(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            if self._collecting:
                flat = local(gradient).flatten()
                if pieces is None:
                    sketch.add_(self._sketch[start : start + sketch.width], flat, offset)
                for piece in pieces or ():
                    piece.add_(flat)
            mixed, weight = self._mixed[index], self._weights[number]
            if mixed is not None:
                local(mixed).add_(local(gradient), alpha=weight)
            elif weight != 0.0:
                local(gradient).mul_(weight)
                self._mixed[index] = gradient

        return collect

    @contextmanager
    def collecting(self, weights: Sequence[float]) -> Iterator[Tensor | None]:
        """The backward passes inside go into the mixture with a weight a group; yields their sketch, (D,)."""
        self._weights = list(weights)
        self._collecting = self.sketching
        collected = torch.empty_like(self._sketch) if self.sketching else None
        yield collected
        if collected is not None:
            collected.copy_(self._sketch)
            self._sketch.zero_()
        self._collecting = False

    def release(self, sum_over_ranks: bool = False) -> None:
        """Hand the mixture to the parameters' `.grad` and start afresh.

        Args:
            sum_over_ranks: Each rank has the whole gradient of its own rows; else it has its slice of all rows' one.
        """
        if sum_over_ranks:
            present = ranks.largest([mixed is not None for mixed in self._mixed])
            for index, parameter in enumerate(self.parameters):
                if present[index] and self._mixed[index] is None:  # this rank had no row for it
                    self._mixed[index] = torch.zeros_like(parameter)
            ranks.total_([mixed for mixed in self._mixed if mixed is not None])
        for parameter, mixed in zip(self.parameters, self._mixed, strict=True):
            parameter.grad = mixed
        self._mixed = [None] * len(self.parameters)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
