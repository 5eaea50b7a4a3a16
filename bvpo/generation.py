"""Sampling from a model: prompts in token ids → completions in token ids, with the log-probability of each.

Each response has a seed of its own: its random numbers depend on nothing else, not on the batch, its order or its size.
Logits are rounded otherwise in another batch, though, and where a random number falls that close to the border of two
tokens, the response goes on from the other one. Of 128 responses of the built-in reasoner, 3,900 draws, this befell
none in float32 and 10 in bfloat16, at 1 place against 64.

`Transformers` runs in this process; `bvpo.backends` has vLLM and servers. Shapes: B places of the batch, L columns of
the KV cache, V vocabulary, N most new tokens.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from bvpo import kv_cache
from bvpo.decoding import Decoding, draw, uniform_numbers
from bvpo.errors import UserError

SPARSE = 8  # ended rows are dropped, and their places filled, once they are one row in so many

PROBE = (2, 5)  # tokens of the prompts by which a model's cached steps are asked
PROMPTS = 3  # of each length: in half precision a router of experts may choose otherwise here and there
MODEL_FAULTS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_faults: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()  # of the models that have been asked


@dataclass(frozen=True)
class Request:
    """A prompt in token ids, BOS included where the model wants one, and the seed of the response to it.

    Attributes:
        name: What it asks for, such as "prompt 17, thinking, response 2": for messages.
    """

    prompt: Sequence[int]
    seed: int
    name: str = ""

    def label(self, index: int) -> str:
        """What a message calls it, given its place among the requests."""
        return f"request {index + 1}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True)
class Completion:
    """One response.

    Attributes:
        token_ids: The stop token included where it was reached.
        finish_reason: `stop` after a stop token, `length` at `max_new_tokens`.
        logprob: log q(token_ids | prompt) in nats, the stop token included, where q is what was really drawn from:
            temperature and top-p applied and renormalised. At temperature 0 all of q is on one response: 0.
            None where a back end cannot tell.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprob: float | None = None


class Backend(Protocol):
    """What answers requests."""

    def complete(
        self, requests: Sequence[Request], decoding: Decoding, stops: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        """(index of a request, its completion), as they end, in any order.

        Args:
            stops: Ids that end a response; no other token does.

        Raises:
            UserError: A prompt is empty, or too long for the model; raised by the call, before anything is generated.
        """
        ...


def check_requests(requests: Sequence[Request], decoding: Decoding, positions: int | None, setting: str = "") -> None:
    """Raises UserError for an empty prompt, and for one that leaves fewer than `max_new_tokens` of the positions.

    Args:
        positions: None where they are not known.
        setting: The option that they come from, if there is one.
    """
    new, source = decoding.max_new_tokens, f" ({setting})" if setting else ""
    if positions is not None and requests and new >= positions:
        raise UserError(f"the model has {positions} positions{source} and max_new_tokens is {new}: lower it")
    for index, request in enumerate(requests):
        name, own = request.label(index), len(request.prompt)
        if not own:
            raise UserError(f"{name}: the prompt is empty; give at least one token, BOS for instance")
        if positions is not None and own + new > positions:
            raise UserError(
                f"{name}: a prompt of {own} tokens and max_new_tokens {new} make {own + new}, and the model has "
                f"{positions} positions{source}: shorten the prompt or lower max_new_tokens"
            )


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    decoding: Decoding,
    *,
    eos_token_ids: Sequence[int],
    batch_size: int = 64,
    progress: str | None = None,
) -> list[Completion]:
    """One completion a prompt by `Transformers`, in the order of the prompts.

    Args:
        prompts: Token ids; repeat a prompt to get several responses.
        seeds: One a prompt.
        eos_token_ids: Ids that end a response.
        batch_size: Responses generated at once.
        progress: The progress bar's label; None shows no bar.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    requests = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    completions: dict[int, Completion] = {}
    with (
        closing(Transformers(model, batch_size).complete(requests, decoding, eos_token_ids)) as ended,
        tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="response", leave=False) as bar,
    ):
        for index, completion in ended:
            completions[index] = completion
            bar.update()
    return [completions[index] for index in range(len(prompts))]


class Transformers:
    """A model in this process, on its own device.

    Responses end at different lengths, so ended rows leave the batch and waiting requests take their places. Requests
    with the same prompt that enter together have it read once. The model is in evaluation mode while completions are
    taken, and then as it was before, also where the iterator is closed early.

    Args:
        model: A causal language model whose forward takes `past_key_values`.
        batch_size: Responses generated at once, B.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be ≥ 1, got {batch_size}")
        self.model, self.batch_size = model, batch_size
        base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model  # inside adapters
        self._accepted = inspect.signature(base.forward).parameters

    def complete(
        self, requests: Sequence[Request], decoding: Decoding, stops: Sequence[int]
    ) -> Generator[tuple[int, Completion]]:
        """See `Backend`; by and large, short prompts come first.

        Raises:
            UserError: A step from the cache does not give what a plain forward pass does; asked once a model.
        """
        config = self.model.config.get_text_config()
        check_requests(requests, decoding, getattr(config, "max_position_embeddings", None))
        if requests:
            self._check_steps()
        return self._complete(requests, decoding, frozenset(stops))

    def _complete(
        self, requests: Sequence[Request], decoding: Decoding, stops: frozenset[int]
    ) -> Generator[tuple[int, Completion]]:
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), tuple(requests[i].prompt)))
        waiting, batch = deque(order), None
        was_training = self.model.training
        self.model.eval()
        try:
            while waiting or batch:
                if batch and SPARSE * sum(row.ended for row in batch.rows) >= len(batch.rows):
                    batch = batch.kept()
                places = self.batch_size - len(batch.rows) if batch else self.batch_size
                more = batch is None or kv_cache.takes_more(batch.cache)
                if waiting and more and SPARSE * places >= self.batch_size:
                    indices = [waiting.popleft() for _ in range(min(places, len(waiting)))]
                    new = self._read(indices, requests, decoding)
                    batch = batch.joined(new) if batch else new
                if batch:
                    yield from self._step(batch, decoding, stops)
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def _read(self, indices: list[int], requests: Sequence[Request], decoding: Decoding) -> _Batch:
        """A batch whose cache holds the prompts but for their last tokens, which are pending."""
        device, prompts = self.model.device, [tuple(requests[index].prompt) for index in indices]
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        width = max(1, max(map(len, prompts)) - 1)
        blanks = [width - len(prompt) + 1 for prompt in distinct]
        ids = [[0] * blank + list(prompt[:-1]) for blank, prompt in zip(blanks, distinct, strict=True)]
        mask = torch.arange(width, device=device) >= torch.tensor(blanks, device=device)[:, None]
        cache = kv_cache.empty_cache(self.model.config)
        self._forward(torch.tensor(ids, device=device), mask.long(), cache)
        places = torch.tensor([distinct[prompt] for prompt in prompts], device=device)
        if len(distinct) < len(prompts):
            kv_cache.keep(cache, places)
        count = decoding.max_new_tokens if decoding.temperature > 0 else 1
        return _Batch(
            [_Row(index, len(prompt) - 1) for index, prompt in zip(indices, prompts, strict=True)],
            cache,
            mask=mask.long()[places],
            pending=torch.tensor([prompt[-1] for prompt in prompts], device=device),
            drawn=torch.zeros_like(places),
            uniforms=torch.stack([uniform_numbers(requests[index].seed, count) for index in indices]).to(device),
        )

    @torch.no_grad()
    def _step(self, batch: _Batch, decoding: Decoding, stops: frozenset[int]) -> list[tuple[int, Completion]]:
        """Draw one token for every row; the completions that end with it."""
        logits = self._logits(batch)
        column = batch.drawn.clamp(max=batch.uniforms.shape[1] - 1)[:, None]
        batch.pending, logprobs = draw(logits, batch.uniforms.gather(1, column)[:, 0], decoding)
        batch.drawn = batch.drawn + 1
        tokens, added = torch.stack([batch.pending.double(), logprobs]).tolist()  # the one wait for a GPU
        completions = []
        for row, token, logprob in zip(batch.rows, map(int, tokens), added, strict=True):
            if row.ended:
                continue
            if not math.isfinite(logprob):
                raise UserError(
                    f"the logits after {row.length} tokens are not finite: check the model's weights and dtype"
                )
            row.token_ids.append(token)
            row.logprob += logprob
            row.ended = token in stops or len(row.token_ids) == decoding.max_new_tokens
            if row.ended:
                reason: Literal["stop", "length"] = "stop" if token in stops else "length"
                completions.append((row.index, Completion(row.token_ids, reason, row.logprob)))
        return completions

    def _logits(self, batch: _Batch) -> Tensor:
        """(B, V) logits after the pending tokens, which go into the cache."""
        batch.mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], 1)
        for row in batch.rows:
            row.length += 1
        return self._forward(batch.pending[:, None], batch.mask, batch.cache)

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """(B, V) logits after the last of (B, T) ids, which go into the cache; the mask covers it and them."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in self._accepted:  # other models count the mask themselves
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = 1
        return cast(Tensor, cast(Any, self.model)(**inputs).logits[:, -1])

    # ------------------------------------------------------------------ whether the model has such a cache

    def _check_steps(self) -> None:
        """A signature does not tell: a model may take the cache and not use it, or put padding into its state."""
        if self.model not in _faults:
            was_training = self.model.training
            self.model.eval()
            try:
                _faults[self.model] = self._wrong_steps()
            finally:
                self.model.train(was_training)
        if fault := _faults[self.model]:
            raise UserError(
                f"{type(self.model).__name__}: its cached steps are not those of a plain forward pass ({fault}); use "
                "VLLMEngine or ServerEngine"
            )

    @torch.no_grad()
    def _wrong_steps(self) -> str | None:
        """What is wrong with two steps of random texts, padded on the left and one of them dropped in between."""
        vocabulary, device = self.model.config.get_text_config().vocab_size, self.model.device
        lengths = list(PROBE) * PROMPTS
        shape = (len(lengths), max(PROBE) + 1)  # a prompt, and the token that the second step begins with
        texts = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).tolist()
        requests = [Request(text[:length], 0) for text, length in zip(texts, lengths, strict=True)]
        try:
            batch = self._read([*range(len(texts)), 0], requests, Decoding(0.0))
            first = self._logits(batch)[:-1]
            batch.pending = torch.tensor([texts[row.index][lengths[row.index]] for row in batch.rows], device=device)
            batch.rows[0].ended = True
            second = self._logits(cast(_Batch, batch.kept())).roll(1, 0)  # the first text is in the last row now
            for place, length in enumerate(PROBE):
                ids = torch.tensor([text[: length + 1] for text in texts[place :: len(PROBE)]], device=device)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
                plain = cast(Any, self.model)(**inputs).logits[:, -2:]  # (PROMPTS, 2, V)
                cached = torch.stack([step[place :: len(PROBE)] for step in (first, second)], 1)  # (PROMPTS, 2, V)
                errors = _relative_errors(cached, plain).amax(1)
                if not bool((errors <= _tolerance(self.model.dtype, plain.dtype)).any()):  # they may be no numbers
                    return f"logits are off by {float(errors.min()):.1%}"
        except torch.OutOfMemoryError:
            raise
        except MODEL_FAULTS as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def _relative_errors(found: Tensor, exact: Tensor) -> Tensor:
    """Of (…, V) logits, up to a constant; those that should not be finite play no role, `_step` looks at these."""
    known, exact = exact.isfinite(), exact.double()
    error = torch.where(known, found.double() - exact, 0.0)
    spread = torch.where(known, exact - torch.where(known, exact, 0.0).mean(-1, keepdim=True), 0.0)
    size: Tensor = torch.linalg.vector_norm(spread, dim=-1)
    errors: Tensor = torch.linalg.vector_norm(error, dim=-1)
    return errors / size.clamp(min=1e-300)


def _tolerance(*dtypes: torch.dtype) -> float:
    """Of a relative error: in half precision dozens of roundings of 2⁻⁹ each, which make a router choose other experts,
    otherwise perhaps TF32's of 2⁻¹¹. Small random models without their state were off by 40% and more, RecurrentGemma
    by 6%: in half precision that one passes."""
    return 0.1 if min(dtype.itemsize for dtype in dtypes) <= 2 else 1e-2


@dataclass
class _Row:
    """A response being written; its place in the list is its place in the tensors."""

    index: int  # of its request
    length: int  # tokens in the cache
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    ended: bool = False


@dataclass
class _Batch:
    """Rows of different ages in one KV cache, aligned at their last tokens: all padding is on the left."""

    rows: list[_Row]
    cache: Any  # see `kv_cache`
    mask: Tensor  # (B, L): 1 at a row's own tokens
    pending: Tensor  # (B,) last tokens, not yet in the cache
    drawn: Tensor  # (B,) how many tokens
    uniforms: Tensor  # (B, N)

    def kept(self) -> _Batch | None:
        """The rows that have not ended."""
        places = [place for place, row in enumerate(self.rows) if not row.ended]
        if not places:
            return None
        index = torch.tensor(places, device=self.mask.device)
        kv_cache.keep(self.cache, index)
        tensors = (self.mask[index], self.pending[index], self.drawn[index], self.uniforms[index])
        batch = _Batch([self.rows[place] for place in places], self.cache, *tensors)
        if kv_cache.takes_more(batch.cache):
            batch.resize(max(row.length for row in batch.rows))
        return batch

    def joined(self, new: _Batch) -> _Batch:
        width = max(self.mask.shape[1], new.mask.shape[1])
        self.resize(width)
        new.resize(width)
        kv_cache.join(self.cache, new.cache)
        names = ("mask", "pending", "drawn", "uniforms")
        tensors = {name: torch.cat([getattr(self, name), getattr(new, name)]) for name in names}
        return _Batch(self.rows + new.rows, self.cache, **tensors)

    def resize(self, width: int) -> None:
        """Pad or cut on the left to L = width."""
        self.mask = pad(self.mask, (width - self.mask.shape[1], 0))
        kv_cache.resize(self.cache, width)
