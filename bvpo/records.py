"""What one optimizer step records, over all ranks, and the log keys it becomes. docs/method.md describes every key.

Shapes: B rows of a microbatch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bvpo import ranks
from bvpo.anchor import AnchorQuality
from bvpo.batches import BRANCHES, Branch, PairBatch, SequenceBatch
from bvpo.losses import PairLogps, reward_margin
from bvpo.moments import pad_columns
from bvpo.monitor import Units
from bvpo.throughput import ModelFlops, utilization


@torch.no_grad()
def branch_metrics(
    branch: Branch, losses: Tensor, policy: PairLogps, reference: PairLogps, beta: float
) -> dict[str, Tensor]:
    """One branch's log values, each summed over the microbatch's pairs; rewards are β log π/π_ref."""
    margin = beta * reward_margin(policy, reference)
    values = [
        losses,
        beta * (policy.chosen - reference.chosen),
        beta * (policy.rejected - reference.rejected),
        margin,
        (margin > 0).double(),
        policy.chosen,
        policy.rejected,
        policy.chosen / policy.chosen_tokens,
        policy.rejected / policy.rejected_tokens,
    ]
    return {name: value.sum() for name, value in zip(logged(branch), values, strict=True)}


def logged(branch: Branch) -> list[str]:
    """The log keys of `branch_metrics`."""
    rewards = [f"reward/{branch}_{name}" for name in ("chosen", "rejected", "margin", "accuracy")]
    logps = [f"logp/{branch}_{side}_{kind}" for kind in ("sum", "mean") for side in ("chosen", "rejected")]
    return [f"loss/{branch}", *rewards, *logps]


def trains(weights: Sequence[float], step_pairs: tuple[int, int]) -> bool:
    """Whether any of an optimizer batch's pairs (trace, empty) has a weight, under these α of the parameter groups."""
    trace, empty = step_pairs
    return bool(trace and any(weights)) or bool(empty and any(1 - alpha for alpha in weights))


@dataclass
class StepRecord:
    """Sums over this rank's microbatches of one optimizer step, on the device.

    Attributes:
        weights: The step's α, one a parameter group.
        step_pairs: (trace, empty) pairs of the optimizer batch, over all ranks.
        flops: Model FLOPs of a microbatch; None where they are not known.
    """

    weights: list[float]
    step_pairs: tuple[int, int]
    flops: ModelFlops | None = None
    sums: dict[str, Tensor] = field(default_factory=lambda: defaultdict(lambda: torch.tensor(0.0)))
    sketches: dict[str, list[Tensor]] = field(default_factory=lambda: {"trace": [], "empty": [], "anchor": []})
    prompts: list[Tensor] = field(default_factory=list)
    counts: list[tuple[int, int, int]] = field(default_factory=list)
    qualities: list[AnchorQuality] = field(default_factory=list)
    conditional: list[tuple[Tensor, float]] = field(default_factory=list)
    computed: set[Branch] = field(default_factory=set)
    tokens: Tensor | int = 0
    work: Tensor | int = 0  # model FLOPs
    started: float = field(default_factory=time.perf_counter)

    @property
    def branches(self) -> list[Branch]:
        """The branches that were computed and have pairs, on whatever rank."""
        return [b for b, pairs in zip(BRANCHES, self.step_pairs, strict=True) if pairs and b in self.computed]

    def add(self, metrics: dict[str, Tensor], sequences: SequenceBatch) -> None:
        """The log values of one branch's pass over one microbatch."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name].to(value) + value / sequences.step_pairs
        self.tokens = self.tokens + sequences.lengths.sum()
        if self.flops is not None:
            self.work = self.work + self.flops(sequences)

    def add_rows(self, batch: PairBatch) -> None:
        """A microbatch's prompts, and how many of its rows each estimator averages over."""
        self.prompts.append(batch.prompts)
        self.counts.append(batch.counts)

    def add_sketch(self, estimator: str, sketch: Tensor | None) -> None:
        """The sketch of a microbatch's share of the step's gradient."""
        if sketch is not None:
            self.sketches[estimator].append(sketch)

    def add_conditional_variance(self, variance: Tensor, rows: float) -> None:
        """Of one pair's trace gradient over its traces, given the answers; estimated from `rows` rows."""
        self.conditional.append((variance, rows))

    @property
    def alpha(self) -> float:
        """α; the groups' mean where they differ."""
        return sum(self.weights) / len(self.weights)

    def quality(self) -> AnchorQuality | None:
        """The anchor's quality over all ranks' completions; None where no anchor was measured."""
        if not self.sketches["anchor"]:
            return None
        own = torch.stack([q.sums for q in self.qualities]).sum(0) if self.qualities else torch.zeros(4).double()
        quality = AnchorQuality(ranks.total(own))
        return quality if quality.sums[1] > 0 else None

    def units(self, width: int, sharded: bool = False) -> Units | None:
        """The step's units over all ranks; None where no statistics are kept.

        Args:
            width: Rows of a microbatch.
            sharded: The ranks' sketches are parts of one gradient: of all ranks' rows, which are one unit. Otherwise
                each rank's microbatches are units of their own.
        """
        if not self.sketches["trace"] or not self.sketches["empty"]:
            return None
        kinds = [kept for kept in self.sketches.values() if kept]
        sketches = torch.stack([sketch for kept in kinds for sketch in kept])
        sketches = sketches.unflatten(0, (len(kinds), -1))  # (E, U, D)
        counts = unit_counts(self.counts, len(sketches))  # (E, E, U), on the host: the device is not waited for
        prompts = torch.stack([pad_columns(keys[None], width)[0] for keys in self.prompts])  # (U, R)
        if sharded:
            sketches, counts, prompts = ranks.total(sketches), ranks.total(counts), torch.cat(ranks.gather(prompts), -1)
        else:
            sketches, counts, prompts = _every_rank(sketches, 1), _every_rank(counts, 2), _every_rank(prompts, 0)
        own = counts.diagonal().T  # (E, U)
        pairs = [self.step_pairs[index] for index in (0, 1, 0)][: len(sketches)]
        scale = torch.tensor(pairs)[:, None] / own.clamp(min=1)
        sketches *= scale.to(sketches)[..., None]  # each unit's own mean gradient
        kept = own.sum(0) > 0  # a rank without a row has given an empty unit
        if not kept.all():
            sketches, counts = sketches[:, kept.to(sketches.device)], counts[..., kept]
            prompts = prompts[kept.to(prompts.device)]
        return Units(sketches, counts, prompts)

    def means(self) -> dict[str, Tensor]:
        """The log values averaged over the step's pairs, the mixed loss, and what all ranks did: `tokens`, `flops`."""
        names = [name for branch in self.branches for name in logged(branch)]
        tokens = torch.as_tensor(self.tokens, dtype=torch.float64)
        values = [self.sums[name] for name in names]
        values += [tokens, sum((v * rows for v, rows in self.conditional), start=torch.zeros_like(tokens))]
        behind = torch.tensor([rows for _, rows in self.conditional], dtype=torch.float64).sum()
        values += [behind, torch.as_tensor(self.work)]
        totals = ranks.total(torch.stack([value.to(tokens) for value in values]))
        means = dict(zip(names, totals, strict=False))
        if "loss/trace" in means and "loss/empty" in means:
            means["loss/mixed"] = self.alpha * means["loss/trace"] + (1 - self.alpha) * means["loss/empty"]
        means["tokens"], conditional, rows, means["flops"] = totals[len(names) :]
        if self.sketches["anchor"] and rows > 0:
            means["variance/trace_conditional"] = conditional / rows
            means["anchor/conditional_rows"] = rows
        return means

    def rates(self, tokens: float, flops: float, peak: float | None) -> dict[str, float]:
        """Tokens a second and MFU, by the clock since the step's first microbatch: call it when all is done.

        Args:
            tokens, flops: Of `means`.
            peak: FLOP/s of a rank's device; None where it is not known.
        """
        seconds = time.perf_counter() - self.started
        rates = {"tokens_per_second": tokens / seconds}
        if self.flops is not None and peak is not None:
            work = torch.tensor(flops, dtype=torch.float64)
            rates["throughput/mfu"] = float(utilization(work, seconds, ranks.count(), peak))
        return rates


class ValidationRecord:
    """Sums over this rank's validation rows."""

    def __init__(self) -> None:
        self._sums = {name: torch.zeros((), dtype=torch.float64) for branch in BRANCHES for name in logged(branch)}
        self._pairs = dict.fromkeys(BRANCHES, 0)

    def add(self, branch: Branch, metrics: dict[str, Tensor], pairs: int) -> None:
        """The log values of one microbatch, summed over its pairs."""
        self._pairs[branch] += pairs
        for name, value in metrics.items():
            self._sums[name] = self._sums[name].to(value.device) + value

    def means(self) -> dict[str, Tensor]:
        """The log values averaged over all ranks' pairs; a branch without a pair has none."""
        values = [*self._sums.values(), *(torch.tensor(float(pairs)) for pairs in self._pairs.values())]
        device = next(iter(self._sums.values())).device
        *sums, trace, empty = ranks.total(torch.stack([value.double().to(device) for value in values]))
        pairs = {"trace": trace, "empty": empty}
        named = zip(self._sums, sums, strict=True)
        means = {name: (total, pairs[next(b for b in BRANCHES if name in logged(b))]) for name, total in named}
        return {f"validation/{name}": total / count for name, (total, count) in means.items() if count > 0}


def _every_rank(units: Tensor, dim: int) -> Tensor:
    """The units of all ranks, along `dim`: microbatch by microbatch, as one rank would take them."""
    return torch.stack(ranks.gather(units), dim + 1).flatten(dim, dim + 1)


def unit_counts(counts: list[tuple[int, int, int]], estimators: int) -> Tensor:
    """(E, E, U) float64 from each unit's B_t, B_e and B_te; the anchor's rows are those of the trace pairs."""
    trace, empty, both = torch.tensor(counts, dtype=torch.float64).T
    table = [[trace, both, trace], [both, empty, both], [trace, both, trace]]
    return torch.stack([torch.stack(row[:estimators]) for row in table[:estimators]])


def gradient_metrics(units: Units) -> dict[str, Tensor]:
    """Norms and cosine of the optimizer batch's two gradients."""
    trace, empty = units.batch_mean()[:2].double()
    norms = {"gradient/trace_norm": trace.norm(), "gradient/empty_norm": empty.norm()}
    return norms | {"gradient/cosine": trace @ empty / (trace.norm() * empty.norm())}
