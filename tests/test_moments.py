"""U-statistics of a window of units, against loops over stored gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from bvpo.mixing import estimate_alpha, mean_squared_error
from bvpo.moments import EMPTY, TRACE, GradientMoments
from bvpo.monitor import window_metrics
from bvpo.window import GradientWindow


def gradients(units: int, width: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    trace = torch.randn(units, width, generator=generator, dtype=torch.float64) + 0.5
    return trace, 0.3 * trace + torch.randn(units, width, generator=generator, dtype=torch.float64)


def test_equal_units_give_the_sample_covariances() -> None:
    """trΣ per unit is `torch.var` summed over parameters; trΣ_te the sum of the sample covariances."""
    trace, empty = gradients(10)
    statistics = GradientMoments.from_gradients(trace, empty).statistics()
    assert float(statistics.covariance[TRACE, TRACE]) == pytest.approx(float(trace.var(0).sum()), rel=1e-12)
    assert float(statistics.covariance[EMPTY, EMPTY]) == pytest.approx(float(empty.var(0).sum()), rel=1e-12)
    cross = ((trace - trace.mean(0)) * (empty - empty.mean(0))).sum() / 9
    assert float(statistics.covariance[TRACE, EMPTY]) == pytest.approx(float(cross), rel=1e-12)
    pairs = [float(trace[i] @ empty[j]) for i in range(10) for j in range(10) if i != j]
    assert float(statistics.inner[TRACE, EMPTY]) == pytest.approx(sum(pairs) / 90, rel=1e-12)


def test_unequal_units_are_unbiased() -> None:
    """Units of 1, 2 and 5 rows: over 20,000 windows the means are those of the rows (‖m‖² = 3 · 4, trΣ = 3)."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.tensor([1, 2, 5, 1, 2, 5])
    inner, variance = [], []
    for _ in range(20_000 // 10):
        units = torch.stack([(torch.randn(int(n), 3, generator=generator) + 2).mean(0) for n in rows])
        statistics = GradientMoments.from_gradients(units, units, rows=rows).statistics()
        inner.append(float(statistics.inner[TRACE, TRACE]))
        variance.append(float(statistics.covariance[TRACE, TRACE]))
    for values, truth in ((torch.tensor(inner), 12.0), (torch.tensor(variance), 3.0)):
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / len(values) ** 0.5


def test_estimators_over_different_rows_are_unbiased() -> None:
    """Units of 6 rows, of which each estimator has its own: over 4,000 windows the means are those of one row.

    Row gradients are (z + 1, z/2 + e) with z, e standard normal in 3 dimensions: trΣ_t = 3, trΣ_e = 3.75,
    trΣ_te = 1.5, ⟨m_t, m_t⟩ = 3. And the error of a mixture over fresh units is what `mean_squared_error` says.
    """
    generator = torch.Generator().manual_seed(2)
    has_trace = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).double()
    has_empty = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).double()
    both = (has_trace * has_empty).sum(-1)
    counts = torch.stack([torch.stack([has_trace.sum(-1), both]), torch.stack([both, has_empty.sum(-1)])])
    found, means = [], []
    for _ in range(4_000):
        z, e = torch.randn(2, 4, 6, 3, generator=generator, dtype=torch.float64)
        trace = ((z + 1) * has_trace[..., None]).sum(1) / has_trace.sum(-1, keepdim=True)
        empty = ((z / 2 + e) * has_empty[..., None]).sum(1) / has_empty.sum(-1, keepdim=True)
        moments = GradientMoments.from_gradients(trace, empty, rows=counts)
        statistics = moments.statistics()
        found.append(torch.cat([statistics.covariance.flatten()[[0, 3, 1]], statistics.inner.flatten()[[0]]]))
        weight = counts.diagonal().permute(1, 0) / counts.diagonal().sum(0)[:, None]  # the four units as one batch
        means.append(0.3 * (weight[0] @ trace) + 0.7 * (weight[1] @ empty))
    values = torch.stack(found)
    error = values.std(0) / len(values) ** 0.5
    assert bool(((values.mean(0) - torch.tensor([3.0, 3.75, 1.5, 3.0])).abs() < 4 * error).all())
    spread = (torch.stack(means) - 0.3).square().sum(1)  # E of the mixture is 0.3 in each dimension
    overlap = moments.overlap
    terms = 3.0 * overlap[0, 0], 3.75 * overlap[1, 1], 1.5 * overlap[0, 1]
    predicted = mean_squared_error(0.3, 0.0, 0.0, 0.0, *terms, 24)  # 24 rows have one of the pairs or both
    assert abs(float(spread.mean() - predicted)) < 4 * float(spread.std()) / len(spread) ** 0.5


def test_units_that_share_a_prompt_are_never_multiplied() -> None:
    trace, empty = gradients(4)
    prompts = torch.tensor([[1, 2], [3, 4], [5, 1], [7, -1]])  # units 0 and 2 share prompt 1; −1 is padding
    moments = GradientMoments.from_gradients(trace, empty, prompts=prompts)
    pairs = [float(trace[i] @ trace[j]) for i in range(4) for j in range(4) if i != j and {i, j} != {0, 2}]
    assert float(moments.statistics().inner[TRACE, TRACE]) == pytest.approx(sum(pairs) / 10, rel=1e-12)
    assert moments.reused_fraction == pytest.approx(2 / 12)


def test_merging_windows_is_one_window() -> None:
    trace, empty = gradients(9)
    prompts = torch.arange(18).view(9, 2)
    whole = GradientMoments.from_gradients(trace, empty, prompts=prompts, steps=torch.arange(9))
    parts = [
        GradientMoments.from_gradients(trace[cut], empty[cut], prompts=prompts[cut], steps=torch.arange(9)[cut])
        for cut in (slice(0, 2), slice(2, 9))
    ]
    merged = parts[0].merge(parts[1])
    assert torch.allclose(merged.gram, whole.gram, rtol=1e-12)
    assert torch.equal(merged.independent, whole.independent)
    assert merged.steps is not None and merged.steps.tolist() == list(range(9))


def test_merged_units_remain_steps_of_their_own() -> None:
    """Two windows' first units are no common step: the interval is that of one window."""
    trace, empty = gradients(12)
    whole = GradientMoments.from_gradients(trace, empty)
    first, second = (GradientMoments.from_gradients(trace[cut], empty[cut]) for cut in (slice(0, 5), slice(5, 12)))
    found, expected = estimate_alpha(first.merge(second), 8), estimate_alpha(whole, 8)
    assert found.steps == expected.steps == 12
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-9)
    stepped = GradientMoments.from_gradients(trace, empty, steps=torch.arange(12))
    with pytest.raises(ValueError, match="knows its steps and the other does not"):
        whole.merge(stepped)


@pytest.mark.parametrize(("scale", "shift"), [(1e-30, 0.0), (1e22, 0.0), (0.1, 1000.0)])
def test_small_large_and_shifted_gradients_in_fp32_lose_nothing(scale: float, shift: float) -> None:
    trace, empty = ((shift + scale * part).float() for part in gradients(12))
    found = GradientMoments.from_gradients(trace, empty)
    expected = GradientMoments.from_gradients(trace.double(), empty.double())
    torch.testing.assert_close(found.statistics().covariance, expected.statistics().covariance, rtol=1e-9, atol=0)
    assert estimate_alpha(found, 8).value == pytest.approx(estimate_alpha(expected, 8).value, rel=1e-9)


def test_a_window_without_an_estimators_rows_says_so() -> None:
    trace, empty = gradients(6)
    counts = torch.ones(2, 2, 6)
    counts[1], counts[:, 1] = 0, 0
    found = estimate_alpha(GradientMoments.from_gradients(trace, 0 * empty, rows=counts), 8)
    assert found.value is None and "no row of one of the estimators" in found.reason


def test_gradients_of_zero_have_no_noise_scale() -> None:
    metrics = window_metrics(GradientMoments.from_gradients(torch.zeros(4, 3), torch.zeros(4, 3)))
    assert metrics["variance/trace"] == 0 and math.isnan(metrics["gradient/noise_scale_trace"])


def test_the_window_keeps_the_last_units_and_their_gram_matrix() -> None:
    trace, empty = gradients(11)
    window = GradientWindow(capacity=6, widths=[7], dtype=torch.float64)
    for step, cut in enumerate((slice(0, 4), slice(4, 8), slice(8, 11))):
        units = len(trace[cut])
        keys = torch.arange(11)[cut, None]
        window.update(torch.stack([trace, empty])[:, cut], torch.full((units,), 2), keys, step)
    held = window.moments()
    order = held.prompts[:, 0].argsort()  # type: ignore[index]  # the ring starts anywhere
    last = GradientMoments.from_gradients(trace[5:], empty[5:], rows=torch.full((6,), 2))
    assert torch.allclose(held.gram[:, :, order][..., order], last.gram, rtol=1e-12)
    assert held.steps[order].tolist() == [1, 1, 1, 2, 2, 2] and held.counts[0, 0].tolist() == [2] * 6
    assert torch.allclose(window.compute(), last.statistics().covariance[..., 0], rtol=1e-12)


def test_the_window_survives_a_checkpoint_and_a_cast() -> None:
    trace, empty = gradients(5)
    window = GradientWindow(capacity=8, widths=[7])
    window.update(torch.stack([trace, empty]), torch.ones(5), torch.arange(10).view(5, 2), 3)
    restored = GradientWindow(capacity=8, widths=[7])
    restored.load_state_dict(copy.deepcopy(window.state_dict()))
    assert torch.equal(restored.moments().gram, window.moments().gram)
    window.to(torch.bfloat16)
    assert window.grams.dtype == torch.float64 and torch.equal(restored.moments().gram, window.moments().gram)


def test_an_update_larger_than_the_window_keeps_its_last_units() -> None:
    trace, empty = gradients(9)
    window = GradientWindow(capacity=4, widths=[7], dtype=torch.float64)
    window.update(torch.stack([trace, empty]), torch.ones(9), torch.arange(9)[:, None], 0)
    assert window.moments().prompts.flatten().tolist() == [5, 6, 7, 8]  # type: ignore[union-attr]


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        GradientMoments.from_gradients(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match="no units"):
        GradientMoments.from_gradients(torch.ones(0, 2), torch.ones(0, 2))
    with pytest.raises(ValueError, match="no unit"):
        GradientWindow(4, [4]).moments()
