"""Kernels that attend to a whole packed row in one call, instead of to one sequence after the other.

- FlashAttention for sequences of unlike lengths, as torch has it built in (`torch.nn.attention.varlen`). A block that
  continues another's prompt has fewer queries than keys. The kernel aligns its causal mask, and its window, at the
  bottom right: the last query sees the last key. So a prompt is neither computed twice nor padded; its keys and values
  are copied in front of those of each completion.
- FlexAttention, for what FlashAttention does not compute: capped scores, fp32, a mask of the model's own. It is
  compiled when it is first called, and again for shapes that the code at hand does not cover.

Both need a GPU. Which one computes a row is decided in `attention`; that it is right on the device at hand is asked in
`packed`.

Shapes: N tokens of the row, H query heads, K key heads, D numbers of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bvpo.packing import Spans, Tokens

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None

Rule = Callable[..., Any]  # (sequence, head, query's position, key's position) → whether it attends

HALF = (torch.bfloat16, torch.float16)


def computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What attention computes in: autocast casts the inputs of torch's own attention, and of no other kernel."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


# ---------------------------------------------------------------------- FlashAttention


@cache
def flash_runs_on(device: torch.device) -> bool:
    """Whether this torch has FlashAttention for sequences of unlike lengths, and the device can run it."""
    if device.type != "cuda" or varlen_attn is None or "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        return False  # grouped heads: torch ≥ 2.12
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_takes(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, dropout: float | None) -> bool:
    """Whether FlashAttention computes this layer: half precision, no capped scores, no dropout, and heads of one size,
    a multiple of 8 up to 256."""
    size = query.shape[-1]
    return (
        flash_runs_on(query.device)
        and computing_dtype(query.dtype, query.device) in HALF
        and key.shape[-1] == value.shape[-1] == size <= 256
        and size % 8 == 0
        and softcap is None
        and not dropout
    )


def flash(query: Tensor, key: Tensor, value: Tensor, spans: Spans, window: int | None, scaling: float | None) -> Tensor:
    """(1, H, N, D) queries, (1, K, N, D) keys and values → (1, N, H, D), causal in each sequence.

    Args:
        window: Keys that a query sees, its own and those before it; None is all.
        scaling: Of scores, by default 1/√D.
    """
    dtype = computing_dtype(query.dtype, query.device)
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (N, heads, D)
    if spans.keys is not None:
        key, value = key.index_select(0, spans.keys), value.index_select(0, spans.keys)
    assert varlen_attn is not None
    out = varlen_attn(
        query,
        key,
        value,
        spans.query_starts,
        spans.key_starts,
        spans.most_queries,
        spans.most_keys,
        scale=scaling,
        window_size=(-1 if window is None or window >= spans.most_keys else window - 1, 0),  # keys to the left, right
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, out)[None]


# ---------------------------------------------------------------------- FlexAttention


def flex_runs_on(device: torch.device) -> bool:
    """Whether FlexAttention has a backward pass there."""
    return device.type == "cuda"


def flex_mask(tokens: Tokens, rule: Rule | None) -> BlockMask:
    """Who attends to whom in the row.

    Args:
        rule: The model's own, of two positions in a sequence; None is causal.
    """
    length, device = len(tokens.block), tokens.block.device
    return cast(BlockMask, _compiled(create_block_mask)(row_rule(tokens, rule), None, None, length, length, device))


def row_rule(tokens: Tokens, rule: Rule | None) -> Rule:
    """The rule as one of two places in the row: a token sees its own block, and the prompt that this continues."""
    block, owner, prefix, position = tokens

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = (block[key] == owner[query]) & (position[key] < prefix[query])
        seen = position[key] <= position[query] if rule is None else rule(batch, head, position[query], position[key])
        return ((block[key] == block[query]) | in_prompt) & seen

    return attends


def flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None, softcap: float | None
) -> Tensor:
    """(1, H, N, D) queries, (1, K, N, D) keys and values → (1, N, H, D).

    Args:
        scaling: Of scores, by default 1/√D.
        softcap: c of scores c tanh(score / c); None caps nothing.
    """
    dtype = computing_dtype(query.dtype, query.device)
    query, key, value = (states.to(dtype) for states in (query, key, value))
    out = _compiled(flex_attention)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, out).transpose(1, 2)


def capped(softcap: float) -> Callable[..., Tensor]:
    """score → c tanh(score / c)."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`fullgraph`: where compiling is given up, an error, and not scores of (N, N) in memory."""
    return torch.compile(function, dynamic=True, fullgraph=True)
