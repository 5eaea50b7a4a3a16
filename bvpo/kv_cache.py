"""The keys and values of responses that are being written: transformers' cache, for rows that come and go.

transformers' own layers copy all keys and values for every token; here a token is written into memory with room for
more. Of sliding windows, which are short, transformers' own layers are used, and of recurrent states too.

Shapes: B rows, K key heads, L columns, D numbers of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 32  # columns


class RoomyLayer(DynamicLayer):
    """One layer's (B, K, L, D) keys and values: the first L columns of what `memory` holds, where it holds them."""

    memory: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D) keys and values; all of them."""
        if self.keys is None or self.values is None or not self.keys.numel() or key_states.shape[-2] > 1:
            self.memory = None
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        length = self.keys.shape[-2]
        if self.memory is None or length == self.memory[0].shape[-2]:
            self.memory = _with_room(self.keys), _with_room(self.values)
        keys, values = self.memory
        keys[:, :, length], values[:, :, length] = key_states[:, :, 0], value_states[:, :, 0]
        self.keys, self.values = keys[:, :, : length + 1], values[:, :, : length + 1]
        return self.keys, self.values


def _with_room(states: Tensor) -> Tensor:
    rows, heads, length, width = states.shape
    memory = states.new_empty(rows, heads, length + ROOM, width)
    memory[:, :, :length] = states
    return memory


def empty_cache(config: PreTrainedConfig) -> Any:
    """A cache for a model of this configuration."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def takes_more(cache: Any) -> bool:
    """Whether rows can be appended: to keys and values they can, recurrent states know no padding."""
    return all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def keep(cache: Any, places: Tensor) -> None:
    """Keep the rows at these places, in this order; a place may recur."""
    for layer in cache.layers:
        layer.memory = None  # freed before the next layer's rows are copied
        layer.reorder_cache(places)


def join(cache: Any, other: Any) -> None:
    """Append the rows of another cache with as many columns."""
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        if ours.is_initialized:  # a layer that shares another's keys holds none
            _replace(ours, torch.cat([ours.keys, theirs.keys]), torch.cat([ours.values, theirs.values]))


def resize(cache: Any, width: int) -> None:
    """Pad or cut on the left to `width` columns, or to the sliding window's."""
    for layer in cache.layers:
        if layer.is_initialized:
            columns = min(width, layer.sliding_window - 1) if layer.is_sliding else width
            missing = columns - layer.keys.shape[-2]
            if missing:
                _replace(layer, pad(layer.keys, (0, 0, missing, 0)), pad(layer.values, (0, 0, missing, 0)))
            if layer.is_sliding:
                layer.cumulative_length = width


def _replace(layer: Any, keys: Tensor, values: Tensor) -> None:
    layer.keys, layer.values, layer.memory = keys, values, None
