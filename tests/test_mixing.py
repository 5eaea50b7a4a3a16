"""The error of the mixed gradient, its minimum, and the estimate from three gradients by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bvpo.errors import UserError
from bvpo.mixing import (
    AlphaEstimate,
    ErrorTerms,
    Fixed,
    Optimal,
    Schedule,
    estimate_alpha,
    mean_squared_error,
    optimal_alpha,
)
from bvpo.moments import GradientMoments

TERMS = (0.0, 4.0, 0.0, 24.0, 8.0, 2.0)  # ‖b_t‖², ‖b_e‖², ⟨b_t,b_e⟩, trΣ_t, trΣ_e, trΣ_te


def test_the_error_by_hand() -> None:
    """α = ¼, B = 8: ‖¾ b_e‖² = 9/16 · 4 = 2.25; (1/16 · 24 + 9/16 · 8 + 2 · 3/16 · 2) / 8 = (1.5 + 4.5 + 0.75) / 8."""
    assert mean_squared_error(0.25, *TERMS, 8) == 2.25 + 6.75 / 8


def test_the_optimal_weight_by_hand() -> None:
    """B = 1: (4 + 8 − 2) / (4 + 24 + 8 − 4) = 10/32; B = 2: (4 + 3) / (4 + 14) = 7/18; B → ∞: 4/4."""
    assert optimal_alpha(*TERMS, 1) == 10 / 32
    assert optimal_alpha(*TERMS, 2) == 7 / 18
    assert optimal_alpha(*TERMS, 1e12) == pytest.approx(1.0)


@pytest.mark.parametrize("batch_size", [1, 8, 4096])
def test_no_other_weight_has_a_smaller_error(batch_size: int) -> None:
    best = optimal_alpha(*TERMS, batch_size)
    errors = [float(mean_squared_error(k / 1000, *TERMS, batch_size)) for k in range(1001)]
    assert float(mean_squared_error(best, *TERMS, batch_size)) <= min(errors)


def test_degenerate_cases_have_clear_values() -> None:
    same = (0.0, 0.0, 0.0, 3.0, 3.0, 3.0)  # g_t = g_e: every weight is optimal
    assert optimal_alpha(*same, 4) == 0.5
    assert optimal_alpha(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 4) == 1.0  # no noise: the unbiased one
    assert optimal_alpha(0.0, 0.0, 0.0, 3.0, 1.0, 3.0, 4) == 0.0  # no curvature, and the empty end is better
    assert optimal_alpha(9.0, 0.0, 0.0, 1.0, 9.0, 0.0, 1) == 9 / 19
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            optimal_alpha(0.0, bad, 0.0, 1.0, 1.0, 0.0, 4)
    with pytest.raises(ValueError, match="batch size"):
        optimal_alpha(*TERMS, 0)


def test_tensors_are_solved_element_by_element() -> None:
    alphas = torch.as_tensor(optimal_alpha(*TERMS, torch.tensor([1.0, 2.0])))
    assert alphas.tolist() == [10 / 32, 7 / 18]


def test_the_estimate_on_three_gradients_by_hand() -> None:
    """g_t = (3,0), (0,3), (3,3) and g_e = (1,0), (1,0), (1,3), one row each.

    Off the diagonal:  ⟨g_t,g_t⟩: 0, 9, 9 → ‖E g_t‖² = 6      ⟨g_e,g_e⟩: 1, 1, 1 → ‖E g_e‖² = 1
                       ⟨g_t,i , g_e,j⟩: 3 3 | 0 9 | 3 3 → 21/6 = 3.5
    On the diagonal:   (9 + 9 + 18)/3 − 6 = 6 = trΣ_t         (1 + 1 + 10)/3 − 1 = 3 = trΣ_e
                       (3 + 0 + 12)/3 − 3.5 = 1.5 = trΣ_te
    ‖E g_e − E g_t‖² = 6 + 1 − 7 = 0, so α̂_1 = (3 − 1.5) / (6 + 3 − 3) = 1/4, at every batch size.
    """
    trace = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 3.0]])
    empty = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 3.0]])
    moments = GradientMoments.from_gradients(trace, empty)
    terms = ErrorTerms.from_moments(moments, "trace")
    assert [float(t) for t in terms.values()] == pytest.approx([0.0, 0.0, 0.0, 6.0, 3.0, 1.5])
    assert estimate_alpha(moments, 1).value == pytest.approx(0.25)
    assert estimate_alpha(moments, 16).value == pytest.approx(0.25)


def test_the_standard_error_is_the_jackknife_over_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    trace = torch.randn(12, 5, generator=generator).double() + 1
    empty = 0.5 * trace + torch.randn(12, 5, generator=generator)
    steps = torch.arange(12) // 2
    estimate = estimate_alpha(GradientMoments.from_gradients(trace, empty, steps=steps), 4)
    left_out = []
    for step in range(6):
        keep = steps != step
        value = estimate_alpha(GradientMoments.from_gradients(trace[keep], empty[keep]), 4).ratio
        assert value is not None
        left_out.append(value)
    mean = sum(left_out) / 6
    expected = math.sqrt(5 / 6 * sum((value - mean) ** 2 for value in left_out))
    assert estimate.standard_error == pytest.approx(expected, rel=1e-10)
    interval = estimate.interval()
    assert interval is not None and 0 <= interval[0] <= estimate.value <= interval[1] <= 1  # type: ignore[operator]


def test_the_jackknife_knows_which_rows_a_replicate_has() -> None:
    """Units of 4 rows, of which 1 to 4 have a trace pair, 1 to 4 an empty-trace pair, and some both: each replicate is
    the estimate of a window that never had the step, with that window's own share of one-sided rows."""
    generator = torch.Generator().manual_seed(0)
    trace = torch.randn(12, 5, generator=generator).double() + 1
    empty = 0.5 * trace + torch.randn(12, 5, generator=generator)
    sides, steps = torch.randint(1, 5, (2, 12), generator=generator), torch.arange(12) // 2
    both = (sides.sum(0) - 4).clamp(min=0)
    counts = torch.stack([torch.stack([sides[0], both]), torch.stack([both, sides[1]])])
    estimate = estimate_alpha(GradientMoments.from_gradients(trace, empty, rows=counts, steps=steps), 4)
    left_out = []
    for step in range(6):
        keep = steps != step
        moments = GradientMoments.from_gradients(trace[keep], empty[keep], rows=counts[..., keep])
        left_out.append(estimate_alpha(moments, 4).ratio)
    values = torch.tensor(left_out, dtype=torch.float64)
    expected = math.sqrt(5 / 6 * float((values - values.mean()).square().sum()))
    assert estimate.standard_error == pytest.approx(expected, rel=1e-10)


def test_no_window_no_estimate() -> None:
    one = GradientMoments.from_gradients(torch.ones(1, 3), torch.ones(1, 3))
    assert estimate_alpha(one, 8).value is None and "two are needed" in estimate_alpha(one, 8).reason
    two = GradientMoments.from_gradients(torch.eye(2), 2 * torch.eye(2))
    assert estimate_alpha(two, 8).value is not None
    assert estimate_alpha(two, 8).standard_error is None and estimate_alpha(two, 8).interval() is None
    same = GradientMoments.from_gradients(torch.eye(3), torch.eye(3))
    assert estimate_alpha(same, 8).value is None and "not positive" in estimate_alpha(same, 8).reason
    broken = GradientMoments.from_gradients(torch.full((3, 2), math.nan), torch.ones(3, 2))
    assert estimate_alpha(broken, 8).value is None and "not finite" in estimate_alpha(broken, 8).reason
    with pytest.raises(ValueError, match="anchor"):
        estimate_alpha(two, 8, anchor="marginal")


def estimate_of(value: float | None) -> AlphaEstimate:
    return AlphaEstimate(value, None, value, 8, 8, 0.0)


def test_policies() -> None:
    assert Fixed(0.3).weight(5, estimate_of(0.9)) == 0.3
    optimal = Optimal(warmup_steps=2, bounds=(0.1, 0.8), start=0.4)
    assert optimal.weight(1, estimate_of(0.6)) == 0.4  # warming up
    assert optimal.weight(2, None) == optimal.weight(2, estimate_of(None)) == 0.4  # no estimate yet
    assert [optimal.weight(2, estimate_of(v)) for v in (0.0, 0.6, 1.0)] == [0.1, 0.6, 0.8]
    schedule = Schedule(start=0.2, end=0.6, steps=4)
    assert [schedule.weight(step, None) for step in (0, 2, 4, 9)] == pytest.approx([0.2, 0.4, 0.6, 0.6])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(1.2), r"\[0, 1\]"),
        (lambda: Fixed(float("nan")), r"\[0, 1\]"),
        (lambda: Fixed(0.5, window=-1), "window"),
        (lambda: Optimal(bounds=(0.8, 0.2)), "lower, upper"),
        (lambda: Optimal(window=0), "window"),
        (lambda: Schedule(end=2.0), r"\[0, 1\]"),
        (lambda: Schedule(steps=0), "steps"),
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        make()
