"""Where a step's time went: the operations that PyTorch's profiler saw, by what kind of work they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

PRODUCTS, ATTENTION, VOCABULARY = "products", "attention", "softmax"
ELEMENTWISE, COPIES, OPTIMIZER, REST = "elementwise", "copies", "optimizer", "rest"
KINDS = (PRODUCTS, ATTENTION, VOCABULARY, ELEMENTWISE, COPIES, OPTIMIZER, REST)

# What an operation's name holds, first match first
MARKS: Mapping[str, tuple[str, ...]] = {
    ATTENTION: ("attention", "flash", "flex"),
    OPTIMIZER: ("adamw", "foreach", "vector_norm"),
    PRODUCTS: ("::mm", "::bmm", "::addmm", "::baddbmm", "::linear", "gemm", "_linear_"),
    VOCABULARY: ("softmax", "logsumexp", "::exp", "::gather", "scatter", "::amax", "::argmax", "::max"),
    COPIES: ("copy", "::cat", "index", "fill_", "zero", "clone", "embedding", "slice_backward", "masked", "repeat"),
    ELEMENTWISE: (
        *("::mul", "::add", "::sub", "::div", "::neg", "::pow", "::sum", "::mean", "::sqrt", "::rsqrt", "::silu"),
        *("::sigmoid", "::log", "::where", "::eq", "::ne", "::tanh", "::gelu", "AccumulateGrad"),
    ),
}


def kind_of(operation: str) -> str:
    """`rest` is what no mark tells, views and the autograd engine among it."""
    return next((kind for kind, marks in MARKS.items() if any(mark in operation for mark in marks)), REST)


def seconds_by_kind(profiler: Any, spent: float) -> dict[str, float]:
    """Each operation's own time, without those that it calls.

    Args:
        profiler: A stopped `torch.profiler.profile`.
        spent: Seconds of the whole step: Python and what the profiler did not see go to `rest`.
    """
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:  # a kernel's time is that of the operation calling it
            own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            seconds[kind_of(event.key)] += own / 1e6
    seconds[REST] += max(0.0, spent - sum(seconds.values()))
    return seconds
