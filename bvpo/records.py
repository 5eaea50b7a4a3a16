"""What one optimizer step records, and the log keys it becomes. docs/method.md describes every key.

Shapes: B rows of a microbatch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bvpo.anchor import AnchorQuality
from bvpo.batches import Branch, PairBatch, SequenceBatch
from bvpo.losses import PairLogps, reward_margin
from bvpo.monitor import Units


@torch.no_grad()
def branch_metrics(
    branch: Branch, losses: Tensor, policy: PairLogps, reference: PairLogps, beta: float
) -> dict[str, Tensor]:
    """One branch's log values, each summed over the microbatch's pairs; rewards are β log π/π_ref."""
    margin = beta * reward_margin(policy, reference)
    values = {
        f"loss/{branch}": losses,
        f"reward/{branch}_chosen": beta * (policy.chosen - reference.chosen),
        f"reward/{branch}_rejected": beta * (policy.rejected - reference.rejected),
        f"reward/{branch}_margin": margin,
        f"reward/{branch}_accuracy": (margin > 0).double(),
        f"logp/{branch}_chosen_sum": policy.chosen,
        f"logp/{branch}_rejected_sum": policy.rejected,
        f"logp/{branch}_chosen_mean": policy.chosen / policy.chosen_tokens,
        f"logp/{branch}_rejected_mean": policy.rejected / policy.rejected_tokens,
    }
    return {name: value.sum() for name, value in values.items()}


@dataclass
class StepRecord:
    """Sums over the microbatches of one optimizer step, on the device, and the step's α, one a parameter group."""

    weights: list[float]
    sums: dict[str, Tensor] = field(default_factory=lambda: defaultdict(lambda: torch.tensor(0.0)))
    sketches: dict[str, list[Tensor]] = field(default_factory=lambda: {"trace": [], "empty": [], "anchor": []})
    prompts: list[Tensor] = field(default_factory=list)
    counts: list[tuple[int, int, int]] = field(default_factory=list)
    qualities: list[AnchorQuality] = field(default_factory=list)
    conditional: list[tuple[Tensor, int]] = field(default_factory=list)
    tokens: Tensor | int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, metrics: dict[str, Tensor], sequences: SequenceBatch) -> None:
        """The log values of one branch's pass over one microbatch."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name].to(value) + value / sequences.step_pairs
        self.tokens = self.tokens + sequences.lengths.sum()

    def add_rows(self, batch: PairBatch) -> None:
        """A microbatch's prompts, and how many of its rows each estimator averages over."""
        self.prompts.append(batch.prompts)
        self.counts.append(batch.counts)

    def add_sketch(self, estimator: str, sketch: Tensor | None, sequences: SequenceBatch) -> None:
        """The sketch of a microbatch's share of the step's gradient, kept as that of its own mean gradient."""
        if sketch is not None:
            self.sketches[estimator].append(sketch * (sequences.step_pairs / max(sequences.pairs, 1)))

    def add_conditional_variance(self, variance: Tensor, rows: int) -> None:
        """Of one pair's trace gradient over its traces, given the answers; estimated from `rows` rows."""
        self.conditional.append((variance, rows))

    @property
    def alpha(self) -> float:
        """α; the groups' mean where they differ."""
        return sum(self.weights) / len(self.weights)

    @property
    def quality(self) -> AnchorQuality | None:
        """The anchor's quality, averaged over microbatches; None where no anchor was measured."""
        if not self.qualities:
            return None
        return AnchorQuality(
            torch.stack([q.effective_size for q in self.qualities]).mean(),
            torch.stack([q.half_difference for q in self.qualities]).mean(),
        )

    def units(self) -> Units | None:
        """The microbatches as units; None where no statistics are kept."""
        if not self.sketches["trace"] or not self.sketches["empty"]:
            return None
        prompts = torch.nn.utils.rnn.pad_sequence(self.prompts, batch_first=True, padding_value=-1)
        return Units(
            torch.stack([torch.stack(sketches) for sketches in self.sketches.values() if sketches]),
            unit_counts(self.counts, sum(map(bool, self.sketches.values()))).to(prompts.device),
            prompts,
        )

    def means(self) -> dict[str, Tensor]:
        """The log values averaged over the step's pairs, the mixed loss, and the rate so far."""
        means = dict(self.sums)
        if "loss/trace" in means and "loss/empty" in means:
            means["loss/mixed"] = self.alpha * means["loss/trace"] + (1 - self.alpha) * means["loss/empty"]
        if self.conditional:
            rows = sum(count for _, count in self.conditional)
            means["variance/trace_conditional"] = sum(v * count for v, count in self.conditional) / torch.tensor(rows)
            means["anchor/conditional_rows"] = torch.tensor(float(rows))
        means["tokens_per_second"] = torch.as_tensor(self.tokens / (time.perf_counter() - self.started))
        return means


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
