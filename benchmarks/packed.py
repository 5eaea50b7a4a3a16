"""Cost of a batch's log-probabilities: padded, packed, and packed with each prompt once; in turn, in one process.

    python benchmarks/packed.py [--dtype float32] [--rounds 7] [--threads 1] [--json figures.json]

One pass is what a step does with a microbatch: policy forward and backward and a reference's forward, for the trace
pairs and then for the empty-trace pairs. Times are CPU times of the process, medians over rounds, and their ratios are
medians of the rounds' ratios. The floor is the pass's necessary multiplications and additions (prompts once, causal
attention, logits of completion tokens alone) at the rate of a large matrix product, measured in the same rounds.

Working memory is what a process of its own grows by at the peak of three passes, beside weights and gradients. Linux
only.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any, cast

import record
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bvpo.batches import PairBatch, SequenceBatch, collate
from bvpo.losses import DPO, reward_margin
from bvpo.packed import packed_logps, use_packed_attention
from bvpo.policy import by_side, padded_logps

CONFIG = LlamaConfig(  # three layers of SmolLM2-135M; the vocabulary is cut so that the head's share is that of 30
    vocab_size=4096,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=3,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
PROMPT, TRACE, ANSWER = (60, 200), (200, 900), (20, 150)  # least and most tokens

Logps = Callable[[PreTrainedModel, SequenceBatch], Tensor]
KINDS: dict[str, Logps] = {
    "padded": padded_logps,
    "packed": lambda model, batch: packed_logps(model, batch, share_prompts=False),
    "shared": packed_logps,
}


def make_batch(pairs: int, seed: int = 0) -> PairBatch:
    """Rows of random tokens."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return rng.choices(range(CONFIG.vocab_size), k=rng.randint(least, most))

    rows = []
    for key in range(pairs):
        prompt = tokens(*PROMPT)
        sides = {side: (tokens(*TRACE), tokens(*ANSWER)) for side in ("chosen", "rejected")}
        rows.append(
            {"prompt_key": key, "prompt": prompt, "empty_prompt": [*prompt, 1, 2]}
            | {side: trace + answer for side, (trace, answer) in sides.items()}
            | {f"empty_{side}": answer for side, (_, answer) in sides.items()}
        )
    return collate(rows, pad_token_id=0)


def make_models(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    policy = LlamaForCausalLM(copy.deepcopy(CONFIG))
    cast(nn.Module, policy).to(dtype)
    fault = use_packed_attention(policy)
    assert fault is None, fault
    reference = copy.deepcopy(policy)
    reference.requires_grad_(False)
    return policy, reference


def run(logps: Logps, policy: PreTrainedModel, reference: PreTrainedModel, batch: PairBatch) -> None:
    """One pass. Gradients stay: a step accumulates into them."""
    for sequences in (batch.trace, batch.empty):
        own = logps(policy, sequences)
        with torch.no_grad():
            held = logps(reference, sequences)
        losses = DPO(0.1)(by_side(own, sequences), by_side(held, sequences))
        losses.sum().backward()
        assert reward_margin(by_side(own, sequences), by_side(held, sequences)).isfinite().all()


# ---------------------------------------------------------------------- the floor


def necessary_flops(batch: PairBatch) -> dict[str, float]:
    """Multiplications and additions of one pass: forward 1, backward 2, the reference's forward 1."""
    weights = sum(p.numel() for name, p in LlamaForCausalLM(CONFIG).named_parameters() if "layers" in name)
    heads = CONFIG.num_hidden_layers * CONFIG.hidden_size
    flops: dict[str, float] = defaultdict(float)
    for sequences in (batch.trace, batch.empty):
        pairs = sequences.pairs
        prompts, completions = sequences.prompt_lengths, sequences.lengths - sequences.prompt_lengths
        tokens = int(prompts[:pairs].sum() + completions.sum())
        attended = int((prompts[:pairs] * (prompts[:pairs] + 1) // 2).sum())
        attended += int((completions * prompts + completions * (completions + 1) // 2).sum())
        flops["layers"] += 4 * 2 * tokens * weights
        flops["attention"] += 4 * 4 * attended * heads
        flops["head"] += 4 * 2 * int(completions.sum()) * CONFIG.vocab_size * CONFIG.hidden_size
    return dict(flops)


def matmul_seconds(dtype: torch.dtype) -> tuple[float, float]:
    """CPU seconds of a product of the size of the model's, and its operations."""
    rows, width, out = 4096, CONFIG.hidden_size, CONFIG.intermediate_size
    a, b = torch.randn(rows, width, dtype=dtype), torch.randn(out, width, dtype=dtype)
    started = time.process_time()
    for _ in range(5):
        nn.functional.linear(a, b)
    return time.process_time() - started, 5 * 2.0 * rows * width * out


# ---------------------------------------------------------------------- time and memory


def timed(dtype: torch.dtype, rounds: int, pairs: int) -> dict[str, Any]:
    """Medians over rounds in which every kind has its turn."""
    policy, reference = make_models(dtype)
    batch = make_batch(pairs)
    flops = necessary_flops(batch)
    seconds: dict[str, list[float]] = defaultdict(list)
    for round_ in range(rounds + 1):  # the first one warms up
        matmul, operations = matmul_seconds(dtype)
        seconds["floor"].append(sum(flops.values()) * matmul / operations)
        kinds = list(KINDS.items())
        for name, logps in kinds if round_ % 2 else kinds[::-1]:
            started = time.process_time()
            run(logps, policy, reference, batch)
            seconds[name].append(time.process_time() - started)
    seconds = {name: values[1:] for name, values in seconds.items()}

    def ratio(a: str, b: str) -> float:
        return median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    return {
        "seconds": {name: median(values) for name, values in seconds.items()},
        "padded_over_packed": ratio("padded", "packed"),
        "padded_over_shared": ratio("padded", "shared"),
        "over_floor": {name: ratio(name, "floor") for name in KINDS},
        "gflops": {name: value / 1e9 for name, value in flops.items()},
    }


def working_memory(kind: str, dtype: torch.dtype, pairs: int) -> float:
    """MiB that this process grows by; called in a process of its own."""
    policy, reference = make_models(dtype)
    batch = make_batch(pairs)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run(KINDS[kind], policy, reference, make_batch(1))  # libraries allocate what they keep
    before = memory("VmRSS")
    for _ in range(3):
        run(KINDS[kind], policy, reference, batch)
    return memory("VmHWM") - before


def memory(field: str) -> float:
    """MiB in /proc/self/status. The peak that getrusage gives is a parent's, where that one had a higher one."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def top_costs(dtype: torch.dtype, pairs: int) -> str:
    """What the shared pass spends its time on."""
    policy, reference = make_models(dtype)
    batch = make_batch(pairs)
    run(packed_logps, policy, reference, batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(packed_logps, policy, reference, batch)
    return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print the most costly operations instead")
    parser.add_argument("--memory", choices=list(KINDS), help="print the working memory of one kind instead")
    parser.add_argument("--json", help="write the figures to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    if options.memory:
        print(working_memory(options.memory, dtype, options.pairs))
        return
    if options.profile:
        print(top_costs(dtype, options.pairs))
        return
    facts = record.circumstances()
    figures = timed(dtype, options.rounds, options.pairs)
    command = [sys.executable, __file__, f"--dtype={options.dtype}", f"--pairs={options.pairs}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    figures["working_mib"] = {
        kind: float(subprocess.check_output([*command, f"--memory={kind}"], env=environment, text=True).split()[-1])
        for kind in KINDS
    }
    figures |= {"dtype": options.dtype, "threads": options.threads}
    for name, value in figures.items():
        shown = value if not isinstance(value, dict) else {key: round(number, 3) for key, number in value.items()}
        print(f"{name:20} {shown}")
    record.show(facts)
    record.write(options.json, facts, figures)


if __name__ == "__main__":
    main()
