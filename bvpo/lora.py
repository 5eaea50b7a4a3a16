"""LoRA (arXiv 2106.09685) through peft: W + (α/r) B A, of which A and B alone are trained.

Adapters are put into the model in place, so that its layers, its head and its attention are where they were. They are
fp32 whatever the model is in: their steps are smaller than bf16's rounding. A's start is drawn from a seed of its own,
the same for every number of processes; B starts at 0, and the policy as the model that it adapts.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from bvpo.errors import UserError
from bvpo.slices import local, local_rows

LINEAR = (nn.Linear, Conv1D, FalconLinear)  # exactly: other subclasses are routers that give tuples, or work in groups
# Mamba's kernels take this layer's weight and not its output, so an adapter around it would have no effect
BYPASSED = "out_proj"
BYPASSING = ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h", "zamba2")


@dataclass(frozen=True)
class LoRA:
    """What `--model.lora` takes.

    Args:
        rank: r, the inner dimension of an update.
        alpha: The update is scaled by alpha / rank.
        target: Names of the linear layers that are adapted (`q_proj`, …), a regular expression of whole names, or
            `all-linear`: all but the head. Experts that share one parameter and routers are no linear layers.
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
        UserError: No layer has such a name, or one that has cannot be adapted.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--model.lora needs peft: pip install 'bvpo[lora]'") from error
    names = {f"model.{name}" for name in _targets(model, lora.target)}
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names)  # type: ignore[arg-type]
    try:  # inside another module, where peft does not take names for those that MoE layers had in transformers 4
        inject_adapter_in_model(config, nn.ModuleDict({"model": model}))
    except ValueError as error:
        raise UserError(f"--model.lora: {str(error).splitlines()[0]}") from error
    widest = torch.promote_types(model.dtype, torch.float32)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                module._parameters[name] = nn.Parameter(parameter.detach().to(widest))


def _targets(model: PreTrainedModel, target: str | Sequence[str]) -> list[str]:
    """Names of the layers that are adapted. Raises UserError as `add_adapters`."""
    head, modules = model.get_output_embeddings(), dict(model.named_modules())
    bypassed = BYPASSED if model.config.model_type in BYPASSING else None
    if target == "all-linear":
        return [
            name
            for name, module in modules.items()
            if type(module) in LINEAR and module is not head and name.rpartition(".")[2] != bypassed
        ]
    patterns = {target: target} if isinstance(target, str) else {own: rf"(.*\.)?{re.escape(own)}" for own in target}
    found = {own: [name for name in modules if re.fullmatch(pattern, name)] for own, pattern in patterns.items()}
    if not found or not all(found.values()):
        missing = ", ".join(own for own, names in found.items() if not names)
        raise UserError(f"--model.lora: no layer has a name of lora.target: {missing}")
    names = [name for name in modules if any(name in own for own in found.values())]
    for name in names:
        if modules[name] is head:
            raise UserError("--model.lora: the head cannot be adapted; leave it out of lora.target")
        if type(modules[name]) not in LINEAR:
            kind = type(modules[name]).__name__
            raise UserError(f"--model.lora: {name} is no linear layer ({kind}); leave it out of lora.target")
        if name.rpartition(".")[2] == bypassed:
            raise UserError(f"--model.lora: Mamba's kernels go past {name}'s adapter; leave it out of lora.target")
    return names


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
