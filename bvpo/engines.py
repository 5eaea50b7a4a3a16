"""What `--backend` takes: how the generating model is started. Loading waits until something is left to generate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from bvpo.backends import VLLM, Server
from bvpo.errors import UserError
from bvpo.generation import Backend, Transformers
from bvpo.policy import context_length, load_policy, resolve_model
from bvpo.remote import Patience


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

    def positions(self, policy: str) -> int | None:
        """How many tokens prompt and response may have together; None where that is not known before the start.

        Raises:
            UserError: The policy's configuration cannot be loaded.
        """
        return context_length(policy)

    @property
    def identity(self) -> dict[str, Any]:
        """What responses depend on, as it is written down beside them: class and dtype."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", "dtype": getattr(self, "dtype", None)}


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
        except (AssertionError, ImportError, RuntimeError) as error:  # of a torch that was built without this device
            raise UserError(f"{policy} cannot be moved to {device}: {str(error).splitlines()[0]}") from error
        return Transformers(model, self.batch_size)


@dataclass(frozen=True)
class VLLMEngine(Engine):
    """vLLM in this process: `pip install "bvpo[vllm]"`, and a GPU. Arguments as in `bvpo.backends.VLLM`.

    Args:
        tensor_parallel_size: GPUs that the model is split over. To use more, give each shard GPUs of its own.
        dtype: Of weights and activations; `auto` takes the checkpoint's.
        gpu_memory_utilization: The fraction of each GPU's memory for weights and KV cache.
        max_model_len: Positions of prompt and response; null takes the model's.
    """

    tensor_parallel_size: int = 1
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None

    def start(self, policy: str) -> Backend:
        return VLLM(
            resolve_model(policy),
            self.tensor_parallel_size,
            self.dtype,
            self.gpu_memory_utilization,
            self.max_model_len,
        )

    def positions(self, policy: str) -> int | None:
        """See `Engine`."""
        return super().positions(policy) if self.max_model_len is None else self.max_model_len


@dataclass(frozen=True)
class ServerEngine(Engine):
    """A server that speaks OpenAI's completions API. Arguments as in `bvpo.backends.Server`.

    Args:
        url: Ends in `/v1`, as a rule.
        model: The server's name for the policy; null takes the policy's own.
        concurrency: Requests under way at once.
        processed_logprobs: Whether its log-probabilities are those after temperature and top-p.
        api_key_variable: The environment variable that holds the key, if the server wants one.
        patience: When to give up.
    """

    url: str
    model: str | None = None
    concurrency: int = 64
    processed_logprobs: bool = False
    api_key_variable: str | None = None
    patience: Patience = field(default_factory=Patience)

    def start(self, policy: str) -> Backend:
        name = self.model or policy
        return Server(self.url, name, self.concurrency, self.processed_logprobs, self.api_key_variable, self.patience)
