"""What a run logs of its windows: against the error's own definition, and worked arithmetic."""

from __future__ import annotations

import pytest
import torch

from bvpo.anchor import AnchorQuality
from bvpo.gradients import Group, Sketch
from bvpo.mixing import Fixed, Optimal
from bvpo.moments import GradientMoments
from bvpo.monitor import GradientMonitor, Units, window_metrics

GROUPS = [Group("a", [0], Sketch(8)), Group("b", [1], Sketch(8))]


def monitor_of(groups: list[Group], per_group: bool) -> GradientMonitor:
    """64 units of two groups: in `a` the trace gradient is noisy, in `b` the empty-trace one, biased in both."""
    noise = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    few, much = torch.tensor([0.3, 3.0]), torch.tensor([3.0, 0.3])
    trace, empty = 1.0 + much.repeat_interleave(8) * noise[0], 1.5 + few.repeat_interleave(8) * noise[1]
    monitor = GradientMonitor(Optimal(warmup_steps=0, per_group=per_group), groups, 64)
    monitor.resume(batch_rows=8)
    counts = torch.ones(2, 2, 64, dtype=torch.float64)
    monitor.update(Units(torch.stack([trace, empty]), counts, torch.arange(64)[:, None]), step=0)
    return monitor


def test_the_groups_own_weights_have_the_least_error() -> None:
    """Which is far below that of one α for both: the ratio is 1 at them, and above it anywhere else."""
    monitor = monitor_of(GROUPS, per_group=True)
    own = [estimate.value for estimate in monitor.group_estimates if estimate is not None]
    assert own[0] is not None and own[1] is not None and own[0] < 0.4 and own[1] > 0.6
    assert monitor.weights(1) == own
    best = monitor.metrics(monitor.weights(1))
    assert best["mixing/mse_ratio"] == 1.0 and best["mixing/mse_ratio_per_group"] < 0.9
    common = monitor.metrics([best["mixing/alpha_estimate"]] * 2)
    assert abs(common["mixing/mse_ratio"] * best["mixing/mse_ratio_per_group"] - 1) < 1e-9
    assert all(monitor.metrics([a, b])["mixing/mse_ratio"] > 1 for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0))


def test_one_group_is_measured_against_the_one_estimate() -> None:
    monitor = monitor_of([Group("all", [0, 1], Sketch(16))], per_group=False)
    assert monitor.metrics(monitor.weights(1))["mixing/mse_ratio"] == 1.0
    assert monitor.metrics([0.0])["mixing/mse_ratio"] > 1


def test_a_refused_anchor_leaves_what_the_window_knows_of_reused_prompts() -> None:
    """Three good anchors of one unit each, two of them with prompt 1: 2 of 6 products are left out, refused or not."""
    groups = [Group("all", [0], Sketch(4))]
    monitor = GradientMonitor(Optimal(window=4, anchor="marginal", anchor_every=1), groups, 1)
    monitor.resume(batch_rows=8)
    good, bad = (AnchorQuality(torch.tensor([size, 1.0, 0.1, 1.0])) for size in (4.0, 1.5))
    counts = torch.ones(3, 3, 1, dtype=torch.float64)
    for step, (prompt, quality) in enumerate([(1, good), (2, good), (1, good), (3, bad)]):
        gradients = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(step))
        if quality is bad:
            with pytest.warns(UserWarning, match=r"step 3: the marginal anchor is refused \(1 so far\): effective"):
                monitor.update(Units(gradients, counts, torch.tensor([[prompt]])), step, quality)
            assert monitor.estimate is not None and monitor.estimate.value is None
        else:
            monitor.update(Units(gradients, counts, torch.tensor([[prompt]])), step, quality)
    assert monitor.metrics([0.5])["mixing/reused_fraction"] == pytest.approx(1 / 3)


@pytest.mark.filterwarnings("ignore:.*the marginal anchor is refused")
def test_what_needs_no_anchor_is_known_without_a_good_one() -> None:
    """Three units of one prompt each, the last one met before: variances are the trace anchor's, the bias is absent."""
    groups, counts = [Group("all", [0], Sketch(4))], torch.ones(3, 3, 1, dtype=torch.float64)
    monitors = [GradientMonitor(Fixed(window=4, anchor=anchor), groups, 1) for anchor in ("trace", "marginal")]
    bad = AnchorQuality(torch.tensor([1.5, 1.0, 0.1, 1.0]))
    for monitor, quality in zip(monitors, (None, bad), strict=True):
        monitor.resume(batch_rows=8)
        for step, prompt in enumerate((1, 2, 1)):
            gradients = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(step))
            monitor.update(Units(gradients, counts, torch.tensor([[prompt]])), step, quality)
    trace, refused = (monitor.metrics([0.3]) for monitor in monitors)
    for name in ("variance/mixed", "variance/trace", "mixing/reused_fraction"):
        assert refused[name] == trace[name] != 0
    assert "bias/empty_sq" in trace and "bias/empty_sq" not in refused


def test_pairs_a_row_are_counted_over_the_window_where_they_differ() -> None:
    """Two units of 4 and 6 rows: 3 + 5 trace pairs, 2 + 3 empty-trace pairs, 1 + 2 rows with both, 10 rows in all."""
    vectors = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    table = [[[3, 5], [1, 2]], [[1, 2], [2, 3]]]
    found = window_metrics(GradientMoments.from_gradients(*vectors, rows=torch.tensor(table)))
    assert {name: value for name, value in found.items() if name.startswith("pairs/")} == {
        "pairs/trace": 0.8,
        "pairs/empty": 0.5,
        "pairs/both": 0.3,
    }
    assert not any(name.startswith("pairs/") for name in window_metrics(GradientMoments.from_gradients(*vectors)))
