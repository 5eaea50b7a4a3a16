"""One optimizer step of BVPO beside TRL's and beside the least that it must compute; in turn, in one run.

    python benchmarks/step.py [--dtype fp32|bf16|both] [--repeats 7] [--only NAME …] [--json figures.json]

All variants train the same weights on the same tokens: rows of a trace pair and an empty-trace pair. They differ in
what they compute for it:

    trl       `DPOTrainer.train()` on all pairs together, padded jointly; a callback times each of its steps
    joint     our `completion_logps` on all pairs together, padded jointly: one forward and one backward pass, cached
              reference, plain PyTorch around it
    padded    `Trainer.fit(BVPO)`, timed by a callback: a pass for the trace pairs, then one for the empty-trace pairs
    packed    the same without padding and with each prompt once

each with the reference in memory (`live`) or its log-probabilities computed before (`cached`); BVPO also with its
gradient statistics (`+α̂`: sketches, a full window, α̂ and its jackknife). A step ends with clipping to norm 1 and AdamW,
in each package's default form (fused in TRL). No gradient checkpointing, no dropout, no logging, sdpa; `bf16` is
weights, gradients and optimizer in bf16. TRL also computes entropy, accuracy and mean logits at every step: that is
no option of its.

Every variant lives in a process of its own and steps when it is told to, so that they take turns in a new random order
each round. Ratios are taken within a round; their medians, least and largest are shown. They are of CPU times, or of
wall times on a GPU. Memory is the peak of PyTorch's allocations in a step above what was allocated before it (weights,
reference, AdamW's moments, window), counted by its allocator in a step that is not timed. A second table says where
the time of three such steps went, as the profiler saw it (kinds_of_work.py).

The floor is the step's necessary products (packed, prompts once, causal attention, logits of completion tokens alone;
a backward pass twice a forward pass) at the rate of a large product of the model's shape, timed in the same rounds. On
a GPU whose peak is known (bvpo.throughput), MFU is the rate of these products over that peak.

On a GPU of 80 GB, with TRL's Liger kernels and FlashAttention where they are installed (not yet run):

    python benchmarks/step.py --shape qwen2-1.5b --dtype bf16 --rows 1 \\
        --prompt-tokens 256 512 --trace-tokens 1024 3072 --answer-tokens 128 512

The default lengths and seed are chosen for 7,440 tokens a forward pass where all pairs are padded jointly, 5,520 where
each estimator's are, 4,016 packed and 3,276 with each prompt once (the run that this table is compared with had 7,424,
5,472, 4,032 and 3,284).
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args, get_type_hints

import record
import torch
from kinds_of_work import KINDS
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from turns import CUDA, Step, measure
from variants import PRECISIONS, PRODUCT, TRL, VARIANTS, Case, Row, Setting, Variant, all_pairs, product_flops, run

from bvpo.throughput import peak_flops

Steps = dict[Variant, list[Step]]  # of which the last one's memory was counted

# ---------------------------------------------------------------------- what must be computed


def count_tokens(rows: list[Row]) -> dict[str, int]:
    """Tokens that a forward pass of the policy takes in one step."""
    pairs = all_pairs(rows)
    lengths = [[len(pair["prompt"]) + len(pair[side]) for side in ("chosen", "rejected")] for pair in pairs]
    longest = [max(own) for own in lengths]
    packed, trace = sum(map(sum, lengths)), len(rows)
    return {
        "joint": 2 * len(pairs) * max(longest),
        "padded": 2 * trace * max(longest[:trace]) + 2 * trace * max(longest[trace:]),
        "packed": packed,
        "shared": packed - sum(len(pair["prompt"]) for pair in pairs),
    }


def necessary_flops(setting: Setting, rows: list[Row], passes: int) -> dict[str, float]:
    """Multiplications and additions of so many forward passes, prompts once: in layers, attention and head."""
    config = setting.config().get_text_config()
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).named_parameters()
    weights = sum(p.numel() for name, p in parameters if p.ndim == 2 and ".layers." in name)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * config.num_attention_heads * head_width
    attended = scored = 0
    for pair in all_pairs(rows):
        prompt = len(pair["prompt"])
        attended += prompt * (prompt + 1) // 2
        for completion in (len(pair["chosen"]), len(pair["rejected"])):
            attended += completion * prompt + completion * (completion + 1) // 2
            scored += completion
    return {
        "layers": passes * 2.0 * weights * count_tokens(rows)["shared"],
        "attention": passes * 4.0 * attended * width,
        "head": passes * 2.0 * scored * config.vocab_size * config.hidden_size,
    }


# ---------------------------------------------------------------------- the report


def ratios(steps: Steps, above: Variant, below: Variant, factor: float = 1.0) -> list[float]:
    """Of the times of one round, round by round; none where one of them was left out."""
    if below not in steps:
        return []
    return [factor * a.seconds / b.seconds for a, b in zip(steps[above][:-1], steps[below][:-1], strict=True)]


def summary(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "largest": max(values)} if values else {}


def shown(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "–"


def report(variants: list[Variant], setting: Setting, repeats: int, console: Console) -> dict[str, Any]:
    """Measure at one precision and print the table."""
    cases = [Case(variant, setting) for variant in [PRODUCT, *variants]]
    steps = {case.variant: own for case, own in measure(run, cases, repeats, setting.threads, console.print).items()}
    rows = setting.make_rows()
    tokens = count_tokens(rows)["packed"]
    flops = {name: necessary_flops(setting, rows, passes) for name, passes in (("live", 4), ("cached", 3))}
    peak = peak_flops(torch.cuda.get_device_name(), PRECISIONS[setting.dtype]) if CUDA else None
    columns = ["CPU s", "wall s", "over TRL", "over the floor", "tokens/s", "memory MiB", *(["MFU %"] if peak else [])]
    table = Table("variant", *columns)
    where = Table("% of a step", *KINDS)
    figures: dict[str, Any] = {}
    for variant in variants:
        if variant not in steps:
            continue
        timed = steps[variant][:-1]
        over_trl = ratios(steps, variant, TRL)
        floor = sum(flops[variant.reference].values()) / product_flops(setting)  # in products
        over_floor = ratios(steps, variant, PRODUCT, 1 / floor)
        cpu, wall = median(step.cpu for step in timed), median(step.wall for step in timed)
        rate = tokens / median(step.seconds for step in timed)
        counted = steps[variant][-1]
        memory, kinds = (counted.peak or 0) / 2**20, counted.kinds or {}
        where.add_row(variant.name, *(f"{100 * own / sum(kinds.values()):.1f}" for own in kinds.values()))
        cells = [f"{cpu:.3f}", f"{wall:.3f}", shown(over_trl), shown(over_floor), f"{rate:.0f}", f"{memory:.0f}"]
        utilisation = peak and sum(flops[variant.reference].values()) / peak / median(s.seconds for s in timed)
        cells += [f"{100 * utilisation:.1f}"] if utilisation else []
        table.add_row(variant.name, *cells)
        figures[variant.name] = {
            "cpu_seconds": [step.cpu for step in timed],
            "wall_seconds": [step.wall for step in timed],
            "over": {other.name: summary(ratios(steps, variant, other)) for other in steps if other is not PRODUCT},
            "over_floor": summary(over_floor),
            "tokens_per_second": rate,
            "working_mib": memory,
            "model_flops_utilisation": utilisation,
            "seconds_by_kind": kinds,
        }
    gflops = product_flops(setting) / median(step.seconds for step in steps[PRODUCT][:-1]) / 1e9
    console.print(f"\n{setting.dtype}: the large product at {gflops:.1f} GFLOP/s", highlight=False)
    console.print(table)
    console.print(where)
    return {"variants": figures, "product_gflops_per_second": gflops, "necessary_flops": flops}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Setting()
    parser.add_argument("--dtype", choices=["fp32", "bf16", "both"], default="both")
    for name in ("prompt", "trace", "answer"):
        bounds: Any = {"nargs": 2, "type": int, "default": getattr(default, name), "metavar": ("LOW", "HIGH")}
        parser.add_argument(f"--{name}-tokens", dest=name, **bounds)
    parser.add_argument("--shape", choices=get_args(get_type_hints(Setting)["shape"]), default=default.shape)
    for name in ("rows", "layers", "hidden", "vocabulary", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--model", metavar="FOLDER", help="a real model instead of a random one")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, after one that warms up")
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS], metavar="NAME", help="variants")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file too")
    options = parser.parse_args()
    for name in ("prompt", "trace", "answer"):
        low, high = getattr(options, name)
        if not 1 <= low <= high:
            parser.error(f"--{name}-tokens {low} {high}: expected 1 ≤ LOW ≤ HIGH")
    sizes = ("layers", "hidden", "vocabulary")
    if options.shape != default.shape and any(getattr(options, name) != getattr(default, name) for name in sizes):
        parser.error(f"--shape {options.shape} says how large the model is: leave out --layers, --hidden, --vocabulary")
    if options.model is not None and not Path(options.model, "config.json").is_file():
        parser.error(f"--model {options.model}: no config.json there; give a folder saved by `save_pretrained`")
    return options


def main() -> None:
    options, facts = parse(), record.circumstances()
    names = [name for name in asdict(Setting()) if name != "dtype"]
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    given |= {name: tuple(bounds) for name, bounds in given.items() if isinstance(bounds, list)}
    setting = Setting(**given)
    variants = [variant for variant in VARIANTS if not options.only or variant.name in options.only]
    console = Console(width=110)
    if importlib.util.find_spec("trl") is None:
        console.print("trl is not installed: its variants are left out")
        variants = [variant for variant in variants if variant.kind != "trl"]

    tokens = count_tokens(setting.make_rows())
    name = setting.model and Path(setting.model).name
    figures: dict[str, Any] = {"setting": asdict(replace(setting, model=name)), "tokens": tokens}
    console.print("tokens a forward pass: " + ", ".join(f"{name} {number:,}" for name, number in tokens.items()))
    if tokens["padded"] == tokens["packed"]:
        console.print("an estimator's sequences are all of one length: packing saves no padding, only repeated prompts")
    with tempfile.TemporaryDirectory() as folder:
        saved = setting.with_weights(folder)
        for dtype in ["fp32", "bf16"] if options.dtype == "both" else [options.dtype]:
            figures[dtype] = report(variants, replace(saved, dtype=dtype), options.repeats, console)
    record.show(facts)
    record.write(options.json, facts, figures)


if __name__ == "__main__":
    main()
