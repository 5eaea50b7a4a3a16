"""Attention over a packed row: each sequence attends to itself alone, and to the prompt that it shares.

transformers 5 lets registered functions take the place of a model's attention and of its masks, with no change to the
model. While a packed row is computed, the mask function gives the layers, in place of an (N, N) mask, the row's blocks
and the rule by which the model would have masked a sequence (causal, a sliding window, …), a function of two positions.
The attention function applies it. Any other forward pass (padded batches, generation) is the one of `sdpa`.

Three functions are registered, which differ in the kernels that compute a packed row:

- `bvpo_packed`: torch's own attention, sequence by sequence. It is right on every device, and what the others are
  measured against.
- `bvpo_packed_varlen`: FlashAttention, the whole row in one call, for the layers that it takes. (A name with `flash` in
  it would be taken for the package of that name by transformers.)
- `bvpo_packed_flex`: FlexAttention, the whole row in one call.

Sequence by sequence, one whose prompt is in another block is attended as a whole, its prompt's queries computed again:
a causal square runs in the kernel that skips the upper triangle, and a mask of the completion's rows does not.

Shapes: N tokens of the row, H query heads, K key heads, L tokens of a sequence, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from bvpo import attention_kernels as kernels
from bvpo.attention_kernels import Rule
from bvpo.packing import Block, PackedBatch, Spans, spans, tokens

NAME, FLASH, FLEX = "bvpo_packed", "bvpo_packed_varlen", "bvpo_packed_flex"

_row: ContextVar[PackedBatch | None] = ContextVar("row", default=None)  # the one being computed


@contextmanager
def computing(packed: PackedBatch) -> Iterator[None]:
    """A forward pass inside is that of this row. Layers that run again in the backward pass need not be inside."""
    token = _row.set(packed)
    try:
        yield
    finally:
        _row.reset(token)


@dataclass(frozen=True)
class PackedMask:
    """Who attends to whom in a packed row; layers are given it as their attention mask.

    What it is made into for a kernel is made once, and serves all layers of a kind.

    Attributes:
        rule: The model's own, None where it is plainly causal.
        reach: The rule is plainly causal in sequences of at most so many tokens; None where this is not known.
        device: The row's.
    """

    blocks: tuple[Block, ...]
    rule: Rule | None
    reach: int | None
    device: torch.device

    def of(self, length: int) -> Tensor | None:
        """(L, L) bool, True where a query (row) attends to a key; None where that is the lower triangle."""
        if self.rule is None or (self.reach is not None and length <= self.reach):
            return None
        positions = torch.arange(length, device=self.device)
        one = torch.zeros_like(positions[0])
        return cast(Tensor, self.rule(one, one, positions[:, None], positions))

    @cached_property
    def spans(self) -> Spans:
        return spans(self.blocks, self.device)

    @cached_property
    def flex(self) -> BlockMask:
        return kernels.flex_mask(tokens(self.blocks, self.device), self.rule)

    @cached_property
    def is_causal(self) -> bool:
        """Whether the rule is causal in all sequences of the row, but for a sliding window of `reach` tokens."""
        if self.rule is None or self.reach is None:
            return self.rule is None
        longest = max(block.prefix + block.length for block in self.blocks)
        return longest <= self.reach or _is_window(self.rule, self.reach)


def _is_window(rule: Rule, size: int) -> bool:
    """Whether it slides: transformers gives windows and chunks of a size alike. At position `size` a window has left
    the first key behind and no other; a new chunk begins, and has left all."""
    zero = torch.zeros((), dtype=torch.long)
    return bool(rule(zero, zero, zero + size, zero + 1)) and not rule(zero, zero, zero + size, zero)


def packed_mask(mask_function: Rule = causal_mask_function, local_size: int | None = None, **arguments: Any) -> Any:
    """What transformers calls once a forward pass for each kind of layer: a `PackedMask`, or what `sdpa` is given."""
    row = _row.get()
    if row is None:
        if getattr(arguments.get("config"), "attn_logit_softcapping", None) is not None:
            arguments["allow_is_causal_skip"] = False  # `attend` takes None for a square, which decoding is not
        return sdpa_mask(mask_function=mask_function, local_size=local_size, **arguments)
    custom = arguments.get("use_vmap", False)  # the model has put a function of its own into the rule
    rule = None if mask_function is causal_mask_function else mask_function
    return PackedMask(row.blocks, rule, None if custom else local_size, row.input_ids.device)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """What each layer calls: (1, H, N, D) queries, (1, K, N, D) keys and values → (1, N, H, D).

    This one goes sequence by sequence."""
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
        mask = attention_mask.of(block.prefix + block.length)
        own_query, own_key, own_value = states
        outputs.append(attend(own_query, own_key, own_value, mask, **arguments)[:, block.prefix :])
    return torch.cat(outputs, dim=1), None


def flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """The same by FlashAttention, where it takes the row and the layer."""
    options = {name: arguments.get(name) for name in ("softcap", "dropout")}
    packed = isinstance(attention_mask, PackedMask)
    if packed and attention_mask.is_causal and kernels.flash_takes(query, key, value, **options):
        window = None if attention_mask.rule is None else attention_mask.reach
        return kernels.flash(query, key, value, attention_mask.spans, window, arguments.get("scaling")), None
    return packed_attention(module, query, key, value, attention_mask, **arguments)


def flex_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """The same by FlexAttention, which has no dropout."""
    packed = isinstance(attention_mask, PackedMask)
    if packed and kernels.flex_runs_on(query.device) and not arguments.get("dropout"):
        options = {name: arguments.get(name) for name in ("scaling", "softcap")}
        return kernels.flex(query, key, value, attention_mask.flex, **options), None
    return packed_attention(module, query, key, value, attention_mask, **arguments)


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


FUNCTIONS = {NAME: packed_attention, FLASH: flash_attention, FLEX: flex_attention}
for name, function in FUNCTIONS.items():
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, packed_mask)
