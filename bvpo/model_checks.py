"""Checks of the model: it takes the rows, sums the log-probabilities that are meant, and starts at the reference.

Shapes: S sequences (the chosen ones, then the rejected ones), T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bvpo.batches import BRANCHES, PREFIX, Branch, PairBatch, SequenceBatch, has_branch
from bvpo.checks import Check
from bvpo.losses import PairLogps, PreferenceLoss, reward_margin
from bvpo.machine import Machine, format_bytes
from bvpo.memory import MemoryEstimate
from bvpo.policy import by_side, completion_logps
from bvpo.row_sizes import RowSizes, frequencies_misfit, positions_misfit, vocabulary_misfit
from bvpo.shapes import ModelShape

# Of a sum of log-probabilities: the same sequence padded and alone is summed in another order, token by token.
RELATIVE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2}
MARGIN = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-3}  # nats; equal weights give equal sums
NEARLY_FULL = 0.85  # of a device's memory: the estimate is within 15% where it was measured
OF_TOKENS = (
    "set model.activation_checkpointing, lower data.max_tokens, or data.batch_size (and raise model.accumulate), or "
    "data.max_length"
)
OF_PARAMETERS = (
    "set model.reference_logps to cached, trainer.strategy to fsdp2 on more ranks, model.optimizer to adamw_8bit, or "
    "train in bf16-true, or an adapter by model.lora"
)


def check_vocabulary(model: ModelShape, tokenizer_size: int, largest_id: int) -> Check:
    """Whether the model has an embedding for every id.

    Args:
        tokenizer_size: One more than the tokenizer's largest id.
        largest_id: The largest id of the rows.
    """
    name, found = "vocabulary", f"the model has {model.vocabulary} embeddings"
    if misfit := vocabulary_misfit(model, largest_id):
        return Check(name, "fail", *misfit)
    if tokenizer_size > model.vocabulary:
        found += f", the tokenizer has ids up to {tokenizer_size - 1}; no row holds one of the others"
        return Check(name, "warn", found, "resize the model's embeddings, or sampling may meet an id without one")
    return Check(name, "pass", f"{found}, the tokenizer needs {tokenizer_size}")


def check_positions(model: ModelShape, longest: int) -> Check:
    """Whether the longest sequence fits the positions that the model was made for."""
    name = "positions"
    if model.positions is None:
        return Check(name, "pass", f"the model names no limit; the longest sequence has {longest} tokens")
    if misfit := positions_misfit(model, longest):
        return Check(name, "warn" if model.rotary else "fail", *misfit)
    return Check(name, "pass", f"the longest sequence has {longest} tokens, the model was made for {model.positions}")


def check_frequencies(model: ModelShape, rows: RowSizes) -> Check:
    """Whether each sequence has the same rotary frequencies whatever goes through the model beside it."""
    name = "rotary frequencies"
    if misfit := frequencies_misfit(model, rows.spans):
        return Check(name, "fail", *misfit)
    if model.frequencies is None:
        return Check(name, "pass", "they do not depend on a batch's longest sequence")
    return Check(name, "pass", f"no branch has sequences on both sides of {model.frequencies.border} tokens")


def check_memory(estimate: MemoryEstimate, machine: Machine, attention: bool = True) -> Check:
    """The estimate against what the device has.

    Args:
        attention: Whether the model's layers have attention, which the estimate is made for.
    """
    need, ranks = estimate.total * machine.ranks_here, machine.ranks_here
    found = f"{format_bytes(need)} estimated" + (f" for {ranks} ranks" if ranks > 1 else "")
    if not attention:
        found += ", roughly: the model's layers have no attention, and what they keep instead is not known"
    if machine.memory is None:
        return Check("memory", "skipped", f"{found}; {machine.where}: give --device_memory 80GiB to plan for one")
    parts = {name: size for name, size in estimate.as_dict().items() if name not in ("total", "host")}
    largest = max(parts, key=parts.__getitem__)
    found += f", {format_bytes(machine.memory)} {machine.where}; the largest part is {largest.replace('_', ' ')}, "
    found += format_bytes(parts[largest])
    advice = OF_TOKENS if largest in ("activations", "logits", "layer") else OF_PARAMETERS
    if need > machine.memory:
        return Check("memory", "fail", found, advice)
    if need > NEARLY_FULL * machine.memory:
        return Check("memory", "warn", found, advice)
    return Check("memory", "pass", found)


# ---------------------------------------------------------------------- with the weights


def check_labels(model: nn.Module, batch: PairBatch, rows: Sequence[Mapping[str, list[int]]]) -> Check:
    """The summed log-probabilities against a sum token by token, one sequence at a time, without padding or masks.

    Args:
        batch: The collated `rows`, in their order.
    """
    name, worst = "labels", 0.0
    advice = "this is a defect of the batching or of the model's attention mask, please report it with the model's name"
    for branch in BRANCHES:
        sequences = _of(batch, branch)
        if not sequences.pairs:
            continue
        own = [row for row in rows if has_branch(row, branch)]
        prefix = PREFIX[branch]
        pairs = [(row[f"{prefix}prompt"], row[prefix + side]) for side in ("chosen", "rejected") for row in own]
        summed = completion_logps(model, sequences).double()
        for i, (prompt, completion) in enumerate(pairs):
            masked = sequences.input_ids[i][sequences.completion_mask[i]].tolist()
            if masked != completion:
                found = f"{branch} sequence {i + 1}: {len(masked)} tokens are scored, the completion has "
                return Check(name, "fail", f"{found}{len(completion)}, or they are others", advice)
            logits = _logits(model, prompt + completion)
            expected = naive_logp(logits, prompt, completion)
            error = abs(float(summed[i]) - expected) / max(abs(expected), 1.0)
            worst = max(worst, error if math.isfinite(error) else math.inf)
            if not error <= RELATIVE.get(logits.dtype, RELATIVE[torch.bfloat16]):
                found = (
                    f"{branch} sequence {i + 1}: log-probability {float(summed[i]):.4f}, token by token {expected:.4f}"
                )
                return Check(name, "fail", found, advice)
    return Check(name, "pass", f"log-probabilities are those of the completions' tokens (largest error {worst:.1g})")


def _of(batch: PairBatch, branch: Branch) -> SequenceBatch:
    return batch.trace if branch == "trace" else batch.empty


def _logits(model: nn.Module, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # type: ignore[no-any-return]  # (T, V)


def naive_logp(logits: Tensor, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Σ_t log softmax(logits at t − 1)[token t] over the completion's tokens, one at a time, in float64."""
    total = 0.0
    for place, token in enumerate(completion, start=len(prompt)):
        total += float(logits[place - 1].double().log_softmax(-1)[token])
    return total


def check_start(
    loss: PreferenceLoss, policy: PairLogps, reference: PairLogps, same_start: bool, dtype: torch.dtype
) -> Check:
    """Loss and margins before the first step: with the reference at the policy's start, those of a margin of 0.

    Args:
        same_start: Whether the reference is the policy's start.
        dtype: Of the weights.
    """
    name = "start"
    margins = reward_margin(policy, reference)
    found, expected = float(loss(policy, reference).mean()), float(loss(policy, policy).mean())
    largest = float(margins.abs().max())
    says = f"loss {found:.4f}, at a margin of 0 {expected:.4f}" + (
        " = ln 2" if math.isclose(expected, math.log(2), abs_tol=1e-6) else ""
    )
    says += f"; largest margin {largest:.2g} nats"
    if not (math.isfinite(found) and math.isfinite(largest)):
        return Check(name, "fail", says, "the weights are broken: look for NaN in them, or for another precision")
    if not same_start:
        return Check(name, "skipped", f"{says}; model.reference is another model, so it need not be 0")
    limit = MARGIN.get(dtype, MARGIN[torch.bfloat16])
    if largest > limit or abs(found - expected) > limit:
        advice = "policy and reference differ before the first step: something is random in the model (dropout?)"
        return Check(name, "fail", says, advice)
    return Check(name, "pass", says)


def joined(sums: Sequence[Tensor], batches: Sequence[SequenceBatch]) -> PairLogps:
    """The pairs of several branches as one."""
    parts = [by_side(own, batch) for own, batch in zip(sums, batches, strict=True)]
    names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    return PairLogps(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
