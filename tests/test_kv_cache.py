"""The cache that grows in place holds what transformers' own would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig

from bvpo import kv_cache
from bvpo.kv_cache import ROOM, RoomyLayer

LLAMA = LlamaConfig(num_hidden_layers=2)
GENERATOR = Generator().manual_seed(0)


def states(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, rows, 3, tokens, 4, generator=GENERATOR)
    return keys, values


def add(caches: list[Any], rows: int, tokens: int) -> None:
    for layer in range(2):
        new = states(rows, tokens)
        for cache in caches:
            cache.update(*new, layer)


def alike(ours: Any, theirs: Any) -> bool:
    pairs = zip(ours.layers, theirs.layers, strict=True)
    return all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)


def test_rows_that_come_and_go_leave_what_transformers_own_cache_holds() -> None:
    ours, theirs = kv_cache.empty_cache(LLAMA), DynamicCache(config=LLAMA)
    add([ours, theirs], 4, 5)
    for _ in range(ROOM + 3):
        add([ours, theirs], 4, 1)
    assert alike(ours, theirs)
    places = torch.tensor([3, 1])
    kv_cache.keep(ours, places)
    theirs.reorder_cache(places)  # type: ignore[arg-type]
    add([ours, theirs], 2, 1)
    assert alike(ours, theirs)
    kv_cache.resize(ours, 7)
    theirs.layers = [_cut(layer, 7) for layer in theirs.layers]
    add([ours, theirs], 2, 1)
    assert alike(ours, theirs)
    new = kv_cache.empty_cache(LLAMA)
    add([new], 1, 8)
    kv_cache.join(ours, new)
    assert torch.equal(ours.layers[1].keys[2:], new.layers[1].keys)
    before = ours.layers[0].keys.clone()
    add([ours], 3, 1)
    assert torch.equal(ours.layers[0].keys[:, :, :-1], before)


def _cut(layer: Any, width: int) -> Any:
    layer.keys, layer.values = layer.keys[:, :, -width:].clone(), layer.values[:, :, -width:].clone()
    return layer


def test_a_token_is_written_in_place() -> None:
    cache = kv_cache.empty_cache(LLAMA)
    add([cache], 2, 5)
    places = set()
    for _ in range(2 * ROOM):
        add([cache], 2, 1)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 2


def test_sliding_windows_keep_transformers_own_layers() -> None:
    cache = kv_cache.empty_cache(MistralConfig(num_hidden_layers=2, sliding_window=5))
    assert not any(isinstance(layer, RoomyLayer) for layer in cache.layers)
    assert kv_cache.takes_more(cache)
