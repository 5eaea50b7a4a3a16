"""Sampling from a model: prompts in token ids → completions in token ids.

Each response has a seed of its own: its random numbers are drawn before generation starts and do not depend on the
batch, its order or its size. `transformers` does the generating (KV cache, left padding, stopping); the sampling itself
is inverse-CDF with one uniform number a token, as a logits processor, because `generate` knows one global seed only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn.

    Args:
        temperature: Logits are divided by it; 0 takes the most probable token.
        top_p: Only the smallest set of tokens whose probabilities sum to at least this stays in the draw.
        max_new_tokens: Responses longer than this are cut and marked `length`.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be ≥ 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be ≥ 1, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Completion:
    """One response: its ids (the EOS included where it was reached) and why it ended."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


class SeededSampling(LogitsProcessor):
    """Leaves one token a row: the one at which the row's cumulative distribution passes its uniform number.

    Args:
        uniforms: (rows, max_new_tokens) numbers in [0, 1).
        prompt_length: Columns of the (left-padded) prompts, to tell which token is being drawn.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int, decoding: Decoding) -> None:
        self.uniforms, self.prompt_length, self.decoding = uniforms, prompt_length, decoding

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step = input_ids.shape[1] - self.prompt_length
        probabilities = (scores.double() / self.decoding.temperature).softmax(-1)  # (rows, V)
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = ordered.cumsum(-1)
        kept = (cumulative - ordered < self.decoding.top_p).double()
        cumulative = (ordered * kept).cumsum(-1)
        target = self.uniforms[:, step : step + 1].to(cumulative) * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[1] - 1)
        drawn = tokens.gather(1, index)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def uniform_numbers(seed: int, count: int) -> Tensor:
    """(count,) float64 numbers in [0, 1) that depend on nothing but the seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
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
    """One completion a prompt, in the order of the prompts.

    Args:
        prompts: Token ids, BOS included where the model wants one; repeat a prompt to get several responses.
        seeds: One a prompt.
        eos_token_ids: Ids that end a response.
        batch_size: Responses generated at once; batches hold prompts of similar length.
        progress: The progress bar's label; None shows no bar.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: dict[int, Completion] = {}
    with tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="response", leave=False) as bar:
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            batch = _generate_batch(
                model, [prompts[i] for i in rows], [seeds[i] for i in rows], decoding, list(eos_token_ids)
            )
            completions.update(zip(rows, batch, strict=True))
            bar.update(len(rows))
    model.train(was_training)
    return [completions[i] for i in range(len(prompts))]


def _generate_batch(
    model: PreTrainedModel, prompts: list[Sequence[int]], seeds: list[int], decoding: Decoding, eos: list[int]
) -> list[Completion]:
    width = max(len(prompt) for prompt in prompts)
    pad = eos[0]
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    mask = torch.arange(width, device=model.device) >= (width - lengths)[:, None]
    processors = LogitsProcessorList()
    if decoding.temperature > 0:
        uniforms = torch.stack([uniform_numbers(seed, decoding.max_new_tokens) for seed in seeds])
        processors.append(SeededSampling(uniforms.to(model.device), width, decoding))
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad,
        repetition_penalty=1.0,
        use_cache=True,
    )
    output = cast(Any, model).generate(
        input_ids=ids, attention_mask=mask.long(), generation_config=config, logits_processor=processors
    )
    return [_until_eos(row, set(eos)) for row in output[:, width:].tolist()]


def _until_eos(ids: list[int], eos: set[int]) -> Completion:
    for position, token in enumerate(ids):
        if token in eos:
            return Completion(ids[: position + 1], "stop")
    return Completion(ids, "length")
