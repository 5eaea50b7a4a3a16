"""Gradient statistics from a window of units: everything follows from the units' Gram matrix.

A *unit* is n rows' mean trace gradient and mean empty-trace gradient. Units must be exchangeable: each a random subset
of prompts. With m_a = E g_a and Σ_ab the covariance of one row's gradients, for two units i ≠ j that share no prompt

    E⟨g_a,i , g_b,j⟩ = ⟨m_a, m_b⟩            E⟨g_a,i , g_b,i⟩ = ⟨m_a, m_b⟩ + trΣ_ab / n_i

so both sides are means over entries of the Gram matrix: U-statistics, unbiased, and possibly negative.

Shapes: M units, E estimators (trace, empty, and the anchor where there is one), D numbers a gradient or its sketch,
K jackknife replicates, R rows a unit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

TRACE, EMPTY, ANCHOR = 0, 1, 2
RUN = (
    4096  # an fp32 sum of so many products is right to about 1e-6, and a float64 copy of the window costs more than it
)


@dataclass(frozen=True)
class GradientMoments:
    """A window of units and its Gram matrix. Build it with `from_gradients`; join windows with `merge`.

    Attributes:
        vectors: (E, M, D) gradients of the units, or their sketches.
        gram: (E, E, M, M) float64 inner products.
        rows: (M,) float64 rows that each unit averages over.
        prompts: (M, R) int64 prompt keys, −1 where a unit has fewer; None where all units have prompts of their own.
        steps: (M,) int64 optimizer step of each unit: the jackknife leaves out a step at a time.
    """

    vectors: Tensor
    gram: Tensor
    rows: Tensor
    prompts: Tensor | None
    steps: Tensor

    @classmethod
    def from_gradients(
        cls,
        trace: Tensor,
        empty: Tensor,
        anchor: Tensor | None = None,
        rows: Tensor | None = None,
        prompts: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> GradientMoments:
        """Moments of (M, D) unit gradients.

        Args:
            trace, empty: Mean gradients over each unit's rows.
            anchor: Unbiased estimates of the marginal gradient μ on the same units.
            rows: (M,) rows a unit; without it a unit counts as one row, and variances are per unit.
            prompts: (M, R) keys of the units' prompts; products of units that share one are left out.
            steps: (M,) optimizer step of each unit; without it each unit is a step of its own.

        Raises:
            ValueError: The shapes differ, or there is no unit.
        """
        kinds = [trace, empty] if anchor is None else [trace, empty, anchor]
        if trace.ndim != 2 or any(kind.shape != trace.shape for kind in kinds):
            raise ValueError(f"gradients must be (units, numbers) of one shape, got {[tuple(k.shape) for k in kinds]}")
        units = len(trace)
        if units == 0:
            raise ValueError("no units: there is nothing to take moments of")
        vectors = torch.stack(kinds)
        return cls(
            vectors,
            inner_products(vectors, vectors).cpu(),
            torch.ones(units, dtype=torch.float64) if rows is None else torch.as_tensor(rows, dtype=torch.float64),
            prompts,
            torch.arange(units) if steps is None else steps,
        )

    def merge(self, other: GradientMoments) -> GradientMoments:
        """The moments of both windows' units together: ranks, stretches of a run, notebooks."""
        if len(self.vectors) != len(other.vectors):
            raise ValueError("one of the windows has anchor gradients and the other has none: they cannot be merged")
        cross = inner_products(self.vectors, other.vectors).cpu()
        upper = torch.cat([self.gram, cross], -1)
        lower = torch.cat([cross.permute(1, 0, 3, 2), other.gram], -1)
        return replace(
            self,
            vectors=torch.cat([self.vectors, other.vectors], 1),
            gram=torch.cat([upper, lower], -2),
            rows=torch.cat([self.rows, other.rows]),
            prompts=_join_prompts(self, other),
            steps=torch.cat([self.steps, other.steps]),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_anchor(self) -> bool:
        return len(self.vectors) > ANCHOR

    @cached_property
    def independent(self) -> Tensor:
        """(M, M) whether two units share no prompt; the diagonal is False."""
        distinct = ~torch.eye(len(self), dtype=torch.bool)
        if self.prompts is None:
            return distinct
        keys, index = self.prompts.unique(return_inverse=True)
        member = torch.zeros(len(self), len(keys), dtype=torch.float64)
        member.scatter_(1, index, 1.0)
        member[:, keys == -1] = 0.0
        return (member @ member.T == 0) & distinct

    @property
    def reused_fraction(self) -> float:
        """Fraction of the products between different units that was left out because they share a prompt."""
        pairs = len(self) * (len(self) - 1)
        return 1.0 - float(self.independent.sum()) / pairs if pairs else 0.0

    def statistics(self, keep: Tensor | None = None) -> GradientStatistics:
        """The U-statistics of all units, or of K subsets at once: `keep` is a (K, M) indicator."""
        keep = torch.ones(1, len(self), dtype=torch.float64) if keep is None else keep
        weight = self.rows[:, None] * self.rows * self.independent
        total = torch.einsum("km,mn,kn->k", keep, weight, keep)
        inner = torch.einsum("km,abmn,kn->abk", keep, weight * self.gram, keep) / total
        scaled = self.rows * self.gram.diagonal(dim1=-2, dim2=-1)  # (E, E, M): n_i ⟨g_a,i , g_b,i⟩
        count = keep.sum(-1)
        covariance = (scaled @ keep.T) / count - inner * ((keep @ self.rows) / count)
        return GradientStatistics(inner, covariance)

    def leave_one_step_out(self) -> Tensor:
        """(K, M) indicators of the jackknife's replicates: one for each step, without its units."""
        return torch.ne(self.steps, self.steps.unique()[:, None]).double()


@dataclass(frozen=True)
class GradientStatistics:
    """Unbiased estimates, each for K subsets of units.

    Attributes:
        inner: (E, E, K) ⟨E g_a, E g_b⟩.
        covariance: (E, E, K) trΣ_ab per row: the covariance of one row's gradients, summed over parameters.
    """

    inner: Tensor
    covariance: Tensor

    def distance_sq(self, a: int, b: int) -> Tensor:
        """‖E g_a − E g_b‖²: (K,)."""
        return self.inner[a, a] + self.inner[b, b] - 2 * self.inner[a, b]


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """(E, M, D), (E, N, D) → (E, E, M, N) in float64; up to `RUN` products are summed in the vectors' own precision."""
    rows, columns = a.flatten(0, 1), b.flatten(0, 1)
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=a.device)
    for x, y in zip(rows.split(RUN, -1), columns.split(RUN, -1), strict=True):
        total += x @ y.T
    return total.view(*a.shape[:2], *b.shape[:2]).permute(0, 2, 1, 3)


def _join_prompts(a: GradientMoments, b: GradientMoments) -> Tensor | None:
    if a.prompts is None and b.prompts is None:
        return None
    if a.prompts is None or b.prompts is None:
        raise ValueError("one of the windows knows its prompts and the other does not: they cannot be merged")
    width = max(a.prompts.shape[1], b.prompts.shape[1])
    return torch.cat([pad_columns(a.prompts, width), pad_columns(b.prompts, width)])


def pad_columns(keys: Tensor, width: int) -> Tensor:
    """Prompt keys (M, R) with −1 up to `width` columns."""
    return torch.nn.functional.pad(keys, (0, max(0, width - keys.shape[1])), value=-1)
