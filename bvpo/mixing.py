"""How much of each gradient: the error of g_c = α g_t + (1−α) g_e, the α that minimises it, and its online estimate.

With b_t = E g_t − μ and b_e = E g_e − μ, per-row covariances Σ_t, Σ_e, Σ_te and a batch of B rows,

    MSE_B(α) = ‖α b_t + (1−α) b_e‖² + [α² trΣ_t + (1−α)² trΣ_e + 2α(1−α) trΣ_te] / B
    α*_B     = (‖b_e‖² − ⟨b_t,b_e⟩ + (trΣ_e − trΣ_te)/B) / (‖b_t − b_e‖² + (trΣ_t + trΣ_e − 2 trΣ_te)/B), in [0, 1]

Variance falls with B and bias does not, so α* is a function of the batch that the optimizer sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import t as student_t
from torch import Tensor

from bvpo.errors import UserError
from bvpo.moments import ANCHOR, EMPTY, TRACE, GradientMoments

Number = float | Tensor
Anchor = Literal["trace", "marginal"]


def mean_squared_error(
    alpha: Number,
    trace_bias_sq: Number,
    empty_bias_sq: Number,
    bias_inner: Number,
    trace_variance: Number,
    empty_variance: Number,
    covariance: Number,
    batch_size: Number,
) -> Number:
    """E‖g_c − μ‖² of a batch of `batch_size` rows, from population quantities.

    Args:
        alpha: Weight of the trace gradient.
        trace_bias_sq, empty_bias_sq, bias_inner: ‖b_t‖², ‖b_e‖², ⟨b_t, b_e⟩.
        trace_variance, empty_variance, covariance: trΣ_t, trΣ_e, trΣ_te of one row.
    """
    rest = 1 - alpha
    bias_sq = alpha**2 * trace_bias_sq + rest**2 * empty_bias_sq + 2 * alpha * rest * bias_inner
    variance = alpha**2 * trace_variance + rest**2 * empty_variance + 2 * alpha * rest * covariance
    return bias_sq + variance / batch_size


def optimal_alpha(
    trace_bias_sq: Number,
    empty_bias_sq: Number,
    bias_inner: Number,
    trace_variance: Number,
    empty_variance: Number,
    covariance: Number,
    batch_size: Number,
) -> Number:
    """The α in [0, 1] at which `mean_squared_error` is least, for floats or tensors.

    Where the error has no curvature in α the better end is returned, and 0.5 where both ends are equal: the estimators
    then coincide, and every α is optimal.

    Raises:
        ValueError: The batch size is not positive, or a quantity is not finite.
    """
    quantities = (trace_bias_sq, empty_bias_sq, bias_inner, trace_variance, empty_variance, covariance, batch_size)
    values = [torch.as_tensor(q, dtype=torch.float64) for q in quantities]
    if not all(bool(v.isfinite().all()) for v in values) or not bool((values[-1] > 0).all()):
        raise ValueError(f"α* needs finite moments and a positive batch size, got {quantities}")
    numerator, curvature = _ratio(*values)
    ends = (1 + torch.sign(2 * numerator - curvature)) / 2
    inside = (numerator / torch.where(curvature > 0, curvature, 1.0)).clamp(0.0, 1.0)
    alpha = torch.where(curvature > 0, inside, ends)
    return alpha if any(isinstance(q, Tensor) for q in quantities) else float(alpha)


def _ratio(
    trace_bias_sq: Tensor,
    empty_bias_sq: Tensor,
    bias_inner: Tensor,
    trace_variance: Tensor,
    empty_variance: Tensor,
    covariance: Tensor,
    batch_size: Tensor,
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of α*_B; the denominator is half the error's curvature in α."""
    numerator = empty_bias_sq - bias_inner + (empty_variance - covariance) / batch_size
    bias_distance_sq = trace_bias_sq + empty_bias_sq - 2 * bias_inner
    return numerator, bias_distance_sq + (trace_variance + empty_variance - 2 * covariance) / batch_size


@dataclass(frozen=True)
class ErrorTerms:
    """What the error of g_c is made of: the first six arguments of `optimal_alpha`, each (K,) or a number.

    The variances are those of a row that has both pairs or, where some rows have one only, what they count for in a
    batch of such rows: trΣ_ab times `GradientMoments.overlap`.
    """

    trace_bias_sq: Tensor
    empty_bias_sq: Tensor
    bias_inner: Tensor
    trace_variance: Tensor
    empty_variance: Tensor
    covariance: Tensor

    @classmethod
    def from_moments(cls, moments: GradientMoments, anchor: Anchor, keep: Tensor | None = None) -> ErrorTerms:
        """Biases against the anchor: `trace` takes μ ≈ E g_t (b_t = 0), `marginal` the anchor gradients' mean.

        `keep` is a (K, M) indicator of the units that each of K estimates is made from.
        """
        statistics = moments.statistics(keep)
        inner, overlap = statistics.inner, statistics.overlap  # a replicate's overlap varies as its biases do
        covariance = torch.where(overlap > 0, statistics.covariance * overlap, 0.0)
        mu = TRACE if anchor == "trace" else ANCHOR
        return cls(
            statistics.distance_sq(TRACE, mu),
            statistics.distance_sq(EMPTY, mu),
            inner[TRACE, EMPTY] - inner[TRACE, mu] - inner[mu, EMPTY] + inner[mu, mu],
            covariance[TRACE, TRACE],
            covariance[EMPTY, EMPTY],
            covariance[TRACE, EMPTY],
        )

    def values(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.trace_bias_sq,
            self.empty_bias_sq,
            self.bias_inner,
            self.trace_variance,
            self.empty_variance,
            self.covariance,
        )


@dataclass(frozen=True)
class AlphaEstimate:
    """α̂ for one batch size.

    Attributes:
        value: α̂ in [0, 1]; None where `reason` says why there is none.
        standard_error: Of the unclipped ratio, by the delete-one-step jackknife; None below 3 steps.
        ratio: The unclipped estimate.
        steps, units: What the window held.
        reused_fraction: Products left out because their units share a prompt. Above 0 the units are no independent
            draws, and there is no interval.
        reason: Why there is no value; empty where there is one.
    """

    value: float | None
    standard_error: float | None
    ratio: float | None
    steps: int
    units: int
    reused_fraction: float
    reason: str = ""

    @classmethod
    def refused(cls, reason: str, steps: int = 0, units: int = 0, reused_fraction: float = 0.0) -> AlphaEstimate:
        """No estimate, and why."""
        return cls(None, None, None, steps, units, reused_fraction, reason)

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Student-t interval with steps − 1 degrees of freedom, cut to [0, 1].

        None without a standard error, and where prompts were met again: three passes over the rows bring the coverage
        of a nominal 95% down to 78% even with their common products left out (benchmarks/coverage.py).
        """
        if self.ratio is None or self.standard_error is None or self.reused_fraction > 0:
            return None
        half = float(student_t.ppf((1 + level) / 2, self.steps - 1)) * self.standard_error
        return min(max(self.ratio - half, 0.0), 1.0), max(min(self.ratio + half, 1.0), 0.0)


def estimate_alpha(moments: GradientMoments, batch_size: float, anchor: Anchor = "trace") -> AlphaEstimate:
    """α̂ of a batch of `batch_size` rows (units, where the moments know no rows): a ratio of U-statistics.

    The standard error leaves out one step's units at a time. θ moves within the window, so it is a block jackknife: it
    holds the spread between steps too.

    Raises:
        ValueError: The marginal anchor is asked of moments that hold none, or the batch size is not positive.
    """
    if anchor == "marginal" and not moments.has_anchor:
        raise ValueError("the marginal anchor needs anchor gradients, and this window holds none")
    if not batch_size > 0:
        raise ValueError(f"the batch size must be positive, got {batch_size}")
    steps = len(moments.jackknifed.unique())

    def without(reason: str) -> AlphaEstimate:
        return AlphaEstimate.refused(reason, steps, len(moments), moments.reused_fraction)

    if not bool(moments.independent.any()):
        return without(f"{len(moments)} units hold no two without a common prompt: at least two are needed")
    if not bool((moments.counts.sum(-1).diagonal() > 0).all()):
        return without("the window holds no row of one of the estimators")
    ratio, curvature = _ratios(moments, None, batch_size, anchor)
    if not bool(curvature.isfinite()):
        return without("the window's gradients are not finite")
    if not float(curvature) > 0:
        return without("the estimated distance between the estimators is not positive: the window is too short")
    error = None
    if steps >= 3:
        replicates, _ = _ratios(moments, moments.leave_one_step_out(), batch_size, anchor)
        if bool(replicates.isfinite().all()):
            error = float(((steps - 1) / steps * (replicates - replicates.mean()).square().sum()).sqrt())
    value = float(ratio)
    return AlphaEstimate(min(max(value, 0.0), 1.0), error, value, steps, len(moments), moments.reused_fraction)


def _ratios(moments: GradientMoments, keep: Tensor | None, batch_size: float, anchor: Anchor) -> tuple[Tensor, Tensor]:
    terms = ErrorTerms.from_moments(moments, anchor, keep)
    numerator, curvature = _ratio(*terms.values(), torch.tensor(batch_size, dtype=torch.float64))
    return numerator / curvature, curvature


@dataclass(frozen=True, kw_only=True)
class MixingPolicy(ABC):
    """What `--model.mixing` takes: the weight of a step from the steps before it, and how α̂ is estimated.

    α̂ is logged whatever the policy. Subclasses are frozen dataclasses.

    Args:
        window: Optimizer steps whose units α̂ is estimated from; 0 turns the statistics off, and with them the passes of
            an estimator whose weight is 0.
        anchor: What stands for μ: `trace` takes E g_t, `marginal` needs rows with `anchor_traces` (or
            `trace_candidates`).
        anchor_every: Optimizer steps between two measurements of the marginal anchor.
        per_group: Whether the embedding, each layer and the head get an estimate of their own.
    """

    window: int = 16
    anchor: Anchor = "trace"
    anchor_every: int = 4
    per_group: bool = False

    def __post_init__(self) -> None:
        _check_count("window", self.window, 0)
        _check_count("anchor_every", self.anchor_every, 1)

    @abstractmethod
    def weight(self, step: int, estimate: AlphaEstimate | None) -> float:
        """α of optimizer step `step` (from 0), given α̂ of the steps before it; None before there is a window."""


def _check_alpha(name: str, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise UserError(f"{name} must be in [0, 1], got {alpha}: 1 is trace-only, 0 is empty-trace-only")


def _check_count(name: str, count: int, least: int) -> None:
    if count < least:
        raise UserError(f"{name} must be ≥ {least} optimizer steps, got {count}")


@dataclass(frozen=True)
class Fixed(MixingPolicy):
    """The same α at every step. The paper trains with 0.5.

    Args:
        alpha: Weight of the trace gradient; 1 is trace-only DPO, 0 empty-trace-only.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha("alpha", self.alpha)

    def weight(self, step: int, estimate: AlphaEstimate | None) -> float:
        return self.alpha


@dataclass(frozen=True)
class Optimal(MixingPolicy):
    """α̂ of the last `window` optimizer steps, for the batch in use.

    Args:
        warmup_steps: Optimizer steps taken with `start` before α̂ is trusted: with the marginal anchor too, which is
            measured in one of `anchor_every` of them.
        bounds: α is kept within them.
        start: α until then, and wherever there is no estimate.
    """

    warmup_steps: int = 8
    bounds: tuple[float, float] = (0.0, 1.0)
    start: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha("start", self.start)
        _check_alpha("the lower bound", self.bounds[0])
        _check_alpha("the upper bound", self.bounds[1])
        if self.bounds[0] > self.bounds[1]:
            raise UserError(f"bounds must be (lower, upper), got {self.bounds}")
        _check_count("window", self.window, 1)
        _check_count("warmup_steps", self.warmup_steps, 0)

    def weight(self, step: int, estimate: AlphaEstimate | None) -> float:
        if step < self.warmup_steps or estimate is None or estimate.value is None:
            return self.start
        return min(max(estimate.value, self.bounds[0]), self.bounds[1])


@dataclass(frozen=True)
class Schedule(MixingPolicy):
    """α from `start` to `end` along a straight line of `steps` optimizer steps, then `end`.

    Args:
        start, end: Weights of the trace gradient.
        steps: Length of the line.
    """

    start: float = 0.0
    end: float = 1.0
    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha("start", self.start)
        _check_alpha("end", self.end)
        _check_count("steps", self.steps, 1)

    def weight(self, step: int, estimate: AlphaEstimate | None) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)
