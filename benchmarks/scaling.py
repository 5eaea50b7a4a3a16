"""How the cost and the working memory of one optimizer step grow with what it is made of, for ours, padded and packed.

    python benchmarks/scaling.py [--dtype fp32|bf16] [--repeats 3] [--reference live|cached] [--json figures.json]

From a small model and batch, one thing grows at a time: tokens a sequence, rows, vocabulary, model width. Every step is
`Trainer.fit(BVPO)`'s, with its statistics, in a process of its own, in turn with the others (see `step.py` for what is
timed and counted). An exponent is that of growth from the size before: log(ratio of medians) / log(ratio of sizes).

Expected orders of time, far from the ends: products take 1 in tokens and 2 in width, attention 2 in tokens, everything
element by element 1; a vocabulary is met by the head alone, so its exponent rises from 0 to 1. Of memory, activations
take 1 in tokens, rows and width, logits 1 in tokens, rows and vocabulary but 0 in width, and gradients 2 in width.
What a step always costs (the window's statistics, Python) makes small sizes grow by less. All sequences of an estimator
are equally long here, so packing saves repeated prompts alone.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import record
from rich.console import Console
from rich.table import Table
from turns import CUDA, measure
from variants import Case, Setting, Variant, run

CLOCK = "wall" if CUDA else "CPU"
BASE = Setting(layers=1, hidden=256, vocabulary=2048, rows=2, prompt=(64, 64), trace=(128, 128), answer=(64, 64))


def of_length(tokens: int) -> Setting:
    """Sequences with a trace have so many tokens: a quarter is the prompt's and a quarter the answer's."""
    part, half = (tokens // 4,) * 2, (tokens // 2,) * 2
    return replace(BASE, prompt=part, trace=half, answer=part)


AXES: dict[str, tuple[dict[int, Setting], str, str]] = {  # settings by size, expected orders of time and of memory
    "tokens": ({size: of_length(size) for size in (128, 256, 512, 1024)}, "1 to 2", "1"),
    "rows": ({size: replace(BASE, rows=size) for size in (1, 2, 4, 8)}, "1", "1"),
    "vocabulary": ({size: replace(BASE, vocabulary=size) for size in (1024, 4096, 16384)}, "0 to 1", "0 to 1"),
    "width": ({size: replace(BASE, hidden=size) for size in (128, 256, 512)}, "1 to 2", "0 to 2"),
}


def exponents(sizes: list[int], values: list[float]) -> list[float | None]:
    """Of growth from one size to the next; None for the first."""
    pairs = zip(pairwise(sizes), pairwise(values), strict=True)
    return [None, *(log(v / u) / log(b / a) for (a, b), (u, v) in pairs)]


def follow(axis: str, variants: list[Variant], options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure the sizes of one axis and print their table."""
    settings, time_order, memory_order = AXES[axis]
    sizes = list(settings)
    with tempfile.TemporaryDirectory() as folder:
        saved = [
            replace(own, dtype=options.dtype).with_weights(str(Path(folder, str(size))))
            for size, own in settings.items()
        ]
        cases = [Case(variant, own) for variant in variants for own in saved]
        steps = measure(run, cases, options.repeats, options.threads, console.print)
    table = Table(axis, "variant", f"{CLOCK} s", f"exponent ({time_order})", "MiB", f"exponent ({memory_order})")
    figures: dict[str, Any] = {"sizes": sizes, "expected": {"seconds": time_order, "memory": memory_order}}
    for variant in variants:
        own = [steps[Case(variant, setting)] for setting in saved]
        seconds = [median(step.seconds for step in timed[:-1]) for timed in own]
        memory = [(timed[-1].peak or 0) / 2**20 for timed in own]
        powers = exponents(sizes, seconds), exponents(sizes, memory)
        figures[variant.name] = {"seconds": seconds, "working_mib": memory}
        figures[variant.name] |= {"seconds_exponents": powers[0], "memory_exponents": powers[1]}
        for size, spent, power, used, memory_power in zip(sizes, seconds, powers[0], memory, powers[1], strict=True):
            cells = [f"{spent:.3f}", shown(power), f"{used:.1f}", shown(memory_power)]
            table.add_row(str(size), variant.name, *cells)
    console.print(table)
    return figures


def shown(exponent: float | None) -> str:
    return "" if exponent is None else f"{exponent:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), metavar="AXIS")
    parser.add_argument("--reference", choices=["live", "cached"], default="live")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file too")
    options = parser.parse_args()
    console, facts = Console(width=110), record.circumstances()
    variants = [Variant("padded", options.reference, True), Variant("packed", options.reference, True)]
    figures = {axis: follow(axis, variants, options, console) for axis in options.axes}
    record.show(facts)
    record.write(options.json, facts, figures)


if __name__ == "__main__":
    main()
