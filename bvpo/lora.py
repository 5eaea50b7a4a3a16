"""LoRA (arXiv 2106.09685) through peft: W + (α/r) B A, of which A and B alone are trained.

Adapters are put into the model in place, so that its layers, its head and its attention are where they were. They are
fp32 whatever the model is in: their steps are smaller than bf16's rounding. A's start is drawn from a seed of its own,
the same for every number of processes; B starts at 0, and the policy as the model that it adapts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bvpo.errors import UserError
from bvpo.slices import local, local_rows


@dataclass(frozen=True)
class LoRA:
    """What `--model.lora` takes.

    Args:
        rank: r, the inner dimension of an update.
        alpha: The update is scaled by alpha / rank.
        target: Names of the linear layers that are adapted (`q_proj`, …), or `all-linear`: all but the head.
    """

    rank: int = 16
    alpha: float = 32.0
    target: str | Sequence[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(f"lora: rank must be ≥ 1 and alpha > 0, got {self.rank} and {self.alpha}")


def add_adapters(model: PreTrainedModel, lora: LoRA) -> None:
    """Put adapters into the model and freeze everything else.

    Raises:
        UserError: No layer has such a name, or one that has is not linear.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--model.lora needs peft: pip install 'bvpo[lora]'") from error
    target = lora.target if isinstance(lora.target, str) else list(lora.target)
    try:
        inject_adapter_in_model(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]
                target_modules=target,
            ),
            model,
        )
    except ValueError as error:
        raise UserError(f"--model.lora: {str(error).splitlines()[0]}") from error
    if model.get_output_embeddings() is not None and is_adapter_layer(model.get_output_embeddings()):
        raise UserError("--model.lora: the head cannot be adapted; leave it out of lora.target")
    for name, module in model.named_modules():
        if is_adapter_layer(module) and not isinstance(module.base_layer, nn.Linear | Conv1D):
            kind = type(module.base_layer).__name__
            raise UserError(f"--model.lora: {name} is no linear layer ({kind}); leave it out of lora.target")
    widest = torch.promote_types(model.dtype, torch.float32)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                module._parameters[name] = nn.Parameter(parameter.detach().to(widest))


@torch.no_grad()
def start_adapters(model: nn.Module) -> None:
    """A uniform in ±√(1/inputs), by a seed from its name; B = 0."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        full = torch.zeros(parameter.shape, dtype=parameter.dtype)
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        local(parameter).copy_(full[local_rows(parameter)])


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether a layer has a base layer and an adapter, by peft's names."""
    return hasattr(module, "base_layer") and hasattr(module, "enable_adapters")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that was adapted."""
    layers = [module for module in model.modules() if is_adapter_layer(module)]
    for layer in layers:
        layer.enable_adapters(False)  # type: ignore[operator]
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # type: ignore[operator]


def merge_adapters(model: nn.Module) -> None:
    """Add the updates to the weights that they adapt, and leave a model without adapters."""
    for name, module in list(model.named_modules()):
        if is_adapter_layer(module):
            module.merge(safe_merge=True)  # type: ignore[operator]
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.base_layer)


def without_base(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A state dictionary without the weights of the model named `prefix`, but with its adapters."""
    return {name: value for name, value in state.items() if not name.startswith(prefix) or "lora_" in name}
