"""The theorems on a model whose rows can all be enumerated, and the estimators' coverage and bias on its samples."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import grad, vmap

from bvpo.mixing import Anchor, estimate_alpha, optimal_alpha
from bvpo.moments import GradientMoments
from bvpo.oracle import EMPTY, Oracle, Pairs, Reasoner, descent_bound
from bvpo.order import StepSampler

BATCHES = (1, 8, 32, 128, 1024)
DRIFTS = (0.0, 0.05, 0.2, 0.5)
ROWS = 8  # a unit
RUNS = 400


@cache
def oracle_at(drift: float) -> Oracle:
    return Oracle.build().drifted(drift)


@cache
def small_oracle() -> Oracle:
    """432 rows and 44 parameters: batches of two rows, and Hessians of every step, can be enumerated."""
    return Oracle.build(prompts=3, traces=4, answers=3, width=4)


def mixed(oracle: Oracle, alpha: float) -> Tensor:
    """(N, P) g_c of the population's rows."""
    gradients = oracle.row_gradients
    return torch.lerp(gradients[1], gradients[0], alpha)


# The oracle itself, by second and naive implementations


@pytest.mark.parametrize(("temperature", "longest"), [(1.0, 8), (0.8, 5)])
def test_enumerated_rows_are_those_of_ancestral_sampling(temperature: float, longest: int) -> None:
    oracle = Oracle.build(temperature=temperature, longest=longest)
    generator = Generator().manual_seed(0)
    traces, answers = ((logps / temperature).softmax(-1).detach() for logps in oracle.model())
    prompt = torch.randint(len(traces), (400_000,), generator=generator)
    r, r_other = traces[prompt].multinomial(2, replacement=True, generator=generator).T
    y, y_other = (answers[prompt, trace].multinomial(1, generator=generator)[:, 0] for trace in (r, r_other))
    # each pair is drawn in both orders: keep those where the first response is the better one
    kept = (oracle.population.answers[prompt, y, y_other] > 0) & (r < longest) & (r_other < longest)

    def cells(prompts: Tensor, answer: Tensor, trace: Tensor, weights: Tensor) -> Tensor:
        """Distribution of the chosen response, given its prompt."""
        shape = (len(traces), answers.shape[-1], traces.shape[-1])
        index = (prompts * shape[1] + answer) * shape[2] + trace
        counts: Tensor = index.bincount(weights, minlength=shape[0] * shape[1] * shape[2]).view(shape[0], -1)
        return counts / counts.sum(-1, keepdim=True)

    pairs, p = oracle.population.trace, oracle.population.probability
    exact = cells(pairs.prompt, pairs.chosen, pairs.chosen_trace, p)
    simulated = cells(prompt, y, r, kept.double())
    draws = prompt.bincount(kept.double())[:, None]
    error = (exact * (1 - exact) / draws).sqrt()
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert bool(((simulated - exact).abs() <= 4.5 * error).all())


def test_row_gradients_are_those_of_a_plain_autograd_loop() -> None:
    oracle = oracle_at(0.5)
    policy = deepcopy(oracle.model)
    torch.nn.utils.vector_to_parameters(oracle.policy, policy.parameters())
    rows = oracle.population.sample(4, 3, Generator().manual_seed(0))

    def plain(pairs: Pairs, logp: Callable[[Reasoner, int, int, int], Tensor]) -> Tensor:
        gradients = []
        for n in range(len(pairs)):
            margin = torch.tensor(0.0).double()
            for sign, answer, trace in (
                (1, pairs.chosen, pairs.chosen_trace),
                (-1, pairs.rejected, pairs.rejected_trace),
            ):
                for side, model in ((1, policy), (-1, oracle.model)):
                    margin = margin + sign * side * logp(model, n, int(answer[n]), int(trace[n]))
            loss = -F.logsigmoid(oracle.loss.beta * margin)
            found = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True, materialize_grads=True)
            gradients.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(gradients)

    def response(model: Reasoner, n: int, answer: int, trace: int) -> Tensor:
        traces, answers = model.forward()
        x = rows.trace.prompt[n]
        return answers[x, trace, answer] + (0 if trace == EMPTY else traces[x, trace])

    def marginal(model: Reasoner, n: int, answer: int, trace: int) -> Tensor:
        traces, answers = model.forward()
        x = rows.trace.prompt[n]
        return (traces[x].exp() * answers[x, :EMPTY, answer].exp()).sum().log()

    def anchor(model: Reasoner, n: int, answer: int, trace: int) -> Tensor:
        logq = oracle.population.proposal[rows.trace.prompt[n]]
        draws = [(response(model, n, answer, int(r)) - logq[r]).exp() for r in rows.anchor_traces[n]]
        return torch.stack(draws).mean().log()

    def close(actual: Tensor, expected: Tensor) -> bool:
        return torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)

    assert close(oracle.gradients(rows.trace), plain(rows.trace, response))
    assert close(oracle.gradients(rows.empty), plain(rows.empty, response))
    assert close(oracle.marginal_gradients(rows.trace), plain(rows.trace, marginal))
    assert close(oracle.anchor_gradients(rows.trace, rows.anchor_traces), plain(rows.trace, anchor))


@pytest.mark.parametrize("drift", DRIFTS)
def test_mu_is_the_gradient_of_the_marginal_loss(drift: float) -> None:
    oracle = oracle_at(drift)
    assert torch.allclose(grad(oracle.marginal_loss)(oracle.policy), oracle.moments.marginal, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_error_is_that_of_every_batch_of_two_rows(alpha: float) -> None:
    oracle = small_oracle().drifted(0.5)
    p, gradients = oracle.population.probability, mixed(oracle, alpha)
    batches = (gradients[:, None] + gradients) / 2 - oracle.moments.marginal  # (N, N, P): every two independent rows
    enumerated = p @ batches.square().sum(-1) @ p
    assert float(oracle.moments.mean_squared_error(alpha, 2)) == pytest.approx(float(enumerated), rel=1e-12)


# The theorems


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("batch_size", BATCHES)
def test_optimal_alpha_is_where_the_exact_error_is_least(drift: float, batch_size: int) -> None:
    moments = oracle_at(drift).moments
    low, high = 0.0, 1.0
    for _ in range(5):  # 101 points, then 101 between the neighbours of the best
        grid = torch.linspace(low, high, 101, dtype=torch.float64)
        best = int(moments.mean_squared_error(grid, batch_size).argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 100)])
    assert moments.optimal_alpha(batch_size) == pytest.approx((low + high) / 2, abs=1e-6)


@pytest.mark.parametrize("drift", [0.0, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_theorem_1_traces_add_alpha_squared_times_their_variance(drift: float, alpha: float) -> None:
    oracle = oracle_at(drift)
    trace, empty, p = oracle.population.trace, oracle.population.empty, oracle.population.probability
    data = torch.stack([trace.prompt, trace.chosen, trace.rejected, empty.chosen, empty.rejected])
    _, group = data.unique(dim=1, return_inverse=True)
    groups = int(group.max()) + 1
    mass = torch.zeros(groups).double().index_add(0, group, p)

    def variances(gradients: Tensor) -> Tensor:
        """tr Var over traces given each value of the data."""
        mean = (
            torch.zeros(groups, gradients.shape[1]).double().index_add(0, group, p[:, None] * gradients) / mass[:, None]
        )
        spread = (gradients - mean[group]).square().sum(-1)
        return torch.zeros(groups).double().index_add(0, group, p * spread) / mass

    of_trace = variances(mixed(oracle, 1.0))
    assert torch.allclose(variances(mixed(oracle, alpha)), alpha**2 * of_trace, rtol=0, atol=1e-10)
    assert float(of_trace @ mass) == pytest.approx(float(oracle.moments.trace_conditional_variance), rel=1e-10)


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("batch_size", BATCHES)
def test_corollary_1_optimum_is_no_worse_than_either_gradient(drift: float, batch_size: int) -> None:
    moments = oracle_at(drift).moments
    alpha = moments.optimal_alpha(batch_size)
    least = moments.mean_squared_error(alpha, batch_size)
    either = min(moments.mean_squared_error(end, batch_size) for end in (0.0, 1.0))
    assert 0 < alpha < 1, "the strict case"
    assert least < either


def test_corollary_1_holds_with_equality_at_a_boundary() -> None:
    moments = Oracle.build(beta=1.0).drifted(0.5, direction=7).moments
    assert moments.optimal_alpha(4096) == 1.0
    errors = moments.mean_squared_error(torch.linspace(0, 1, 101, dtype=torch.float64), 4096)
    assert int(errors.argmin()) == 100


def test_optimal_alpha_depends_on_the_batch_size() -> None:
    moments = oracle_at(0.0).moments
    optima = [moments.optimal_alpha(batch_size) for batch_size in (*BATCHES, 4096)]
    assert optima == sorted(optima)
    assert optima[0] < 0.5 and optima[-1] > 0.99
    assert moments.mean_squared_error(0.5, 4096) > 50 * moments.mean_squared_error(optima[-1], 4096)


def test_trace_gradient_is_unbiased_at_the_reference_only() -> None:
    def bias(oracle: Oracle) -> float:
        return float(oracle.moments.terms.trace_bias_sq.sqrt())

    unbiased = bias(Oracle.build())
    tempered = bias(Oracle.build(temperature=0.8))
    filtered = Oracle.build(longest=6)
    print(f"‖b_t‖ at the reference: {unbiased:.1e}; T = 0.8: {tempered:.4f}; ", end="")
    print(f"without the {filtered.population.dropped_fraction:.0%} longest: {bias(filtered):.4f}")
    assert unbiased < 1e-8
    assert tempered > 0.01
    assert bias(filtered) > 0.01
    drifted = [bias(oracle_at(drift)) for drift in DRIFTS]
    assert drifted == sorted(drifted)


# The estimators


def covers(interval: tuple[float, float] | None, truth: float) -> bool:
    return interval is not None and interval[0] <= truth <= interval[1]


@cache
def windows(drift: float, units: int = 64) -> list[GradientMoments]:
    oracle, generator = oracle_at(drift), Generator().manual_seed(0)
    return [oracle.window(oracle.population.draw(units * ROWS, generator).view(units, ROWS)) for _ in range(RUNS)]


@pytest.mark.parametrize("batch_size", [8, 128, 4096])
@pytest.mark.parametrize(("drift", "anchor"), [(0.0, "trace"), (0.5, "marginal")])
def test_interval_of_64_units_covers_the_optimum(drift: float, anchor: Anchor, batch_size: int) -> None:
    truth = oracle_at(drift).moments.optimal_alpha(batch_size)
    estimates = [estimate_alpha(window, batch_size, anchor) for window in windows(drift)]
    coverage = sum(covers(estimate.interval(), truth) for estimate in estimates) / RUNS
    print(f"drift {drift}, B = {batch_size}: a nominal 95% covers {coverage:.1%}")
    assert 0.90 <= coverage <= 0.98  # the standard error of 400 runs is 1.1%


def test_interval_covers_where_some_rows_have_one_pair() -> None:
    """70% of the rows have no trace pair: how many have one varies from step to step, and with it what the trace
    gradient's variance counts for. 16 steps of four units of four rows. (With the whole window's overlap in every
    replicate of the jackknife it is 92%.)"""
    oracle, generator = oracle_at(0.0), Generator().manual_seed(1)
    (trace, empty, _), terms, share = oracle.row_gradients, oracle.moments.terms, 0.3
    overlaps = (terms.trace_variance / share, terms.empty_variance, terms.covariance)  # all rows have an empty pair
    truth = optimal_alpha(terms.trace_bias_sq, terms.empty_bias_sq, terms.bias_inner, *overlaps, 8)
    covered = 0
    for _ in range(RUNS):
        rows = oracle.population.draw(64 * 4, generator).view(64, 4)
        has = (torch.rand(64, 4, generator=generator) < share).double()
        units = torch.einsum("un,unp->up", has / has.sum(1, keepdim=True).clamp(min=1), trace[rows])
        pairs = has.sum(1)
        counts = torch.stack([torch.stack([pairs, pairs]), torch.stack([pairs, torch.full_like(pairs, 4.0)])])
        steps = torch.arange(64) // 4
        window = GradientMoments.from_gradients(units, empty[rows].mean(1), rows=counts, steps=steps)
        covered += covers(estimate_alpha(window, 8).interval(), float(truth))
    print(f"one pair: a nominal 95% covers {covered / RUNS:.1%}")
    assert 0.93 <= covered / RUNS <= 0.98  # the standard error of 400 runs is 1.1%


def test_bucketed_units_ruin_the_interval() -> None:
    oracle, generator = oracle_at(0.0), Generator().manual_seed(0)
    truth = oracle.moments.optimal_alpha(128)
    covered = 0
    for _ in range(50):
        rows = oracle.population.draw(64 * ROWS, generator)
        bucketed = rows[oracle.population.trace.prompt[rows].argsort()].view(64, ROWS)
        covered += covers(estimate_alpha(oracle.window(bucketed), 128).interval(), truth)
    print(f"units bucketed by prompt: a nominal 95% covers {covered / 50:.0%}")
    assert covered <= 5


@pytest.mark.parametrize(("by_length", "whole_steps"), [(False, False), (True, False), (True, True)])
def test_interval_covers_with_the_units_of_a_packed_fit(by_length: bool, whole_steps: bool) -> None:
    """Microbatches as the fit draws them, of rows whose length goes with their prompt. A token budget sorts rows inside
    a microbatch, which leaves units random; `bucket_by_length` sorts an optimizer batch, so its unit is the step."""
    oracle, generator = oracle_at(0.0), Generator().manual_seed(0)
    truth = oracle.moments.optimal_alpha(32)
    covered = 0
    for run in range(RUNS):
        rows = oracle.population.draw(64 * 4 * ROWS if whole_steps else 64 * ROWS, generator)
        lengths = oracle.population.trace.prompt[rows].tolist() if by_length else None
        microbatches = torch.tensor([batch.rows for batch in StepSampler(len(rows), ROWS, 4, run, lengths=lengths)])
        units = microbatches.view(64, -1)
        covered += covers(estimate_alpha(oracle.window(rows[units]), 32).interval(), truth)
    print(f"by length {by_length}, whole steps {whole_steps}: a nominal 95% covers {covered / RUNS:.1%}")
    if by_length and not whole_steps:
        assert covered / RUNS < 0.8
    else:
        assert 0.90 <= covered / RUNS <= 0.98


def test_repeated_prompts_are_left_out_of_products() -> None:
    oracle, generator = oracle_at(0.0), Generator().manual_seed(0)
    rows = oracle.population.draw(168, generator)
    passes = torch.cat([torch.randperm(168, generator=generator) for _ in range(3)]).view(-1, ROWS)
    blind, told = oracle.window(rows[passes]), oracle.window(rows[passes], passes)
    once = oracle.window(rows.view(-1, ROWS))

    # without the keys, what a row shares with itself is taken for the mean's square
    mean_sq = {
        name: float(w.statistics().inner[0, 0]) for name, w in (("blind", blind), ("told", told), ("once", once))
    }
    assert mean_sq["blind"] - mean_sq["once"] > 10 * abs(mean_sq["told"] - mean_sq["once"])
    assert blind.reused_fraction == 0
    assert 0.1 < told.reused_fraction < 0.4  # two units of 8 of 168 rows: 1 − (160/168)⁸ = 0.32, in 2/3 of the products
    assert estimate_alpha(told, 128).reused_fraction == told.reused_fraction


def test_marginal_anchor_is_closer_than_the_trace_anchor_under_drift() -> None:
    oracle, generator = oracle_at(0.5), Generator().manual_seed(0)
    truth = oracle.moments.optimal_alpha(128)
    errors: dict[Anchor, list[float]] = {"trace": [], "marginal": []}
    sizes = []
    for _ in range(60):
        rows = oracle.population.sample(512, 8, generator)
        window = oracle.sampled_window(rows, units=64)
        sizes.append(float(oracle.effective_sample_size(rows.trace, rows.anchor_traces).mean()))
        for anchor, found in errors.items():
            value = estimate_alpha(window, 128, anchor).value
            assert value is not None
            found.append(abs(value - truth))
    trace, marginal = median(errors["trace"]), median(errors["marginal"])
    print(
        f"median |α̂ − α*|: trace {trace:.3f}, marginal {marginal:.3f}; effective sample size {median(sizes):.1f} of 8"
    )
    assert marginal < trace / 3
    assert 2 < median(sizes) < 8


def test_marginal_anchor_is_consistent_in_the_number_of_traces() -> None:
    oracle = oracle_at(0.5)
    rows = oracle.population.sample(20_000, 64, Generator().manual_seed(0))
    exact = oracle.marginal_gradients(rows.trace).mean(0)

    def bias(traces: int) -> float:
        return float((oracle.anchor_gradients(rows.trace, rows.anchor_traces[:, :traces]).mean(0) - exact).norm())

    biases = [bias(traces) for traces in (1, 4, 16, 64)]
    assert biases == sorted(biases, reverse=True)
    assert biases[-1] < biases[-2] / 3  # 1/4 in the limit: the bias is O(1/K)


# Theorem 3


def test_descent_bound_is_tight_where_the_curvature_is_constant() -> None:
    """L(θ) = 2‖θ‖² has Hessian 4·1 everywhere: expected loss and bound agree to rounding."""
    generator = Generator().manual_seed(0)
    theta, bias = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    gradients = 4 * theta + bias + noise - noise.mean(0)
    for rate in (0.05, 0.25):
        after = 2 * (theta - rate * gradients).square().sum(-1).mean()
        bound = descent_bound(
            loss=2 * theta @ theta,
            gradient_sq=(4 * theta).square().sum(),
            bias_sq=bias @ bias,
            mean_sq=(4 * theta + bias).square().sum(),
            variance=(noise - noise.mean(0)).square().sum(-1).mean(),
            learning_rate=rate,
            smoothness=4.0,
        )
        assert float(after) == pytest.approx(float(bound), rel=1e-12)


def step_bound(oracle: Oracle, alpha: float, rate: float, smoothness: float) -> float:
    """The bound for a step with one row's g_c."""
    p, gradients, moments = oracle.population.probability, mixed(oracle, alpha), oracle.moments
    mean = p @ gradients
    bound = descent_bound(
        loss=oracle.marginal_loss(oracle.policy),
        gradient_sq=moments.marginal.square().sum(),
        bias_sq=(mean - moments.marginal).square().sum(),
        mean_sq=mean.square().sum(),
        variance=p @ (gradients - mean).square().sum(-1),
        learning_rate=rate,
        smoothness=smoothness,
    )
    return float(bound)


def test_theorem_3_bounds_every_step_of_a_run() -> None:
    oracle, generator = small_oracle(), Generator().manual_seed(0)
    for _ in range(4):
        start, gradients = oracle.policy, {a: mixed(oracle, a) for a in (0.0, oracle.moments.optimal_alpha(1), 1.0)}
        longest = 1 / oracle.smoothness(start[None])  # every step taken below is shorter, and lies on these segments
        segments = [start - part * longest * g for g in gradients.values() for part in (0.5, 1.0)]
        smoothness = oracle.smoothness(torch.cat([start[None], *segments]))
        for eta_l in (0.25, 0.5, 1.0):
            rate = eta_l / smoothness
            for alpha, g in gradients.items():
                after = oracle.population.probability @ vmap(oracle.marginal_loss)(start - rate * g)
                assert float(after) <= step_bound(oracle, alpha, rate, smoothness)
        row = oracle.population.draw(1, generator)
        oracle = oracle.at(start - 0.5 / smoothness * gradients[1.0][row[0]])


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_bound_and_error_share_their_optimum_at_the_largest_step_only(drift: float) -> None:
    oracle = small_oracle().drifted(drift)
    smoothness = 0.7

    def best(eta_l: float) -> float:
        """The bound is a parabola in α: its vertex from three points."""
        left, middle, right = (step_bound(oracle, a, eta_l / smoothness, smoothness) for a in (0.0, 0.5, 1.0))
        return 0.5 - 0.25 * (right - left) / (right + left - 2 * middle)

    assert best(1.0) == pytest.approx(oracle.moments.optimal_alpha(1), abs=1e-9)
    assert abs(best(0.25) - oracle.moments.optimal_alpha(1)) > 1e-3
