"""Tokens a second of `Transformers`, of `model.generate` prompt by prompt, and of `model.generate` in fixed batches.

    python benchmarks/generation.py [--model tiny|large] [--prompts 64] [--responses 5] [--batch-size 64] [--json FILE]

All three answer the same requests, `--responses` to each prompt, with the same model, temperature and longest response;
prompt by prompt takes `--alone` of them, evenly spaced. A response counts with its tokens up to its EOS. Fixed batches
take the requests in the order given, left-padded, and run until the last row has ended. The three run in turn,
`--rounds` times; figures are medians, by the clock and by the processor's time, which other programs on the machine
disturb less.

- `tiny`: the built-in reasoner on its own task, which ends its responses itself.
- `large`: random weights in the shape of a Llama of 135 million parameters (30 layers, 576 wide, vocabulary 49,152).
  Its responses have prescribed lengths, log-normal and the same for all three: a hook on the model's output makes it
  count down from the prompt's last token to the EOS. So every draw is a nearly certain one; a trained model's is
  now and then beyond the most probable 64 tokens, and then costs `Transformers` a second look.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, cast

import record
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bvpo.generation import Decoding, Request, Transformers
from bvpo.pairs import encode_prompt
from bvpo.policy import load_policy, load_tokenizer
from bvpo.tasks import draw_questions
from bvpo.traces import render_prompt


@dataclass(frozen=True)
class Workload:
    model: PreTrainedModel
    requests: list[Request]
    decoding: Decoding
    eos: int


def tiny(prompts: int, responses: int) -> Workload:
    """Held-out questions in both modes."""
    tokenizer = load_tokenizer("builtin:tiny_reasoner")
    ids = []
    for number, question in enumerate(draw_questions(prompts, 0, "held_out")):
        mode = ("thinking", "no_thinking")[number % 2]
        conversation = [{"role": "user", "content": question.instruction}]
        ids.append(encode_prompt(tokenizer, render_prompt(tokenizer, conversation, cast(Any, mode))))
    requests = [Request(prompt, seed) for seed, prompt in enumerate(p for p in ids for _ in range(responses))]
    model = load_policy("builtin:tiny_reasoner").eval()
    return Workload(model, requests, Decoding(0.8, max_new_tokens=160), cast(int, tokenizer.eos_token_id))


def large(prompts: int, responses: int) -> Workload:
    """Prompts of 20 to 100 random tokens, and the length of the response as their last one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    model, rng, most = LlamaForCausalLM(config).eval(), random.Random(0), 256

    def count_down(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        kept = inputs["input_ids"][:, -output.logits.shape[1] :]  # the positions whose logits are asked for
        output.logits.scatter_(2, (kept - 1).clamp(min=0)[..., None], 100.0)

    model.register_forward_hook(count_down, with_kwargs=True)
    requests: list[Request] = []
    for _ in range(prompts):
        prompt = [rng.randrange(1000, 49152) for _ in range(rng.randint(20, 100))]
        for _ in range(responses):
            length = min(most, max(4, round(rng.lognormvariate(3.6, 0.7))))  # half below 37
            requests.append(Request([*prompt, length], len(requests)))
    return Workload(model, requests, Decoding(0.8, max_new_tokens=most), 0)


def ours(work: Workload, batch_size: int) -> int:
    ended = Transformers(work.model, batch_size).complete(work.requests, work.decoding, [work.eos])
    return sum(len(completion.token_ids) for _, completion in ended)


def fixed(work: Workload, batch_size: int) -> int:
    """`model.generate`; tokens written."""
    config = cast(Any, GenerationConfig)(
        do_sample=True,
        temperature=work.decoding.temperature,
        top_k=0,
        max_new_tokens=work.decoding.max_new_tokens,
        eos_token_id=work.eos,
        pad_token_id=1,
    )
    written = 0
    for start in range(0, len(work.requests), batch_size):
        prompts = [list(request.prompt) for request in work.requests[start : start + batch_size]]
        width = max(map(len, prompts))
        ids = torch.tensor([[1] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            output = cast(Any, work.model).generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for row in output[:, width:].tolist():
            written += row.index(work.eos) + 1 if work.eos in row else len(row)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "large"), default="tiny")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--responses", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--alone", type=int, default=64, help="requests, evenly spaced, that go prompt by prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the figures to this file too")
    options = parser.parse_args()
    facts = record.circumstances()
    torch.set_num_threads(options.threads)
    work = {"tiny": tiny, "large": large}[options.model](options.prompts, options.responses)
    alone = replace(work, requests=work.requests[:: max(1, len(work.requests) // options.alone)])
    ways: dict[str, Callable[[], int]] = {
        "Transformers": lambda: ours(work, options.batch_size),
        "generate, prompt by prompt": lambda: fixed(alone, 1),
        "generate, fixed batches": lambda: fixed(work, options.batch_size),
    }
    clocks = {"clock": time.perf_counter, "processor": time.process_time}
    speeds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in ways} for clock in clocks}
    tokens: dict[str, list[int]] = {name: [] for name in ways}
    fixed(replace(work, requests=work.requests[:2], decoding=Decoding(max_new_tokens=4)), 2)  # warms up
    for _ in range(options.rounds):
        for name, way in ways.items():
            torch.manual_seed(0)
            began = {clock: read() for clock, read in clocks.items()}
            tokens[name].append(way())
            for clock, read in clocks.items():
                speeds[clock][name].append(tokens[name][-1] / (read() - began[clock]))
    parameters = sum(p.numel() for p in work.model.parameters())
    print(
        f"{options.model}: {parameters / 1e6:.1f}M parameters, {len(work.requests)} requests, B = {options.batch_size}"
    )
    print(", ".join(f"{name}: {median(values):.0f} tokens" for name, values in tokens.items()))
    ratios: dict[str, dict[str, float]] = {}
    for clock, by_way in speeds.items():
        medians = {name: median(values) for name, values in by_way.items()}
        ratios[clock] = {name: medians["Transformers"] / value for name, value in medians.items()}
        for name, values in by_way.items():
            rounds = ", ".join(f"{value:.0f}" for value in values)
            print(
                f"{name:28}{medians[name]:8.0f} tokens a second of the {clock} ({rounds}); "
                f"Transformers is {ratios[clock][name]:.2f} times as fast"
            )
    record.show(facts)
    figures = {"threads": options.threads, "tokens_a_second": speeds, "tokens": tokens, "ratios": ratios}
    record.write(options.json, facts, figures)


if __name__ == "__main__":
    main()
