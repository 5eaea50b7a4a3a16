"""How fast a fit is, and how near to what its devices can do: model FLOPs, MFU, peak memory.

Model FLOPs are the multiplications and additions that a step's tokens ask for, whatever is computed: padding, a prompt
computed twice and layers computed again for the backward pass are not counted. Of a pair with a prompt of p tokens and
completions of c and r tokens, a forward pass takes

    2 W (p + c + r) + 2 V D (c + r) + 4 A Σ_layers [K(p + c) + K(p + r) − K(p)]

with W numbers in the layers' matrices, vocabulary V, hidden states of D numbers, attention heads of A numbers together,
and K(n) = m (n − m/2), m = min(n, w), keys that n tokens attend to: attention is causal, so half of a square, and at
most w keys a token in a layer with a sliding window of w. A backward pass takes twice that: 6 N a token of both, with
N = W + V D. The reference in memory adds a forward pass. (Kaplan et al., arXiv 2001.08361, section 2.1; MFU: PaLM,
arXiv 2204.02311, appendix B.)

Shapes: S sequences of a branch's microbatch (the chosen ones, then the rejected ones).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from bvpo import ranks
from bvpo.batches import SequenceBatch
from bvpo.shapes import ModelShape


@dataclass(frozen=True)
class Device:
    """Peak rates of dense matrix products, in FLOP/s, by the makers' data sheets (theirs "with sparsity" halved).

    Attributes:
        name: Regular expression found in the name that the driver gives.
    """

    name: str
    bf16: float
    tf32: float
    fp32: float


DEVICES = (  # the first whose name fits
    Device(r"\bGB200\b", 2.5e15, 1.25e15, 80e12),
    Device(r"\bB200\b", 2.25e15, 1.1e15, 75e12),
    Device(r"\bH[12]00 NVL\b", 835.5e12, 417.5e12, 60e12),
    Device(r"\bH100 PCIe\b", 756.5e12, 378e12, 51e12),
    Device(r"\bH[12]00\b", 989.5e12, 494.5e12, 67e12),
    Device(r"\bA100\b", 312e12, 156e12, 19.5e12),
    Device(r"\bL40S\b", 362e12, 183e12, 91.6e12),
    Device(r"\bRTX 4090$", 165.2e12, 82.6e12, 82.6e12),  # bf16 products summed in fp32
    Device(r"\bMI300X\b", 1307.4e12, 653.7e12, 163.4e12),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a device at its best in Lightning's `precision`; None where it is not known, or a part of a device."""
    device = next((own for own in DEVICES if re.search(own.name, device_name)), None)
    if device is None or "MIG" in device_name or precision not in ("bf16-mixed", "bf16-true", "32-true"):
        return None
    if precision != "32-true":
        return device.bf16
    return device.fp32 if torch.get_float32_matmul_precision() == "highest" else device.tf32


@dataclass(frozen=True)
class ModelFlops:
    """Model FLOPs of a policy's training pass, forward and backward, with the reference's forward pass.

    Attributes:
        layers, head: Of a token through the layers' matrices, and through the head.
        attention: Of a query and a key, in all layers with one window: (tokens of the window, FLOPs), a pair for each.
    """

    layers: float
    head: float
    attention: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, shape: ModelShape, frozen: bool, reference: bool) -> ModelFlops | None:
        """
        Args:
            frozen: Whether the weights have no gradient (an adapter is trained; its own products are not counted).
            reference: Whether the reference's forward pass is computed in the step.

        Returns:
            None where a router chooses among matrices: what a token is multiplied by is not known then.
        """
        if shape.products is None:
            return None
        products = (2 if frozen else 3) + reference
        full = shape.layers - len(shape.windows)
        counts = Counter[float](shape.windows) + Counter({math.inf: full})
        product = 4 * shape.attention_width * (3 + reference)
        attention = tuple((window, product * layers) for window, layers in counts.items())
        return cls(2 * products * shape.products, 2 * products * shape.head, attention)

    def __call__(self, sequences: SequenceBatch) -> Tensor:
        """FLOPs of one branch's microbatch: a float64 scalar on its device."""
        prompts, lengths = sequences.prompt_lengths.double(), sequences.lengths.double()
        again = prompts[sequences.pairs :]  # the rejected ones' prompts stand in the chosen ones, too
        work = self.layers * (lengths.sum() - again.sum()) + self.head * (lengths - prompts).sum()
        for window, product in self.attention:
            work = work + product * (attended(lengths, window).sum() - attended(again, window).sum())
        return work


def attended(tokens: Tensor, window: float) -> Tensor:
    """K above: keys of all queries of a sequence, for each of a tensor of lengths."""
    near = tokens.clamp(max=window)
    return near * (tokens - near / 2)


def utilization(flops: Tensor, seconds: float, count: int, peak: float) -> Tensor:
    """MFU: a step's model FLOPs, over all ranks, against what their devices could have done meanwhile.

    Args:
        flops: A scalar.
        count: Ranks.
        peak: FLOP/s of a rank's device.
    """
    return flops / (seconds * count * peak)


def peak_memory(device: torch.device) -> float | None:
    """GiB of its GPU that torch's tensors have taken, on the rank with the most, the most so far; all ranks call it.

    None on a CPU: main memory is not torch's alone.
    """
    if device.type != "cuda":
        return None
    (most,) = ranks.largest([torch.cuda.max_memory_allocated(device)])
    return most / 2**30
