"""Attention over a packed row: each sequence attends to itself alone, and to the prompt that it shares.

transformers 5 lets registered functions take the place of a model's attention and of its masks, with no change to the
model. Both are registered here as `bvpo_packed`. While a packed row is computed, the mask function gives the layers, in
place of an (N, N) mask, the row's blocks and the rule by which the model would have masked a sequence (causal, a
sliding window, …), a function of two positions. The attention function applies it, sequence by sequence. Any other
forward pass (padded batches, generation) is the one of `sdpa`.

A sequence whose prompt is in another block is attended as a whole, its prompt's queries computed again: a causal square
runs in the kernel that skips the upper triangle, and an explicit mask of the completion's rows does not.

Shapes: N tokens of the row, H query heads, K key heads, L tokens of a sequence, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from bvpo.packing import Block, PackedBatch

NAME = "bvpo_packed"
Rule = Callable[..., Any]  # (sequence, head, query's position, key's position) → whether it attends

_blocks: ContextVar[tuple[Block, ...] | None] = ContextVar("blocks", default=None)  # of the row being computed


@contextmanager
def computing(packed: PackedBatch) -> Iterator[None]:
    """A forward pass inside is that of this row. Layers that run again in the backward pass need not be inside."""
    token = _blocks.set(packed.blocks)
    try:
        yield
    finally:
        _blocks.reset(token)


@dataclass(frozen=True)
class PackedMask:
    """Who attends to whom in a packed row; layers are given it as their attention mask.

    Attributes:
        rule: The model's own, None where it is plainly causal.
        reach: The rule is plainly causal in sequences of at most so many tokens; None where this is not known.
    """

    blocks: tuple[Block, ...]
    rule: Rule | None
    reach: int | None

    def of(self, length: int, device: torch.device) -> Tensor | None:
        """(L, L) bool, True where a query (row) attends to a key; None where that is the lower triangle."""
        if self.rule is None or (self.reach is not None and length <= self.reach):
            return None
        positions = torch.arange(length, device=device)
        one = torch.zeros_like(positions[0])
        return cast(Tensor, self.rule(one, one, positions[:, None], positions))


def packed_mask(mask_function: Rule = causal_mask_function, local_size: int | None = None, **arguments: Any) -> Any:
    """What transformers calls once a forward pass for each kind of layer: a `PackedMask`, or what `sdpa` is given."""
    blocks = _blocks.get()
    if blocks is None:
        if getattr(arguments.get("config"), "attn_logit_softcapping", None) is not None:
            arguments["allow_is_causal_skip"] = False  # `attend` takes None for a square, which decoding is not
        return sdpa_mask(mask_function=mask_function, local_size=local_size, **arguments)
    custom = arguments.get("use_vmap", False)  # the model has put a function of its own into the rule
    rule = None if mask_function is causal_mask_function else mask_function
    return PackedMask(blocks, rule, None if custom else local_size)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """What each layer calls: (1, H, N, D) queries, (1, K, N, D) keys and values → (1, N, H, D)."""
    if not isinstance(attention_mask, PackedMask):
        if arguments.get("softcap") is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
        return attend(query, key, value, attention_mask, **arguments).contiguous(), None
    # split, not sliced: the backward pass joins the parts' gradients once, instead of padding each to the row's length
    lengths = [block.length for block in attention_mask.blocks]
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    outputs = []
    for block, *states in zip(attention_mask.blocks, queries, keys, values, strict=True):
        if block.prefix:
            prompt = (parts[block.owner][:, :, : block.prefix] for parts in (queries, keys, values))
            states = [torch.cat(pair, dim=2) for pair in zip(prompt, states, strict=True)]
        mask = attention_mask.of(block.prefix + block.length, query.device)
        own_query, own_key, own_value = states
        outputs.append(attend(own_query, own_key, own_value, mask, **arguments)[:, block.prefix :])
    return torch.cat(outputs, dim=1), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> Tensor:
    """softmax(cap(scaling · q kᵀ)) v with cap(x) = c tanh(x / c), as (B, L, H, D).

    Args:
        mask: Bool, True where a query attends to a key; None is the lower triangle of a square.
        scaling: By default 1/√D.
        softcap: c; None caps nothing.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not (mask is None and softcap is None):  # CUDA's kernels take grouped heads without a mask alone
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if softcap is None:
        out = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=mask is None
        )
        return out.transpose(1, 2)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # no −inf: a query of padding may see nothing
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = F.dropout(scores.softmax(-1, dtype).to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)
