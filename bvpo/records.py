"""What one optimizer step records, and the log keys it becomes. docs/method.md describes every key.

Shapes: B rows of a microbatch, U units of an optimizer step, D numbers of a gradient's sketch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bvpo.losses import PairLogps, reward_margin
from bvpo.mixing import AlphaEstimate, Anchor, ErrorTerms, mean_squared_error
from bvpo.moments import EMPTY, TRACE, GradientMoments
from bvpo.pairs import Branch, SequenceBatch


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


@dataclass(frozen=True)
class Units:
    """Mean gradients of the step's units: trace and empty (U, D), rows (U,), prompt keys (U, R)."""

    trace: Tensor
    empty: Tensor
    rows: Tensor
    prompts: Tensor

    def merged(self) -> Units:
        """The whole step as one unit."""
        trace, empty = self.batch_mean()
        return Units(trace[None], empty[None], self.rows.sum(0, keepdim=True), self.prompts.reshape(1, -1))

    def batch_mean(self) -> tuple[Tensor, Tensor]:
        """The optimizer batch's trace and empty-trace gradient, (D,)."""
        weight = (self.rows / self.rows.sum()).to(self.trace)
        return weight @ self.trace, weight @ self.empty


@dataclass
class StepRecord:
    """Sums over the microbatches of one optimizer step, on the device, and the step's α."""

    alpha: float
    sums: dict[str, Tensor] = field(default_factory=lambda: defaultdict(lambda: torch.tensor(0.0)))
    sketches: dict[Branch, list[Tensor]] = field(default_factory=lambda: {"trace": [], "empty": []})
    prompts: list[Tensor] = field(default_factory=list)
    tokens: Tensor | int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, branch: Branch, metrics: dict[str, Tensor], sequences: SequenceBatch, sketch: Tensor | None) -> None:
        """One branch's pass over one microbatch; `sketch` is of the gradient of its share of the step's loss."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name].to(value) + value / sequences.step_pairs
        self.tokens = self.tokens + sequences.lengths.sum()
        if sketch is not None:
            self.sketches[branch].append(sketch * (sequences.step_pairs / sequences.pairs))

    def units(self) -> Units | None:
        """The microbatches as units; None where no statistics are kept."""
        if not self.sketches["trace"] or not self.sketches["empty"]:
            return None
        prompts = torch.nn.utils.rnn.pad_sequence(self.prompts, batch_first=True, padding_value=-1)
        return Units(
            torch.stack(self.sketches["trace"]),
            torch.stack(self.sketches["empty"]),
            torch.tensor([len(keys) for keys in self.prompts], dtype=torch.float64, device=prompts.device),
            prompts,
        )

    def means(self) -> dict[str, Tensor]:
        """The log values averaged over the step's pairs, the mixed loss, and the rate so far."""
        means = dict(self.sums)
        if "loss/trace" in means and "loss/empty" in means:
            means["loss/mixed"] = self.alpha * means["loss/trace"] + (1 - self.alpha) * means["loss/empty"]
        means["tokens_per_second"] = torch.as_tensor(self.tokens / (time.perf_counter() - self.started))
        return means


def gradient_metrics(units: Units) -> dict[str, Tensor]:
    """Norms and cosine of the optimizer batch's two gradients."""
    trace, empty = (gradient.double() for gradient in units.batch_mean())
    norms = {"gradient/trace_norm": trace.norm(), "gradient/empty_norm": empty.norm()}
    return norms | {"gradient/cosine": trace @ empty / (trace.norm() * empty.norm())}


def window_metrics(
    moments: GradientMoments, estimate: AlphaEstimate, alpha: float, batch_size: int, anchor: Anchor
) -> dict[str, float]:
    """What the window of units says; a key whose value cannot be estimated is absent."""
    statistics = moments.statistics()
    terms = ErrorTerms.from_statistics(statistics, anchor)
    trace_variance, empty_variance = float(terms.trace_variance), float(terms.empty_variance)
    covariance = float(terms.covariance)
    metrics = {
        "variance/trace": trace_variance,
        "variance/empty": empty_variance,
        "variance/covariance": covariance,
        "variance/mixed": float(
            mean_squared_error(alpha, 0.0, 0.0, 0.0, trace_variance, empty_variance, covariance, batch_size)
        ),
        "bias/empty_sq": float(terms.empty_bias_sq),
        "gradient/noise_scale_trace": trace_variance / float(statistics.inner[TRACE, TRACE]),
        "gradient/noise_scale_empty": empty_variance / float(statistics.inner[EMPTY, EMPTY]),
    }
    if anchor == "marginal":
        metrics["bias/trace_sq"] = float(terms.trace_bias_sq)
    if estimate.value is not None:
        metrics["mixing/alpha_estimate"] = estimate.value
        best = float(mean_squared_error(estimate.value, *terms.values(), batch_size))
        if best > 0:
            metrics["mixing/mse_ratio"] = float(mean_squared_error(alpha, *terms.values(), batch_size)) / best
    if estimate.standard_error is not None:
        metrics["mixing/alpha_standard_error"] = estimate.standard_error
    return {name: value for name, value in metrics.items() if value == value and abs(value) != float("inf")}
