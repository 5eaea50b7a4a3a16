"""The layout of a packed row against a loop over its tokens."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bvpo.batches import SequenceBatch
from bvpo.errors import UserError
from bvpo.packing import Block, PackedBatch, pack

PAD = 99


def make_batch(sequences: list[tuple[list[int], list[int]]]) -> SequenceBatch:
    """Sequences of prompt and completion, padded on the right."""
    width = max(len(prompt + completion) for prompt, completion in sequences)
    rows = [prompt + completion + [PAD] * (width - len(prompt + completion)) for prompt, completion in sequences]
    prompts, lengths = [len(prompt) for prompt, _ in sequences], [len(p + c) for p, c in sequences]
    return SequenceBatch(torch.tensor(rows), torch.tensor(prompts), torch.tensor(lengths), len(sequences) // 2)


def read(packed: PackedBatch) -> list[list[tuple[int, int, int]]]:
    """Of each sequence, (place in the row, position, token) of all its tokens, as the blocks say."""
    row = list(enumerate(zip(packed.position_ids[0].tolist(), packed.input_ids[0].tolist(), strict=True)))
    starts = [0]
    for block in packed.blocks:
        starts.append(starts[-1] + block.length)
    assert starts[-1] == len(row)
    found: list[list[tuple[int, int, int]]] = [[] for _ in packed.blocks]
    for number, block in enumerate(packed.blocks):
        prompt = row[starts[block.owner] :][: block.prefix]
        own = row[starts[number] :][: block.length]
        found[block.sequence] = [(place, *token) for place, token in prompt + own]
    return found


# --- By hand ----------------------------------------------------------------------------------------------------------

TWO_PAIRS = [([1, 2], [3]), ([4], [5, 6]), ([1, 2], [7, 8]), ([4], [9])]  # two chosen sequences, two rejected ones


def test_two_pairs_by_hand() -> None:
    packed = pack(make_batch(TWO_PAIRS))
    #                                 prompt  chosen  rejected  prompt  chosen  rejected
    assert packed.input_ids.tolist() == [[1, 2, 3, 7, 8, 4, 5, 6, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1]]
    assert packed.blocks == (
        Block(sequence=0, length=3, prefix=0, owner=0),
        Block(sequence=2, length=2, prefix=2, owner=0),
        Block(sequence=1, length=3, prefix=0, owner=2),
        Block(sequence=3, length=1, prefix=1, owner=2),
    )
    assert packed.counts == (1, 2, 2, 1)
    assert packed.targets.tolist() == [3, 5, 6, 7, 8, 9]
    assert packed.sources.tolist() == [1, 5, 6, 1, 3, 5]  # both completions begin at their prompt's last token


def test_prompts_of_their_own_by_hand() -> None:
    packed = pack(make_batch(TWO_PAIRS), share_prompts=False)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 1, 2, 7, 8, 4, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 1]]
    assert all(block.prefix == 0 for block in packed.blocks)
    assert packed.targets.tolist() == [3, 5, 6, 7, 8, 9]
    assert packed.sources.tolist() == [1, 3, 4, 7, 8, 10]


def test_sides_whose_prompts_differ_share_none() -> None:
    """By one token, or by their lengths alone."""
    for other in ([1, 3], [1], [1, 2, 3]):
        packed = pack(make_batch([([1, 2], [3, 4]), (other, [5])]))
        assert [block.prefix for block in packed.blocks] == [0, 0]
        assert packed.input_ids.tolist() == [[1, 2, 3, 4, *other, 5]]


def test_several_traces_of_one_answer_share_one_prompt() -> None:
    """Sequences of an anchor: no pairs, and those of one prompt in a row."""
    packed = pack(make_batch([([1, 2], [3]), ([1, 2], [4, 5]), ([1, 2], [6]), ([7], [8])]))
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert [(block.prefix, block.owner) for block in packed.blocks] == [(0, 0), (2, 0), (2, 0), (0, 3)]
    assert packed.sources.tolist() == [1, 1, 3, 1, 6]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="sequence 2 of the batch has an empty prompt"):
        pack(make_batch([([1], [2]), ([], [3])]))


# --- Any batch --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_the_blocks_hold_every_sequence_and_each_token_is_scored_from_the_one_before_it(
    seed: int, sequences: int, prompts: int, share: bool
) -> None:
    rng = random.Random(seed)
    given_prompts = [rng.choices(range(4), k=rng.randint(1, 4)) for _ in range(prompts)]
    rows = [(rng.choice(given_prompts), rng.choices(range(9), k=rng.randint(1, 6))) for _ in range(sequences)]
    packed = pack(make_batch(rows), share)

    sources, targets = iter(packed.sources.tolist()), iter(packed.targets.tolist())
    for (prompt, completion), tokens in zip(rows, read(packed), strict=True):
        assert [token for _, _, token in tokens] == prompt + completion
        assert [position for _, position, _ in tokens] == list(range(len(prompt + completion)))
        for before, (_, _, token) in zip(tokens[len(prompt) - 1 :], tokens[len(prompt) :], strict=False):
            assert next(sources) == before[0] and next(targets) == token
    assert packed.counts == tuple(len(completion) for _, completion in rows)

    distinct = {tuple(prompt) for prompt, _ in rows} if share else [prompt for prompt, _ in rows]
    assert packed.input_ids.numel() == sum(map(len, distinct)) + sum(packed.counts)
