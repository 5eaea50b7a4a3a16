"""Gradient statistics from a window of units: everything follows from the units' Gram matrix.

A *unit* is n rows' mean trace gradient and mean empty-trace gradient. Units must be exchangeable: each a random subset
of prompts. With m_a = E g_a and Σ_ab the covariance of one row's gradients, for two units i ≠ j that share no prompt

    E⟨g_a,i , g_b,j⟩ = ⟨m_a, m_b⟩            E⟨g_a,i , g_b,i⟩ = ⟨m_a, m_b⟩ + trΣ_ab / n_i

(where the estimators average over n_a and n_b rows with n_ab in common, trΣ_ab · n_ab / (n_a n_b)), so both sides are
means over entries of the Gram matrix: U-statistics, unbiased, and possibly negative.

Shapes: M units, E estimators (trace, empty, and the anchor where there is one), D numbers a gradient or its sketch,
K jackknife replicates, R rows a unit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

TRACE, EMPTY, ANCHOR = 0, 1, 2
RUN = 8192  # an fp32 sum of so many products is right to about 1e-6; a float64 copy of the window costs more than it


@dataclass(frozen=True)
class GradientMoments:
    """A window of units and its Gram matrix. Build it with `from_gradients`; join windows with `merge`.

    Attributes:
        vectors: (E, M, D) gradients of the units, or their sketches.
        gram: (E, E, M, M) float64 inner products.
        counts: (E, E, M) float64 rows of each unit: n_ab, that both estimators average over; n_a on the diagonal.
        prompts: (M, R) int64 prompt keys, −1 where a unit has fewer; None where all units have prompts of their own.
        steps: (M,) int64 optimizer step of each unit: the jackknife leaves out a step at a time. None where each unit
            is a step of its own.
    """

    vectors: Tensor
    gram: Tensor
    counts: Tensor
    prompts: Tensor | None
    steps: Tensor | None

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
            rows: (M,) rows a unit; without it a unit counts as one row, and variances are per unit. (E, E, M) where the
                estimators average over different rows: see `counts`.
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
            inner_products(vectors.double(), vectors.double()).cpu(),
            _counts(rows, len(kinds), units),
            prompts,
            steps,
        )

    def merge(self, other: GradientMoments) -> GradientMoments:
        """The moments of both windows' units together: ranks, stretches of a run, notebooks.

        Raises:
            ValueError: One window has anchor gradients, prompts or steps, and the other has none.
        """
        if len(self.vectors) != len(other.vectors):
            raise ValueError("one of the windows has anchor gradients and the other has none: they cannot be merged")
        cross = inner_products(self.vectors.double(), other.vectors.double()).cpu()
        upper = torch.cat([self.gram, cross], -1)
        lower = torch.cat([cross.permute(1, 0, 3, 2), other.gram], -1)
        return replace(
            self,
            vectors=torch.cat([self.vectors, other.vectors], 1),
            gram=torch.cat([upper, lower], -2),
            counts=torch.cat([self.counts, other.counts], -1),
            prompts=_join("prompts", *_as_wide(self.prompts, other.prompts)),
            steps=_join("steps", self.steps, other.steps),
        )

    def __len__(self) -> int:
        return self.vectors.shape[1]

    @property
    def jackknifed(self) -> Tensor:
        """(M,) which of the jackknife's steps each unit is left out with."""
        return torch.arange(len(self)) if self.steps is None else self.steps

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

    @property
    def overlap(self) -> Tensor:
        """(E, E) N n_ab / (n_a n_b) over the window's N rows: what trΣ_ab / B becomes in a batch of B such rows.

        1 where every row has both pairs; 0 where the estimators have no row in common.
        """
        return self.statistics().overlap[..., 0]

    def statistics(self, keep: Tensor | None = None) -> GradientStatistics:
        """The U-statistics of all units, or of K subsets at once: `keep` is a (K, M) indicator."""
        return self._of_all if keep is None else self._of_subsets(keep)

    @cached_property
    def _of_all(self) -> GradientStatistics:
        return self._of_subsets(torch.ones(1, len(self), dtype=torch.float64))

    def _of_subsets(self, keep: Tensor) -> GradientStatistics:
        own = self.counts.diagonal().T  # (E, M) n_a
        weight = own[:, None, :, None] * own[:, None, :] * self.independent  # (E, E, M, M)
        total = torch.einsum("km,abmn,kn->abk", keep, weight, keep)
        inner = torch.einsum("km,abmn,kn->abk", keep, weight * self.gram, keep) / total
        shares = self.counts > 0
        scale = own[:, None] * own / torch.where(shares, self.counts, torch.inf)  # (E, E, M): n_a n_b / n_ab
        scaled = scale * self.gram.diagonal(dim1=-2, dim2=-1)
        covariance = (scaled @ keep.T - inner * (scale @ keep.T)) / (shares.double() @ keep.T)
        rows = self.counts @ keep.T  # (E, E, K)
        sides = rows.diagonal().T  # (E, K): n_a
        either = sides[TRACE] + sides[EMPTY] - rows[TRACE, EMPTY]
        return GradientStatistics(inner, covariance, either * rows / (sides[:, None] * sides))

    def leave_one_step_out(self) -> Tensor:
        """(K, M) indicators of the jackknife's replicates: one for each step, without its units."""
        return torch.ne(self.jackknifed, self.jackknifed.unique()[:, None]).double()


@dataclass(frozen=True)
class GradientStatistics:
    """Unbiased estimates, each for K subsets of units.

    Attributes:
        inner: (E, E, K) ⟨E g_a, E g_b⟩.
        covariance: (E, E, K) trΣ_ab per row: the covariance of one row's gradients, summed over parameters; NaN where
            no row has both.
        overlap: (E, E, K) `GradientMoments.overlap` of each subset's own rows.
    """

    inner: Tensor
    covariance: Tensor
    overlap: Tensor

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


def _counts(rows: Tensor | None, estimators: int, units: int) -> Tensor:
    """(E, E, M) from the rows a unit."""
    counts = torch.ones(units) if rows is None else torch.as_tensor(rows)
    return counts.double().expand(estimators, estimators, units).clone()


def _join(name: str, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """What both windows know of their units, or neither."""
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise ValueError(f"one of the windows knows its {name} and the other does not: they cannot be merged")
    return torch.cat([a, b])


def _as_wide(a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Prompt keys with as many columns in both windows."""
    if a is None or b is None:
        return a, b
    width = max(a.shape[1], b.shape[1])
    return pad_columns(a, width), pad_columns(b, width)


def pad_columns(keys: Tensor, width: int) -> Tensor:
    """Prompt keys (M, R) with −1 up to `width` columns."""
    return torch.nn.functional.pad(keys, (0, max(0, width - keys.shape[1])), value=-1)
