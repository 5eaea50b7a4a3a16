"""Measures the estimators on the enumerable model, where the truth is known.

    python benchmarks/coverage.py truth        # exact: α*_B, and how the trace gradient's bias grows
    python benchmarks/coverage.py intervals    # coverage of the nominal 95% interval of α̂, and what ruins it
    python benchmarks/coverage.py anchors      # trace and marginal anchor under drift
    python benchmarks/coverage.py descent      # SGD with fixed and estimated α; minutes

Shapes: M units of `UNIT` rows.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import mean, median

import torch
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor
from torch.func import grad

from bvpo.mixing import AlphaEstimate, Anchor, Fixed, MixingPolicy, Optimal, estimate_alpha
from bvpo.moments import GradientMoments
from bvpo.oracle import ExactMoments, Oracle

BATCHES = (1, 8, 32, 128, 1024, 4096)
COVERED = (8, 128, 4096)
UNIT = 8
RUNS = 400

Row = Sequence[float | str]


def show(title: str, header: Sequence[str], rows: Iterable[Row]) -> None:
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:.3g}" for cell in row))
    Console(width=120).print(table)


def optimum_under(moments: ExactMoments, mu: Tensor, batch_size: int) -> float:
    """α* as it would be if the marginal gradient were `mu`: what an anchor estimates in expectation."""
    return replace(moments, marginal=mu).optimal_alpha(batch_size)


def biases(oracle: Oracle) -> list[float]:
    terms = oracle.moments.terms
    return [float(terms.trace_bias_sq.sqrt()), float(terms.empty_bias_sq.sqrt())]


def truth() -> None:
    reference = Oracle.build()
    drifted = {drift: reference.drifted(drift) for drift in (0.0, 0.05, 0.2, 0.5)}
    show(
        "α*_B by drift",
        ["drift", *(f"B = {batch}" for batch in BATCHES), "‖b_t‖", "‖b_e‖"],
        [[drift, *map(oracle.moments.optimal_alpha, BATCHES), *biases(oracle)] for drift, oracle in drifted.items()],
    )
    error, best = reference.moments.mean_squared_error, reference.moments.optimal_alpha
    show(
        "MSE of α = 0.5 over the least MSE, drift 0",
        [f"B = {batch}" for batch in BATCHES],
        [[float(error(0.5, batch) / error(best(batch), batch)) for batch in BATCHES]],
    )
    directions = [(str(seed), reference.drifted(0.5, seed)) for seed in range(8)]
    show(
        "drift 0.5 in other directions, B = 128",
        ["direction", "α*", "by the trace anchor", "‖b_t‖", "‖b_e‖"],
        [
            [seed, o.moments.optimal_alpha(128), optimum_under(o.moments, o.moments.trace, 128), *biases(o)]
            for seed, o in directions
        ],
    )
    sampled = [
        (t, longest, Oracle.build(temperature=t, longest=longest)) for t in (1.0, 0.8) for longest in (8, 7, 6, 4)
    ]
    show(
        "how the data were sampled, drift 0",
        ["temperature", "longest trace", "dropped", "‖b_t‖", "‖b_e‖"],
        [[t, longest, oracle.population.dropped_fraction, *biases(oracle)] for t, longest, oracle in sampled],
    )


def coverage(estimates: Iterable[AlphaEstimate], optimum: float) -> str:
    """Also of the intervals that an estimate refuses because its units share prompts: this is why it does."""
    intervals = [replace(estimate, reused_fraction=0.0).interval() for estimate in estimates]
    covered = sum(i is not None and i[0] <= optimum <= i[1] for i in intervals)
    return f"{covered / len(intervals):.1%}"


def coverages(windows: Sequence[GradientMoments], exact: ExactMoments, anchor: Anchor = "trace") -> list[str]:
    return [coverage((estimate_alpha(w, b, anchor) for w in windows), exact.optimal_alpha(b)) for b in COVERED]


def intervals() -> None:
    header = [f"B = {batch}" for batch in COVERED]
    cases: list[tuple[float, Anchor]] = [(0.0, "trace"), (0.5, "marginal")]
    rows: list[Row] = []
    for drift, anchor in cases:
        oracle = Oracle.build().drifted(drift)
        for units in (8, 16, 64):
            generator = Generator().manual_seed(0)
            draws = [oracle.population.draw(units * UNIT, generator).view(units, UNIT) for _ in range(RUNS)]
            windows = [oracle.window(draw) for draw in draws]
            rows.append([drift, anchor, str(units), *coverages(windows, oracle.moments, anchor)])
    show("coverage of a nominal 95%", ["drift", "anchor", "units", *header], rows)

    oracle, generator = Oracle.build(), Generator().manual_seed(0)
    bucketed, once, blind, told = [], [], [], []
    for _ in range(RUNS):
        draw = oracle.population.draw(64 * UNIT, generator)
        bucketed.append(oracle.window(draw[oracle.population.trace.prompt[draw].argsort()].view(-1, UNIT)))
        few = draw[: 21 * UNIT]
        passes = torch.cat([torch.randperm(len(few), generator=generator) for _ in range(3)]).view(-1, UNIT)
        once.append(oracle.window(few.view(-1, UNIT)))
        blind.append(oracle.window(few[passes]))
        told.append(oracle.window(few[passes], passes))
    rows = []
    for kind, windows in (
        ("64, bucketed by prompt", bucketed),
        ("21, seen once", once),
        ("21, three passes, prompts unknown", blind),
        ("21, three passes, prompts known", told),
    ):
        estimates = [estimate_alpha(window, 128) for window in windows]
        value = median(e.value for e in estimates if e.value is not None)
        rows.append([kind, *coverages(windows, oracle.moments), value, mean(e.reused_fraction for e in estimates)])
    show("coverage where units are wrong, drift 0", ["units", *header, "median α̂, B = 128", "reused fraction"], rows)


def anchors() -> None:
    kinds: tuple[Anchor, Anchor] = ("trace", "marginal")
    rows: list[Row] = []
    for drift in (0.0, 0.5):
        oracle, generator = Oracle.build().drifted(drift), Generator().manual_seed(0)
        optimum = oracle.moments.optimal_alpha(128)
        for prompts in (32, 128, 512):
            for traces in (4, 8, 16, 64):
                samples = [oracle.population.sample(prompts, traces, generator) for _ in range(100)]
                sizes = [oracle.effective_sample_size(s.trace, s.anchor_traces).mean() for s in samples]
                windows = [oracle.sampled_window(sample, units=min(prompts // 2, 64)) for sample in samples]
                estimates = [[estimate_alpha(window, 128, anchor) for window in windows] for anchor in kinds]
                errors = [median(abs(e.value - optimum) for e in es if e.value is not None) for es in estimates]
                covered = [coverage(es, optimum) for es in estimates]
                rows.append([drift, str(prompts), str(traces), float(torch.stack(sizes).mean()), *errors, *covered])
    header = ["drift", "prompts", "K", "effective K", "trace", "marginal", "covers: trace", "covers: marginal"]
    show("median |α̂ − α*| and coverage at B = 128", header, rows)

    counts = (2, 4, 8, 16, 64)
    rows = []
    for drift, direction in ((0.0, 3), *((0.5, seed) for seed in range(8))):
        oracle = Oracle.build().drifted(drift, direction)
        sample = oracle.population.sample(50_000, max(counts), Generator().manual_seed(0))
        exact = oracle.marginal_gradients(sample.trace).mean(0)
        moments, found = oracle.moments, []
        for traces in counts:
            bias = oracle.anchor_gradients(sample.trace, sample.anchor_traces[:, :traces]).mean(0) - exact
            found.append(optimum_under(moments, moments.marginal + bias, 128))
        trace = optimum_under(moments, moments.trace, 128)
        rows.append([drift, str(direction), moments.optimal_alpha(128), trace, *found])
    header = ["drift", "direction", "α*", "trace", *(f"K = {traces}" for traces in counts)]
    show("α at B = 128 that an anchor gives in expectation", header, rows)


def descend(oracle: Oracle, mixing: MixingPolicy, learning_rate: float, steps: int, seed: int) -> tuple[float, float]:
    """‖∇L_m‖² after SGD on batches of 4 units, and the mean α. The marginal anchor enumerates all traces."""
    generator = Generator().manual_seed(seed)
    held: deque[Tensor] = deque(maxlen=mixing.window)  # each (3, 4, P)
    weights = []
    for step in range(steps):
        rows = oracle.population.sample(4 * UNIT, 1, generator)
        kinds = (oracle.gradients(rows.trace), oracle.gradients(rows.empty), oracle.marginal_gradients(rows.trace))
        units = torch.stack(kinds).unflatten(1, (4, UNIT)).mean(2)
        estimate = None
        if held:
            trace, empty, anchor = torch.cat(list(held), 1)
            count = torch.full((len(trace),), UNIT)
            at_step = torch.arange(len(held)).repeat_interleave(4)
            window = GradientMoments.from_gradients(trace, empty, anchor, count, steps=at_step)
            estimate = estimate_alpha(window, 4 * UNIT, mixing.anchor)
        weights.append(mixing.weight(step, estimate))
        held.append(units)
        trace, empty, _ = units.mean(1)
        oracle = oracle.at(oracle.policy - learning_rate * (weights[-1] * trace + (1 - weights[-1]) * empty))
    return float(grad(oracle.marginal_loss)(oracle.policy).square().sum()), mean(weights)


def descent(steps: int = 150, seeds: int = 20) -> None:
    oracle = Oracle.build()
    smoothness = oracle.smoothness(oracle.policy[None])  # L at θ_ref
    policies: dict[str, MixingPolicy] = {
        "α = 0": Fixed(0.0),
        "α = 0.5": Fixed(0.5),
        "α = 1": Fixed(1.0),
        "Optimal, trace anchor": Optimal(anchor="trace"),
        "Optimal, marginal anchor": Optimal(anchor="marginal"),
    }
    for eta_l in (0.25, 0.5, 1.0):
        runs = {
            name: [descend(oracle, mixing, eta_l / smoothness, steps, seed) for seed in range(seeds)]
            for name, mixing in policies.items()
        }
        ends = {name: [gradient_sq for gradient_sq, _ in found] for name, found in runs.items()}
        rows: list[Row] = []
        for name, end in ends.items():
            alpha = mean(weight for _, weight in runs[name])
            rows.append([name, mean(end), median(end), alpha, below(end, ends["α = 0"]), below(end, ends["α = 1"])])
        title = f"‖∇L_m‖² after {steps} steps of SGD at η = {eta_l}/L, B = {4 * UNIT}, {seeds} paired seeds"
        show(title, ["policy", "mean", "median", "mean α", "below α = 0 on", "below α = 1 on"], rows)


def below(one: Sequence[float], other: Sequence[float]) -> str:
    """On how many seeds the first ends lower."""
    return f"{sum(a < b for a, b in zip(one, other, strict=True))} seeds"


def main() -> None:
    tables: dict[str, Callable[[], None]] = {f.__name__: f for f in (truth, intervals, anchors, descent)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tables)
    tables[parser.parse_args().table]()


if __name__ == "__main__":
    main()
