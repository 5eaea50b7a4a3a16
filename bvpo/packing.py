"""Where the tokens of a batch go in one row without padding, and each prompt once.

A group is the sequences that begin with the same prompt: a pair, or several traces of one answer. In the row, its first
sequence comes whole, and of the others their completions alone:

    prompt  completion₁  completion₂  …      positions 0 … P−1, P … P+C₁−1, P … P+C₂−1, …

Every completion continues the prompt at position P, and its first token is scored from the prompt's last hidden state.

Shapes: S sequences, T columns of the padded batch, N tokens of the row, M completion tokens, N' keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bvpo.batches import SequenceBatch
from bvpo.errors import UserError


class Block(NamedTuple):
    """Consecutive tokens of the row: all of one sequence, or what is left of it behind a prompt that it shares.

    Attributes:
        sequence: Which sequence of the batch.
        length: Tokens of the block.
        prefix: Tokens of the sequence that are in another block: those of its prompt, or 0.
        owner: Which block begins with that prompt; the block itself where `prefix` is 0.
    """

    sequence: int
    length: int
    prefix: int
    owner: int


class PackedBatch(NamedTuple):
    """One row with the tokens of S sequences, and what is scored in it.

    Attributes:
        input_ids, position_ids: (1, N) int64; a token's position is its place in its own sequence.
        blocks: The row's S blocks, in their order.
        sources: (M,) places in the row of the hidden states that the completion tokens are scored from, in the order of
            the batch's sequences.
        targets: (M,) the completion tokens themselves.
        counts: Completion tokens of each of the S sequences.
    """

    input_ids: Tensor
    position_ids: Tensor
    blocks: tuple[Block, ...]
    sources: Tensor
    targets: Tensor
    counts: tuple[int, ...]


class Spans(NamedTuple):
    """What each block attends to, as it is told to kernels that take sequences of unlike lengths in one call.

    Attributes:
        keys: (N',) int64 places in the row of each block's keys, one block after the other: those of the prompt that it
            continues, then its own. None where that is the row as it lies: no prompt is shared.
        query_starts, key_starts: (S + 1,) int32 where each block's queries begin in the row, and its keys in `keys`;
            then the end.
        most_queries, most_keys: Of the longest block, and of the longest sequence.
    """

    keys: Tensor | None
    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int


class Tokens(NamedTuple):
    """Whose each of the row's tokens is: (N,) int64 each.

    Attributes:
        block: The block that it is in.
        owner, prefix: Those of this block.
        position: Its place in its own sequence.
    """

    block: Tensor
    owner: Tensor
    prefix: Tensor
    position: Tensor


def pack(batch: SequenceBatch, share_prompts: bool = True) -> PackedBatch:
    """The batch as one row, on its own device. The layout is computed on the CPU: a batch that is there costs no sync.

    Args:
        share_prompts: Whether sequences whose prompts have the same ids share it; otherwise each has its own.

    Raises:
        UserError: A prompt is empty: nothing predicts its completion's first token.
    """
    prompts, lengths = batch.prompt_lengths.tolist(), batch.lengths.tolist()
    if not all(prompts):
        raise UserError(f"sequence {prompts.index(0) + 1} of the batch has an empty prompt: give it one token (BOS)")
    groups = _same_prompt(batch.input_ids.cpu(), prompts) if share_prompts else [[s] for s in range(len(prompts))]
    blocks: list[Block] = []
    for group in groups:
        owner = len(blocks)
        for sequence in group:
            prefix = prompts[sequence] if len(blocks) > owner else 0
            blocks.append(Block(sequence, lengths[sequence] - prefix, prefix, owner))

    order, size, prefix, owner = torch.tensor(blocks).T  # (S,) each
    base = size.cumsum(0) - size - prefix  # column c of a sequence, c ≥ prefix, is at base + c in the row
    sequences = order.repeat_interleave(size)  # (N,)
    columns = torch.arange(len(sequences)) - base.repeat_interleave(size)

    block = order.argsort()  # of each sequence
    counts = batch.lengths.cpu() - batch.prompt_lengths.cpu()
    scored = block.repeat_interleave(counts)  # (M,)
    before = _count_up(counts) + batch.prompt_lengths.cpu().repeat_interleave(counts) - 1  # the column that predicts
    sources = torch.where(before < prefix[scored], base[owner[scored]], base[scored]) + before

    device = batch.input_ids.device
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    return PackedBatch(
        input_ids=batch.input_ids[sequences.to(device), columns.to(device)][None],
        position_ids=columns[None].to(device),
        blocks=tuple(blocks),
        sources=sources.to(device),
        targets=batch.input_ids[rows.to(device), (before + 1).to(device)],
        counts=tuple(counts.tolist()),
    )


def spans(blocks: tuple[Block, ...], device: torch.device) -> Spans:
    """The blocks' queries and keys."""
    _, queries, prefix, owner = torch.tensor(blocks).T  # (S,) each
    starts = queries.cumsum(0) - queries
    keys = prefix + queries
    column = _count_up(keys)  # (N',) each key's place in its own sequence
    begin = torch.where(
        column < prefix.repeat_interleave(keys),
        starts[owner].repeat_interleave(keys),
        (starts - prefix).repeat_interleave(keys),
    )
    return Spans(
        keys=(begin + column).to(device) if prefix.any() else None,
        query_starts=_from_0(queries).to(device),
        key_starts=_from_0(keys).to(device),
        most_queries=int(queries.max()),
        most_keys=int(keys.max()),
    )


def tokens(blocks: tuple[Block, ...], device: torch.device) -> Tokens:
    """The row's tokens, one by one."""
    _, size, prefix, owner = torch.tensor(blocks).T  # (S,) each
    block = torch.arange(len(blocks)).repeat_interleave(size)
    of_tokens = Tokens(block, owner[block], prefix[block], _count_up(size) + prefix[block])
    return Tokens(*(tensor.to(device) for tensor in of_tokens))


def _same_prompt(input_ids: Tensor, prompts: list[int]) -> list[list[int]]:
    """The sequences in groups with one prompt, in the order of their first appearance."""
    groups: dict[bytes, list[int]] = {}
    for sequence, length in enumerate(prompts):
        groups.setdefault(input_ids[sequence, :length].numpy().tobytes(), []).append(sequence)
    return list(groups.values())


def _count_up(counts: Tensor) -> Tensor:
    """(M,) 0 … counts[s] − 1 for one s after the other."""
    return torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def _from_0(counts: Tensor) -> Tensor:
    """(S + 1,) int32 0 and the sums of the first s counts."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
