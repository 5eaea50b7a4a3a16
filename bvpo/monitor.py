"""What a run knows of its gradients: the windows of units, α̂ and the weight of the next step.

Shapes: U units of an optimizer step, D numbers of a gradient's sketch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from bvpo.anchor import AnchorQuality
from bvpo.gradients import Group
from bvpo.mixing import AlphaEstimate, ErrorTerms, MixingPolicy, estimate_alpha, mean_squared_error
from bvpo.moments import EMPTY, TRACE, GradientMoments
from bvpo.window import GradientWindow

LEAST_EFFECTIVE_SIZE = 2.0  # traces that a completion's marginal must rest on
LARGEST_HALF_DIFFERENCE = 1.0  # nats between the log-marginals of disjoint halves of the traces


@dataclass(frozen=True)
class Units:
    """Mean gradients of a step's units.

    Attributes:
        gradients: (E, U, D) of trace, empty and perhaps the anchor.
        counts: (E, E, U) float64 rows that two estimators have in common; each one's own on the diagonal.
        prompts: (U, R) keys.
    """

    gradients: Tensor
    counts: Tensor
    prompts: Tensor

    def merged(self) -> Units:
        """The whole step as one unit."""
        return Units(self.batch_mean()[:, None], self.counts.sum(-1, keepdim=True), self.prompts.reshape(1, -1))

    def batch_mean(self) -> Tensor:
        """The optimizer batch's gradients, (E, D)."""
        rows = self.counts.diagonal().T  # (E, U)
        share = rows / rows.sum(-1, keepdim=True).clamp(min=1)
        return torch.einsum("eu,eud->ed", share.to(self.gradients), self.gradients)


class GradientMonitor(nn.Module):
    """The windows of a run and what follows from them; its state is in every checkpoint.

    Args:
        mixing: The policy that asks for α̂.
        groups: The parameter groups of a sketch.
        units_a_step: Units that an optimizer step brings.
        dtype: Of the sketches kept.
    """

    def __init__(
        self, mixing: MixingPolicy, groups: Sequence[Group], units_a_step: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.mixing, self.names = mixing, [group.name for group in groups]
        self.batch_rows = 1
        capacity, widths = mixing.window * units_a_step, [group.sketch.width for group in groups]
        self.window = GradientWindow(capacity, widths, dtype=dtype)
        self.anchored = (
            GradientWindow(capacity, widths, estimators=3, dtype=dtype) if mixing.anchor == "marginal" else None
        )
        self.estimate: AlphaEstimate | None = None
        self.group_estimates: list[AlphaEstimate | None] = [None] * len(groups)
        self.refused, self._refusal = 0, ""
        self._moments: list[
            GradientMoments
        ] = []  # that α̂ comes from: of all parameters, then of each of several groups

    @property
    def source(self) -> GradientWindow:
        """The window that α̂ comes from."""
        return self.window if self.anchored is None else self.anchored

    def weights(self, step: int) -> list[float]:
        """α of each group at optimizer step `step`, from the steps before it."""
        return [self.mixing.weight(step, estimate) for estimate in self.group_estimates]

    def measures_anchor(self, step: int) -> bool:
        return self.anchored is not None and step % self.mixing.anchor_every == 0

    def update(self, units: Units, step: int, quality: AnchorQuality | None = None) -> dict[str, float]:
        """Take in the units of an optimizer step and estimate α anew; the anchor's log values."""
        self.window.update(units.gradients[:2], units.counts[:2, :2], units.prompts, step)
        if quality is None or self.anchored is None:
            if not self._refusal:  # until the next good anchor
                self.estimate_alpha()
            return {}
        size, difference = float(quality.effective_size), float(quality.half_difference)
        finite = bool(units.gradients.isfinite().all())
        reason = refusal(size, difference) if finite else "its gradient is not finite"
        self._refusal = reason
        if reason:
            self.refused += 1
            rank_zero_warn(f"step {step}: the marginal anchor is refused ({self.refused} so far): {reason}")
            self._forget()
        else:
            self.anchored.update(units.gradients, units.counts, units.prompts, step)
            self.estimate_alpha()
        metrics = {"anchor/effective_size": size, "anchor/half_difference": difference}
        return {**metrics, "anchor/refused": float(self.refused)}

    def _forget(self) -> None:
        known = self._moments[0] if self._moments else self.window.moments()  # of the good anchors before, if any
        self.estimate = AlphaEstimate.refused(self._refusal, reused_fraction=known.reused_fraction)
        self.group_estimates = [self.estimate] * len(self.names)

    def resume(self, batch_rows: int) -> None:
        """Set B, the rows of the optimizer batch that α̂ is for, and go on from the windows as they were restored."""
        self.batch_rows = batch_rows
        self.estimate_alpha()
        if self._refusal:
            self._forget()

    def get_extra_state(self) -> dict[str, Any]:
        return {"refused": self.refused, "refusal": self._refusal}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.refused, self._refusal = state["refused"], state["refusal"]

    def estimate_alpha(self) -> None:
        """α̂ of all parameters, and of each group, from the window as it is."""
        if not int(self.source.seen):
            return
        self._moments = self._all(self.source)
        estimates = [estimate_alpha(moments, self.batch_rows, self.mixing.anchor) for moments in self._moments]
        self.estimate, self.group_estimates = estimates[0], list(estimates[1:] or estimates)

    def _all(self, window: GradientWindow) -> list[GradientMoments]:
        """Of all parameters, then of each of several groups."""
        groups = range(len(self.names)) if len(self.names) > 1 else []
        return [window.moments(), *(window.moments(group) for group in groups)]

    def _mixed_variance(self, moments: Sequence[GradientMoments], weights: Sequence[float]) -> float:
        """Of one optimizer batch's mixed gradient: the noise in its squared error, which no anchor enters."""
        parts = [ErrorTerms.from_moments(own, "trace").values()[3:] for own in moments[1:] or moments]
        noise = zip(weights, parts, strict=True)
        return sum(float(mean_squared_error(a, 0.0, 0.0, 0.0, *part, self.batch_rows)) for a, part in noise)

    def metrics(self, weights: Sequence[float]) -> dict[str, float]:
        """What the windows say of a step with these α; a key whose value cannot be estimated is absent."""
        moments = self._moments if self.anchored is None else self._all(self.window)
        metrics = window_metrics(moments[0]) | {"variance/mixed": self._mixed_variance(moments, weights)}
        if self.estimate is not None:
            metrics["mixing/reused_fraction"] = self.estimate.reused_fraction
            if self.estimate.standard_error is not None:
                metrics["mixing/alpha_standard_error"] = self.estimate.standard_error
        if self._moments:
            metrics |= self._error_metrics(weights)
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def _error_metrics(self, weights: Sequence[float]) -> dict[str, float]:
        anchor, rows = self.mixing.anchor, self.batch_rows
        blocks = self._moments[1:] or self._moments
        parts = [ErrorTerms.from_moments(moments, anchor).values() for moments in blocks]
        whole = [sum(terms) for terms in zip(*parts, strict=True)]

        def error(alphas: Sequence[float]) -> float:
            return sum(float(mean_squared_error(a, *part, rows)) for a, part in zip(alphas, parts, strict=True))

        metrics = {"bias/empty_sq": float(whole[1])}
        if anchor == "marginal":
            metrics["bias/trace_sq"] = float(whole[0])
        if self.estimate is None or self.estimate.value is None:
            return metrics
        metrics["mixing/alpha_estimate"] = self.estimate.value
        common = error([self.estimate.value] * len(parts))
        if len(self.names) == 1:
            return metrics | ({"mixing/mse_ratio": error(weights) / common} if common > 0 else {})
        own = [
            estimate.value for estimate in self.group_estimates if estimate is not None and estimate.value is not None
        ]
        if len(own) == len(parts):
            metrics |= {f"mixing/alpha_estimate/{name}": a for name, a in zip(self.names, own, strict=True)}
            best = error(own)
            if best > 0:  # the common α̂ is no minimum of what the groups' weights are chosen from
                metrics["mixing/mse_ratio"] = error(weights) / best
            if common > 0:
                metrics["mixing/mse_ratio_per_group"] = best / common
        return metrics


def refusal(effective_size: float, half_difference: float) -> str:
    """Why an anchor is not to be trusted; empty where it is. NaN nats: there was no trace to compare with."""
    if math.isnan(half_difference):
        return "no completion has two traces, and one is no mean over traces: draw more"
    if not effective_size >= LEAST_EFFECTIVE_SIZE:
        return f"effective sample size {effective_size:.2f} is below {LEAST_EFFECTIVE_SIZE:g}: draw more traces"
    if not half_difference <= LARGEST_HALF_DIFFERENCE:
        return f"disjoint halves of the traces differ by {half_difference:.2f} nats, over {LARGEST_HALF_DIFFERENCE:g}"
    return ""


def window_metrics(moments: GradientMoments) -> dict[str, float]:
    """Variances of one pair's gradients and their noise scales; the pairs of a row, where some rows have one only."""
    statistics = moments.statistics()
    values = {
        "variance/trace": statistics.covariance[TRACE, TRACE],
        "variance/empty": statistics.covariance[EMPTY, EMPTY],
        "variance/covariance": statistics.covariance[TRACE, EMPTY],
        "gradient/noise_scale_trace": statistics.covariance[TRACE, TRACE] / statistics.inner[TRACE, TRACE],
        "gradient/noise_scale_empty": statistics.covariance[EMPTY, EMPTY] / statistics.inner[EMPTY, EMPTY],
    }
    own = moments.counts.sum(-1)
    rows = own[TRACE, TRACE] + own[EMPTY, EMPTY] - own[TRACE, EMPTY]
    if own[TRACE, EMPTY] < rows:
        values |= {
            "pairs/trace": own[TRACE, TRACE] / rows,
            "pairs/empty": own[EMPTY, EMPTY] / rows,
            "pairs/both": own[TRACE, EMPTY] / rows,
        }
    return {name: float(value) for name, value in values.items()}  # of gradients that are all 0, a scale is no number
