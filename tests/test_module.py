"""The training step: equivalent splits, statistics against a naive computation, and what must never change."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor

from bvpo import passes
from bvpo.batches import PairBatch, SequenceBatch
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.losses import DPO
from bvpo.mixing import AlphaEstimate, Fixed, MixingPolicy, Optimal, mean_squared_error, optimal_alpha
from bvpo.module import BVPO
from bvpo.optimization import learning_rate_scale
from bvpo.packed import is_packed
from bvpo.policy import sequence_logps
from bvpo.records import trains
from bvpo.reference import LiveReference
from tests.conftest import EOS, make_rows, write_rows


class Observer(L.Callback):
    """Keeps what a run shows: logged values, mixed gradients, and each microbatch's own gradients by plain autograd."""

    def __init__(self, naive: bool = False) -> None:
        self.naive = naive
        self.metrics: list[dict[str, float]] = []
        self.mixed: list[Tensor] = []
        self.units: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: PairBatch, batch_idx: int) -> None:
        if self.naive:
            self.units.append((unit_gradient(module, batch.trace), unit_gradient(module, batch.empty)))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.policy.parameters()]
        self.mixed.append(torch.cat([gradient.flatten().clone() for gradient in gradients]))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.closes_step:
            self.metrics.append(module.metrics)


def unit_gradient(module: BVPO, sequences: Any) -> Tensor:
    """Flat gradient of the mean loss over one microbatch's pairs."""
    policy = copy.deepcopy(module.policy)
    assert module.reference is not None
    losses = module.loss(sequence_logps(policy, sequences), module.reference.logps(sequences))
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), list(policy.parameters()))])


@pytest.fixture
def train(llama_folder: Path, tmp_path: Path) -> Callable[..., tuple[BVPO, Observer]]:
    """Trains the random Llama on rows, without files, and returns module and observer."""

    def run(
        rows: list[dict[str, Any]],
        batch_size: int = 4,
        accumulate: int = 1,
        steps: int = 5,
        precision: Any = "32-true",
        naive: bool = False,
        data_options: dict[str, Any] | None = None,
        callbacks: Sequence[L.Callback] = (),
        **options: Any,
    ) -> tuple[BVPO, Observer]:
        source = write_rows(tmp_path / f"rows_{len(list(tmp_path.iterdir()))}.jsonl", rows)
        observer = Observer(naive)
        defaults = {"learning_rate": 1e-3, "beta": 0.5, "clip": 0.0, "accumulate": accumulate}
        module = BVPO(policy=str(llama_folder), **{**defaults, **options})
        data = PairData(
            str(source),
            batch_size=batch_size,
            accumulate=accumulate,
            tokenizer=str(llama_folder),
            **(data_options or {}),
        )
        L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[observer, *callbacks],
        ).fit(module, datamodule=data)
        return module, observer

    return run


Train = Callable[..., tuple[BVPO, Observer]]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_any_split_of_an_optimizer_batch_trains_the_same(train: Train, batch_size: int, accumulate: int) -> None:
    """Losses, mixed gradient and weights after 5 steps; 3 × 3 rows beside one batch of 9, the others beside 8."""
    rows, whole_batch = make_rows(40), batch_size * accumulate
    whole, one = train(rows, whole_batch, 1)
    split, many = train(rows, batch_size, accumulate)
    assert len(one.metrics) == len(many.metrics) == 5
    for a, b in zip(one.metrics, many.metrics, strict=True):
        for key in ("loss/trace", "loss/empty", "loss/mixed", "logp/trace_chosen_sum", "logp/empty_rejected_mean"):
            assert b[key] == pytest.approx(a[key], rel=1e-5)
    for first, second in zip(one.mixed, many.mixed, strict=True):
        assert relative(second, first) < 1e-5
    flat = [torch.nn.utils.parameters_to_vector(m.policy.parameters()) for m in (split, whole)]
    assert relative(*flat) < 1e-5


@pytest.mark.parametrize("reference_logps", ["live", "cached"])
def test_packing_changes_how_a_batch_is_computed_and_nothing_else(train: Train, reference_logps: str) -> None:
    """Losses, statistics and mixed gradient of packed and padded batches, over two steps."""
    options = {"naive": True, "steps": 2, "reference_logps": reference_logps}
    (packed, one), (padded, two) = (train(make_rows(16), 4, 2, packing=how, **options) for how in ("auto", "off"))
    assert is_packed(packed.policy) and not is_packed(padded.policy)
    for a, b in zip(one.metrics, two.metrics, strict=True):
        for key in ("loss/trace", "loss/empty", "variance/trace", "variance/covariance", "gradient/cosine"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    assert relative(one.mixed[-1], two.mixed[-1]) < 1e-4


def test_activation_checkpointing_gives_the_same_gradient(train: Train) -> None:
    """Bit for bit: what is computed again is computed alike."""
    (_, plain), (_, again) = (train(make_rows(8), 4, 2, steps=1, activation_checkpointing=on) for on in (False, True))
    assert torch.equal(plain.mixed[0], again.mixed[0])


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_a_token_budget_changes_how_a_batch_is_computed_and_nothing_else(train: Train, max_tokens: int) -> None:
    """Losses, mixed gradient, units and α̂; at 1 token each pair goes through the model alone."""
    rows = make_rows(32)
    (_, whole), (_, cut) = (
        train(rows, 4, 2, steps=3, data_options={"max_tokens": most}) for most in (None, max_tokens)
    )
    for a, b in zip(whole.metrics, cut.metrics, strict=True):
        for key in ("loss/trace", "loss/empty", "logp/empty_chosen_sum", "variance/trace", "gradient/mixed_norm"):
            assert b.get(key) == (pytest.approx(a[key], rel=1e-4) if key in a else None)
    assert relative(cut.mixed[-1], whole.mixed[-1]) < 1e-4


class Validated(L.Callback):
    """What validation logs, pass by pass."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.metrics.append(
                {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("validation/")}
            )


def validated(folder: Path, source: Path, steps: int = 3, max_tokens: int | None = None, **options: Any) -> Validated:
    """A fit at a learning rate of 0 that validates behind every step, on rows of its own."""
    seen = Validated()
    L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        val_check_interval=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen],
        **{"num_sanity_val_steps": 0, **options},
    ).fit(
        BVPO(policy=str(folder), learning_rate=0.0),
        datamodule=PairData(str(source), str(source), tokenizer=str(folder), max_tokens=max_tokens),
    )
    return seen


@pytest.mark.parametrize("options", [{"limit_val_batches": 1}, {"limit_val_batches": 3}, {"num_sanity_val_steps": 1}])
def test_every_validation_is_of_the_same_rows(llama_folder: Path, pairs_file: Path, options: dict[str, int]) -> None:
    first, *others = validated(llama_folder, pairs_file, **options).metrics
    assert first and others == [first, first]
    if "num_sanity_val_steps" in options:  # then it is of all rows
        assert first == validated(llama_folder, pairs_file, steps=1).metrics[0]


def test_a_token_budget_bounds_validation_and_changes_no_mean(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means over pairs, rounded in another order; a part has 100 tokens, padding included, or one pair."""
    rows = make_rows(10)
    rows[3]["chosen"] = "<think> " + "w3 " * 60 + "</think> w1" + EOS
    source, sizes = write_rows(tmp_path / "rows.jsonl", rows), []

    def watched(model: Any, part: SequenceBatch) -> Any:
        sizes.append((part.input_ids.numel(), part.pairs))
        return sequence_logps(model, part)

    (whole,) = validated(llama_folder, source, steps=1).metrics
    monkeypatch.setattr(passes, "sequence_logps", watched)
    (cut,) = validated(llama_folder, source, steps=1, max_tokens=100).metrics
    assert whole.keys() == cut.keys() and all(size <= 100 or pairs == 1 for size, pairs in sizes)
    for name, value in whole.items():
        assert cut[name] == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_the_last_optimizer_batch_of_an_epoch_is_smaller_and_weighted_right(train: Train) -> None:
    """10 rows in batches of 8: the second step averages over 2 rows, one microbatch of 2 or two of 1."""
    rows = make_rows(10)
    _, one = train(rows, 8, 1, steps=2)
    _, many = train(rows, 1, 8, steps=2)
    assert relative(many.mixed[1], one.mixed[1]) < 1e-5


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_statistics_equal_a_naive_computation_from_stored_gradients(train: Train, alpha: float) -> None:
    """Float64, gradients kept exactly: 5 steps of 4 microbatches of 2 rows, all twenty units in the window."""
    module, seen = train(make_rows(40), 2, 4, precision="64-true", naive=True, mixing=Fixed(alpha), sketch_size=10**6)
    trace, empty = (torch.stack(gradients) for gradients in zip(*seen.units, strict=True))
    last, units, rows, batch = seen.metrics[-1], 20, 2, 8

    def mean_product(a: Tensor, b: Tensor) -> float:
        return sum(float(a[i] @ b[j]) for i in range(units) for j in range(units) if i != j) / (units * (units - 1))

    tt, ee, te = mean_product(trace, trace), mean_product(empty, empty), mean_product(trace, empty)
    variance_t, variance_e = rows * float(trace.var(0).sum()), rows * float(empty.var(0).sum())
    covariance = rows * (float((trace * empty).sum(1).mean()) - te)
    terms = (0.0, tt + ee - 2 * te, 0.0, variance_t, variance_e, covariance)
    best = float(optimal_alpha(*terms, batch))
    expected = {
        "variance/trace": variance_t,
        "variance/empty": variance_e,
        "variance/covariance": covariance,
        "variance/mixed": float(mean_squared_error(alpha, 0, 0, 0, *terms[3:], batch)),
        "bias/empty_sq": terms[1],
        "gradient/noise_scale_trace": variance_t / tt,
        "gradient/noise_scale_empty": variance_e / ee,
        "mixing/alpha_estimate": best,
        "mixing/mse_ratio": float(mean_squared_error(alpha, *terms, batch) / mean_squared_error(best, *terms, batch)),
    }
    step = [units[-4:].mean(0) for units in (trace, empty)]
    expected["gradient/trace_norm"], expected["gradient/empty_norm"] = (float(g.norm()) for g in step)
    expected["gradient/cosine"] = float(step[0] @ step[1] / step[0].norm() / step[1].norm())
    mixed = alpha * step[0] + (1 - alpha) * step[1]
    expected["gradient/mixed_norm"] = float(mixed.norm())
    for key, value in expected.items():
        assert last[key] == pytest.approx(value, rel=1e-8), key
    assert relative(seen.mixed[-1], mixed) < 1e-9
    assert last["mixing/mse_ratio"] >= 1
    assert module.monitor is not None and module.monitor.estimate is not None
    assert module.monitor.estimate.standard_error is not None


def one_sided(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every five rows, the second has no empty-trace pair and the fourth no trace pair."""
    without = {1: ("empty_chosen", "empty_rejected"), 3: ("prompt", "chosen", "rejected")}
    return [{k: v for k, v in row.items() if k not in without.get(i % 5, ())} for i, row in enumerate(rows)]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(10, 1), (5, 2), (1, 10)])
def test_each_estimator_averages_over_its_own_rows(train: Train, batch_size: int, accumulate: int) -> None:
    """10 rows: 6 pairs of pairs, 2 without an empty-trace pair, 2 without a trace pair, whatever the microbatches."""
    rows, keep = one_sided(make_rows(10)), {"on_one_sided": "keep"}
    _, seen = train(rows, batch_size, accumulate, steps=1, data_options=keep, mixing=Fixed(0.3), beta=0.5)
    parts = [
        train([row for row in make_rows(10) if row["prompt_id"] in ids], 8, steps=1, mixing=Fixed(alpha))[1].mixed[0]
        for alpha, name in ((1.0, "chosen"), (0.0, "empty_chosen"))
        for ids in [{row["prompt_id"] for row in rows if name in row}]
    ]
    assert relative(seen.mixed[0], 0.3 * parts[0] + 0.7 * parts[1]) < 1e-5


def test_a_step_without_rows_of_one_estimator_takes_the_other(train: Train) -> None:
    rows = [{k: v for k, v in row.items() if not k.startswith("empty_")} for row in make_rows(8)]
    _, seen = train(rows, 4, 2, steps=1, data_options={"on_one_sided": "keep"}, mixing=Fixed(0.3))
    _, alone = train(make_rows(8), 4, 2, steps=1, mixing=Fixed(1.0))
    assert seen.metrics[0]["mixing/alpha"] == 1.0 and relative(seen.mixed[0], alone.mixed[0]) < 1e-5
    assert "mixing/alpha_estimate" not in seen.metrics[0] and "loss/empty" not in seen.metrics[0]


class Weights(L.Callback):
    """The policy's weights behind each optimizer step."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kept.append(torch.nn.utils.parameters_to_vector(module.policy.parameters()).detach().clone())


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize(("alpha", "gone", "kind"), [(1.0, "", "empty-trace"), (0.0, "empty_", "trace")])
def test_pairs_without_a_weight_train_nothing(
    train: Train, recwarn: pytest.WarningsRecorder, alpha: float, gone: str, kind: str, window: int
) -> None:
    """Steps of one row, every other row with the other kind of pair alone: momentum and weight decay move nothing
    either, α is the policy's own, the schedule goes on, and the statistics have seen the step."""
    columns = {f"{gone}{name}" for name in ("prompt", "chosen", "rejected")}
    rows = [{k: v for k, v in row.items() if i % 2 == 0 or k not in columns} for i, row in enumerate(make_rows(8))]
    weights = Weights()
    module, seen = train(
        rows,
        1,
        steps=8,
        data_options={"on_one_sided": "keep"},
        callbacks=[weights],
        mixing=Fixed(alpha, window=window),
        weight_decay=0.1,
    )
    still = [bool(torch.equal(*pair)) for pair in pairwise(weights.kept)]
    assert still == [m["gradient/mixed_norm"] == 0 for m in seen.metrics[1:]] and 3 <= sum(still) <= 4
    assert {m["mixing/alpha"] for m in seen.metrics} == {alpha}
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [m["learning_rate"] for m in seen.metrics] == pytest.approx(expected)
    told = [str(w.message) for w in recwarn if "leave the policy as it is" in str(w.message)]
    assert len(told) == 1 and f"its rows have {kind} pairs alone, to which α = {alpha:g} gives no weight" in told[0]
    if window:
        assert module.monitor is not None and int(module.monitor.window.seen) == 8


def test_which_batches_train_under_which_weights() -> None:
    """(trace, empty) pairs; with weights of their own, one group that trains is enough."""
    assert trains([0.0], (1, 1)) and trains([1.0], (1, 1)) and trains([0.5], (2, 0)) and trains([0.5], (0, 2))
    assert trains([0.0, 0.2], (2, 0)) and trains([1.0, 0.8], (0, 2))
    assert not trains([0.0, 0.0], (2, 0)) and not trains([1.0, 1.0], (0, 2))


def test_the_estimate_is_for_the_batch_that_the_optimizer_sees(train: Train) -> None:
    """6 rows in batches of up to 16 are batches of 6: the mixed gradient's variance is that of 6 rows."""
    module, seen = train(make_rows(6), 2, 8, steps=1, mixing=Fixed(1.0))
    assert module.batch_rows == 6
    assert seen.metrics[0]["variance/mixed"] == pytest.approx(seen.metrics[0]["variance/trace"] / 6)


class Slow(L.Callback):
    """A slow optimizer step, and the clock and tokens of each step."""

    def __init__(self) -> None:
        self.started, self.clock, self.tokens = 0.0, 0.0, 0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: PairBatch, batch_idx: int) -> None:
        self.started = time.perf_counter()
        self.tokens = int(batch.trace.lengths.sum() + batch.empty.lengths.sum())

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        time.sleep(0.3)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock = time.perf_counter() - self.started


def test_the_rate_is_of_the_whole_step(train: Train) -> None:
    slow = Slow()
    _, seen = train(make_rows(8), steps=1, callbacks=[slow])
    assert 0.3 <= slow.tokens / seen.metrics[0]["tokens_per_second"] <= slow.clock


def test_a_weight_uses_only_the_past(train: Train) -> None:
    """Rows that come in step 3 or later are changed: α of steps 0 to 3 stays, α of step 4 does not."""
    rows = make_rows(40)
    data = PairData(batch_size=2, accumulate=2)
    data.rows = {"train": rows}  # type: ignore[dict-item]
    order = [row for microbatch in data.sampler() for row in microbatch.rows]
    changed = list(rows)
    for row in order[12:]:
        changed[row] = {**make_rows(1, seed=row + 100)[0], "prompt_id": rows[row]["prompt_id"]}
    policy = Optimal(warmup_steps=0, window=4)
    weights = [
        [m["mixing/alpha"] for m in train(given, 2, 2, steps=6, mixing=policy)[1].metrics] for given in (rows, changed)
    ]
    assert weights[0][:4] == weights[1][:4] and weights[0][4] != weights[1][4]
    assert weights[0][0] == 0.5 and len(set(weights[0][1:])) > 1


def test_the_weight_of_a_step_is_the_estimate_logged_before_it(train: Train) -> None:
    class Recorder(MixingPolicy):
        def weight(self, step: int, estimate: AlphaEstimate | None) -> float:
            given.append(estimate)
            return 0.5

    given: list[AlphaEstimate | None] = []
    _, seen = train(make_rows(40), 2, 2, mixing=Recorder())
    assert given[0] is None
    estimates = [estimate.value for estimate in given[1:] if estimate is not None]
    assert estimates == [m["mixing/alpha_estimate"] for m in seen.metrics[:-1]]


def test_step_zero_is_ln_2_with_margins_of_zero(train: Train) -> None:
    _, seen = train(make_rows(16), 8, 1, steps=1)
    first = seen.metrics[0]
    for branch in ("trace", "empty"):
        assert first[f"loss/{branch}"] == pytest.approx(math.log(2), abs=1e-6)
        assert first[f"reward/{branch}_margin"] == pytest.approx(0.0, abs=1e-6)


def test_the_reference_never_changes_and_is_no_part_of_the_module(train: Train, llama_folder: Path) -> None:
    module, _ = train(make_rows(16), learning_rate=1e-2)
    assert isinstance(module.reference, LiveReference)
    fresh = BVPO(policy=str(llama_folder))
    fresh.configure_model()
    for name, parameter in module.reference.model.named_parameters():
        assert torch.equal(parameter, fresh.policy.get_parameter(name))
        assert parameter.grad is None and not parameter.requires_grad
    assert not module.reference.model.training
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "monitor"}


def test_a_step_lowers_the_loss_of_its_own_batch(train: Train) -> None:
    """A sign error in loss, weight or optimizer would raise it."""
    _, seen = train(make_rows(8), 8, 1, steps=4, learning_rate=1e-3)
    losses = [m["loss/mixed"] for m in seen.metrics]
    assert losses == sorted(losses, reverse=True)
    assert seen.metrics[-1]["reward/trace_margin"] > 0 < seen.metrics[-1]["reward/empty_margin"]


def test_without_statistics_an_estimator_of_weight_zero_is_not_run(train: Train) -> None:
    _, bare = train(make_rows(16), mixing=Fixed(1.0, window=0))
    _, full = train(make_rows(16), mixing=Fixed(1.0))
    assert "loss/empty" not in bare.metrics[0] and "mixing/alpha_estimate" not in bare.metrics[-1]
    assert all(torch.equal(a, b) for a, b in zip(bare.mixed, full.mixed, strict=True))


def test_clipping_scales_the_mixture_and_not_the_statistics(train: Train) -> None:
    _, free = train(make_rows(16), steps=1)
    _, clipped = train(make_rows(16), steps=1, clip=0.1)
    assert float(clipped.mixed[0].norm()) == pytest.approx(0.1, rel=1e-4)
    assert relative(clipped.mixed[0] / clipped.mixed[0].norm(), free.mixed[0] / free.mixed[0].norm()) < 1e-6
    for key in ("gradient/mixed_norm", "gradient/trace_norm"):
        assert clipped.metrics[0][key] == pytest.approx(free.metrics[0][key], rel=1e-6)


class Breaking(DPO):
    """A loss whose gradient is not finite in chosen calls."""

    calls: ClassVar[int] = 0
    broken: ClassVar[set[int]] = set()

    def __call__(self, policy: Any, reference: Any) -> Tensor:
        Breaking.calls += 1
        losses = super().__call__(policy, reference)
        return losses * math.nan if Breaking.calls in Breaking.broken else losses


def test_a_gradient_that_is_not_finite_skips_the_step_and_leaves_the_window_clean(train: Train) -> None:
    """Calls 1 and 2 are step 0; call 3 is the trace loss of what would be step 1."""
    Breaking.calls, Breaking.broken = 0, {3}
    with pytest.warns(UserWarning, match=r"step 1 skipped \(1 so far\): gradient/trace_norm = nan"):
        module, seen = train(make_rows(32), loss=Breaking(), steps=3)
    assert module.skips.total == 1 and len(seen.mixed) == 3
    assert module.monitor is not None
    assert module.monitor.window.moments().vectors.isfinite().all() and int(module.monitor.window.seen) == 3
    assert all(p.isfinite().all() for p in module.policy.parameters())


def test_ten_skipped_steps_in_a_row_end_the_fit(train: Train) -> None:
    Breaking.calls, Breaking.broken = 0, set(range(100))
    with pytest.warns(UserWarning), pytest.raises(UserError, match="10 optimizer steps in a row"):
        train(make_rows(64), loss=Breaking(), steps=20)


def test_bf16_true_keeps_the_rotary_frequencies(train: Train) -> None:
    module, _ = train(make_rows(8), steps=1, precision="bf16-true")
    assert module.policy.dtype == torch.bfloat16
    assert module.policy.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_learning_rate_schedule() -> None:
    """A warm-up of 4 of 20 steps, then 16 steps down to 0."""
    scales = [learning_rate_scale(step, 20, 4, "linear") for step in range(21)]
    assert scales[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and scales[12] == 0.5 and scales[20] == 0
    assert learning_rate_scale(12, 20, 4, "cosine") == pytest.approx(0.5)
    assert learning_rate_scale(19, 20, 4, "constant") == 1.0


def test_the_whole_fit_counts_optimizer_steps(train: Train) -> None:
    """The learning rate reaches its cosine's end with the last optimizer step, whatever the accumulation."""
    _, seen = train(make_rows(40), 2, 2, steps=5)
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert [m["learning_rate"] for m in seen.metrics] == pytest.approx(expected)
