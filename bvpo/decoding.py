"""One token a row out of logits: temperature, top-p, and the inverse of the cumulative distribution.

Shapes: B rows, V vocabulary, K candidate tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HEADS = (64, 1024)  # most probable tokens that a draw on a CPU looks at before it sorts a whole vocabulary


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
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be ≥ 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be ≥ 1, got {self.max_new_tokens}")


def uniform_numbers(seed: int, count: int) -> Tensor:
    """(count,) float64 numbers in [0, 1) that depend on nothing but the seed; fewer are the first of more."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability under the distribution drawn from.

    The inverse of the cumulative distribution over tokens by falling probability, equals by rising id: the order in
    which a rounding error changes the fewest draws. A draw is nearly always among the most probable tokens, so on a CPU
    the vocabulary is sorted only for rows where it is not. On a GPU sorting is cheaper than asking.

    Args:
        logits: (B, V) of any float type.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        (B,) ids, and (B,) float64 in nats, not finite where the logits are not.
    """
    if decoding.temperature == 0:
        best, tokens = logits.max(-1)
        return tokens, (best - best).double()  # 0, or nan
    probabilities = logits.to(torch.float64, copy=True).div_(decoding.temperature).softmax(-1)
    if logits.device.type != "cpu":
        return _inverse_cdf(probabilities, None, uniforms, decoding.top_p)[:2]
    rows, vocabulary = logits.shape
    tokens, logprobs = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.float64)
    rest = torch.arange(rows)
    for size in [*(head for head in HEADS if head < vocabulary), vocabulary]:
        own = probabilities if len(rest) == rows else probabilities[rest]
        head = None if size == vocabulary else own.topk(size, sorted=False).indices.sort().values
        tokens[rest], logprobs[rest], settled = _inverse_cdf(own, head, uniforms[rest], decoding.top_p)
        rest = rest[~settled]
        if not len(rest):
            break
    return tokens, logprobs


def _inverse_cdf(
    probabilities: Tensor, candidates: Tensor | None, uniforms: Tensor, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities, and whether no other token could change them.

    Args:
        candidates: (B, K) ids by rising id of a row's most probable tokens; None takes all.
    """
    considered = probabilities if candidates is None else probabilities.gather(1, candidates)
    ordered, order = considered.sort(dim=-1, descending=True, stable=True)  # (B, K)
    cumulative = ordered.cumsum(-1)
    kept = (cumulative - ordered < top_p) & (ordered > 0)
    mass = (ordered * kept).sum(-1, keepdim=True) if top_p < 1 else torch.ones_like(ordered[:, :1])
    target = uniforms[:, None] * mass
    index = torch.searchsorted(cumulative, target, right=True)
    index = index.minimum(kept.sum(-1, keepdim=True) - 1).clamp(min=0)  # a sum may be rounded to less than the mass
    probability, token = ordered.gather(1, index), order.gather(1, index)
    if candidates is not None:
        token = candidates.gather(1, token)
    reached = cumulative[:, -1:] >= top_p if top_p < 1 else target < cumulative[:, -1:]
    settled = reached & (probability > ordered[:, -1:])  # the last candidate may have equals that are none
    return token[:, 0], (probability / mass).log()[:, 0], settled[:, 0]
