"""The reference model's log-probabilities: from a frozen copy in memory, from the policy without its adapters, or from
the disk, where `reference_cache` has put them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from bvpo.batches import SequenceBatch
from bvpo.lora import adapters_off
from bvpo.losses import PairLogps
from bvpo.policy import by_side, completion_logps


class Reference(ABC):
    """π_ref: gives the reference's log-probabilities of a batch, without a gradient."""

    @abstractmethod
    def completion_logps(self, batch: SequenceBatch) -> Tensor:
        """(S,) log π_ref(completion | prompt), without a gradient."""

    def logps(self, batch: SequenceBatch) -> PairLogps:
        """The same of a branch's pairs."""
        return by_side(self.completion_logps(batch), batch)


class LiveReference(Reference):
    """A frozen model in memory. It is no `nn.Module`, so Lightning puts it into no checkpoint and no optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def copy_of(cls, policy: nn.Module) -> LiveReference:
        """The policy as it is now."""
        return cls(copy.deepcopy(policy))

    @torch.no_grad()
    def completion_logps(self, batch: SequenceBatch) -> Tensor:
        return completion_logps(self.model, batch)

    def to(self, device: torch.device) -> None:
        self.model.to(device)


class AdapterReference(Reference):
    """The policy with its LoRA adapters turned off: one copy of the weights serves both."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    @torch.no_grad()
    def completion_logps(self, batch: SequenceBatch) -> Tensor:
        with adapters_off(self.policy):
            return completion_logps(self.policy, batch)


class CachedReference(Reference):
    """Values that came with the rows.

    Args:
        weights: `reference_cache.weights_fingerprint` of the model that they are of.
    """

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def completion_logps(self, batch: SequenceBatch) -> Tensor:
        assert batch.reference is not None, "these rows have no cached log-probabilities"
        return batch.reference
