"""What `--backend` takes: how the generating model is started. Loading waits until something is left to generate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from bvpo.errors import UserError
from bvpo.generation import Backend, Transformers
from bvpo.policy import load_policy


class Engine(ABC):
    """Starts a generation back end. Subclasses are frozen dataclasses.

    Attributes:
        block: Prompts whose responses are generated together, where a response's rounding depends on what it is
            generated beside: a block that was interrupted is generated anew as a whole, and comes out the same bit for
            bit. None where nothing makes a back end repeat itself that exactly.
    """

    block: int | None = None

    @abstractmethod
    def start(self, policy: str) -> Backend:
        """The back end, ready to answer with this policy. Raises UserError where it cannot be had."""


@dataclass(frozen=True)
class TransformersEngine(Engine):
    """The model in this process.

    Args:
        batch_size: Responses generated at once.
        dtype: Of the weights. In float32 on a CPU responses do not depend on the batch.
        device: As torch names it; null takes the GPU where there is one.
        block: Prompts generated together. A smaller block loses less when a run is killed, a larger one keeps the batch
            full for longer.
    """

    batch_size: int = 64
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    block: int = 32

    def __post_init__(self) -> None:
        for name in ("batch_size", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be ≥ 1, got {getattr(self, name)}")

    def start(self, policy: str) -> Backend:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_policy(policy, getattr(torch, self.dtype))
        try:
            model.to(device)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise UserError(f"{policy} cannot be moved to {device}: {str(error).splitlines()[0]}") from error
        return Transformers(model, self.batch_size)
