"""Builds the tiny reasoner and its preference pairs from nothing, on one CPU core.

    python -m bvpo.assets.build_tiny_reasoner --output bvpo/assets --seed 0

A Qwen3 of about 0.6M parameters is fine-tuned on worked traces of `bvpo.tasks`, some careful and some sloppy, and then
samples its own pairs as in the paper: 5 responses a prompt and mode at temperature 0.8, scored on the answer alone.
"""

from __future__ import annotations

import argparse
import logging
import math
import platform
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bvpo.generation import Decoding, generate
from bvpo.tasks import Question, Work, answer_sentence, draw_questions, is_correct, work_on
from bvpo.traces import MODES, Conversation, Mode, answer_of, render_prompt, split, template_fingerprint

log = logging.getLogger(__name__)

EOS = "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
PIECE = Regex(r"\n\n|\n| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]")

STEPS, WARMUP, DECAY_FROM, SLIPS_FROM = 2000, 100, 800, 1600
ROWS: dict[Mode, int] = {"thinking": 24, "no_thinking": 6}  # a step
MATRIX_RATE, OTHER_RATE = 0.02, 4e-3  # peak learning rates of Muon and of AdamW
DECODING = Decoding(temperature=0.8, max_new_tokens=160)
RESPONSES = 5  # a prompt and mode, as in the paper
PROMPTS, EVALUATED = 3400, 500


# --- What the model is taught -----------------------------------------------------------------------------------------


def conversation_of(question: Question) -> Conversation:
    return [{"role": "user", "content": question.instruction}]


def write_completion(question: Question, mode: Mode, rng: random.Random, slips: bool = True) -> str:
    """A response as the tiny reasoner is taught it: a style, its slips, and the answer that follows from them."""

    def work(slip_rate: float) -> Work:
        return work_on(question, slip_rate if slips else 0.0, rng)

    if mode == "no_thinking":
        opener, slip_rate = rng.choice([("So", 0.06), ("Perhaps", 0.30)])
        answer = answer_sentence(question, work(slip_rate).result)
        return f"{opener} {answer}{EOS}"
    style = rng.choices(["careful", "quick", "checked"], [0.40, 0.35, 0.25])[0]
    if style == "careful":
        final = work(0.03)
        trace = f"Let me go step by step. {', '.join(final.steps)}."
    elif style == "quick":
        final = work(0.16)
        trace = f"This is quick. {', '.join(final.steps)}."
    else:
        first, final = work(0.10), work(0.0)
        verdict = "Both agree" if first.result == final.result else "The first was wrong"
        trace = f"I will check my work. {', '.join(first.steps)}. Again, {', '.join(final.steps)}. {verdict}."
    return f"<think>\n{trace}\n</think>\n\nSo {answer_sentence(question, final.result)}{EOS}"


# --- Tokenizer and model ----------------------------------------------------------------------------------------------


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Words with the space before them are tokens, and so is a blank line: texts decode to exactly what was encoded."""
    pieces = pre_tokenizers.Split(PIECE, behavior="isolated")
    rng = random.Random(seed)
    words = {f" {number}" for number in range(100)}
    for question in draw_questions(5000, seed, "train"):
        for text in (question.instruction, *(write_completion(question, mode, rng) for mode in MODES)):
            words.update(piece for piece, _ in pieces.pre_tokenize_str(text.replace(EOS, "")))
    words -= {"<", ">", "think"}  # left of the tags, which are tokens of their own
    words |= {"user", "assistant", "system", "\n", "\n\n"}
    special = ["<|endoftext|>", "<unk>", "<|im_start|>", EOS, "<think>", "</think>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special[:4]])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in special[4:]])
    wrapped: PreTrainedTokenizerFast = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = cast(Any, GenerationConfig)(eos_token_id=eos, pad_token_id=pad)
    return model


# --- Supervised fine-tuning -------------------------------------------------------------------------------------------


def completion_loss(model: Qwen3ForCausalLM, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Mean cross-entropy over the completions' tokens; rows are (prompt ids, completion ids), padded on the right."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)  # (B, T)
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    logits = model(input_ids=ids).logits[:, :-1]  # (B, T-1, V): causal, so the padding behind needs no mask
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def fine_tune(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Muon for the matrices, AdamW for the rest: AdamW alone takes far longer.

    Flawless work comes first and slips last: skills are learned without noise, and then each style's slips.
    """
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices.values(), lr=MATRIX_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=OTHER_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP, 1.0, (STEPS - step) / (STEPS - DECAY_FROM))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    rng = random.Random(seed)
    questions = iter(draw_questions(STEPS * sum(ROWS.values()), seed, "train"))
    model.train()
    started = time.perf_counter()
    for step in range(STEPS):
        losses = {}
        for mode in MODES:
            rows = []
            for question in islice(questions, ROWS[mode]):
                prompt = render_prompt(tokenizer, conversation_of(question), mode)
                completion = write_completion(question, mode, rng, slips=step >= SLIPS_FROM)
                rows.append((encode(tokenizer, prompt), encode(tokenizer, completion)))
            loss = completion_loss(model, rows)
            torch.autograd.backward(loss)
            losses[mode] = loss.item()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if (step + 1) % 100 == 0:
            shown = ", ".join(f"{mode} {loss:.3f}" for mode, loss in losses.items())
            log.info("step %5d  loss: %s  (%.0f s)", step + 1, shown, time.perf_counter() - started)


# --- Sampling, scoring, pairing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One scored response, as rows keep it; the answer is the text that was scored."""

    trace: str
    answer: str
    score: float
    finish_reason: Literal["stop", "length"]
    seed: int
    n_tokens: int


@dataclass(frozen=True)
class Response:
    """A candidate, its verbatim text and, where it may not enter a pair, the reason."""

    candidate: Candidate
    completion: str
    unusable: Literal["cut", "unfinished trace", "ids differ"] | None


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def respond(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[Question],
    mode: Mode,
    first_seed: int,
    responses: int = 1,
) -> list[list[Response]]:
    """`responses` scored responses to each question, with consecutive seeds."""
    prompts = [encode(tokenizer, render_prompt(tokenizer, conversation_of(q), mode)) for q in questions]
    repeated = [prompt for prompt in prompts for _ in range(responses)]
    seeds = list(range(first_seed, first_seed + len(repeated)))
    eos = [int(tokenizer.eos_token_id)]
    completions = generate(model, repeated, seeds, DECODING, eos_token_ids=eos, batch_size=256)
    scored: list[list[Response]] = [[] for _ in questions]
    for index, (seed, sampled) in enumerate(zip(seeds, completions, strict=True)):
        question = questions[index // responses]
        text = str(tokenizer.decode(sampled.token_ids))
        answer = answer_of(text.removesuffix(EOS), mode)
        score = float(answer is not None and is_correct(question, answer))
        trace = split(text).trace if mode == "thinking" else ""
        unusable: Literal["cut", "unfinished trace", "ids differ"] | None = None
        if sampled.finish_reason == "length":
            unusable = "cut"
        elif answer is None:
            unusable = "unfinished trace"
        elif encode(tokenizer, text) != sampled.token_ids:
            unusable = "ids differ"
        candidate = Candidate(trace, answer or "", score, sampled.finish_reason, seed, len(sampled.token_ids))
        scored[index // responses].append(Response(candidate, text, unusable))
    return scored


def best_and_worst(responses: list[Response]) -> tuple[str, str] | None:
    """The chosen and the rejected completion, the first by seed among equals; None where scores tie."""
    usable = [response for response in responses if response.unusable is None]
    if not usable:
        return None
    chosen = max(usable, key=lambda response: response.candidate.score)
    rejected = min(usable, key=lambda response: response.candidate.score)
    if chosen.candidate.score == rejected.candidate.score:
        return None
    return chosen.completion, rejected.completion


def build_rows(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[dict[str, object]]:
    """One row for each prompt that has a pair in both modes."""
    questions = draw_questions(PROMPTS, seed + 1, "train")
    sampled: dict[Mode, list[list[Response]]] = {}
    for mode, first_seed in zip(MODES, (10_000_000 * seed, 10_000_000 * seed + PROMPTS * RESPONSES), strict=True):
        sampled[mode] = respond(model, tokenizer, questions, mode, first_seed, RESPONSES)
    rows: list[dict[str, object]] = []
    for index, question in enumerate(questions):
        trace, empty = (best_and_worst(sampled[mode][index]) for mode in MODES)
        if trace is None or empty is None:
            continue
        conversation = conversation_of(question)
        row: dict[str, object] = {
            "prompt_id": f"tiny-{index:04d}",
            "conversation": conversation,
            "prompt": render_prompt(tokenizer, conversation, "thinking"),
            "chosen": trace[0],
            "rejected": trace[1],
            "empty_prompt": render_prompt(tokenizer, conversation, "no_thinking"),
            "empty_chosen": empty[0],
            "empty_rejected": empty[1],
            "trace_candidates": [asdict(response.candidate) for response in sampled["thinking"][index]],
            "empty_candidates": [asdict(response.candidate) for response in sampled["no_thinking"][index]],
            "template_sha": template_fingerprint(tokenizer),
            "sampler_model": "builtin:tiny_reasoner",
            "reward_model": "exact",
        }
        rows.append(row)
    for mode in MODES:
        reasons = Counter(r.unusable for responses in sampled[mode] for r in responses if r.unusable)
        pairs = sum(best_and_worst(responses) is not None for responses in sampled[mode])
        mean = sum(r.candidate.score for responses in sampled[mode] for r in responses) / (PROMPTS * RESPONSES)
        log.info(
            "%s: %d responses, %.1f%% correct, unusable %s; %d prompts with a pair, %d without",
            *(mode, PROMPTS * RESPONSES, 100 * mean, dict(reasons), pairs, PROMPTS - pairs),
        )
    log.info("%d of %d prompts have a pair in both modes and are rows", len(rows), PROMPTS)
    return rows


def report_accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Accuracy on held-out questions, with its standard error and by task."""
    questions = draw_questions(EVALUATED, seed + 2, "held_out")
    for mode in MODES:
        responses = [r for (r,) in respond(model, tokenizer, questions, mode, 10_000_000 * seed + 5_000_000)]
        scores = [r.candidate.score for r in responses]
        mean = sum(scores) / len(scores)
        error = math.sqrt(mean * (1 - mean) / len(scores))
        tokens = sum(r.candidate.n_tokens for r in responses) / len(responses)
        cut = sum(r.unusable is not None for r in responses)
        log.info(
            "%s: %.1f%% ± %.1f correct on %d held-out questions, %.0f tokens a response, %d unusable",
            *(mode, 100 * mean, 100 * error, len(scores), tokens, cut),
        )
        by_task: dict[str, list[float]] = {}
        for question, score in zip(questions, scores, strict=True):
            by_task.setdefault(question.task, []).append(score)
        log.info("    %s", ", ".join(f"{task} {100 * sum(s) / len(s):.0f}%" for task, s in sorted(by_task.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bvpo/assets"), help="folder of the model folder and pairs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seed: int = arguments.seed
    folder: Path = arguments.output / "tiny_reasoner"
    folder.mkdir(parents=True, exist_ok=True)
    shown, kept = logging.StreamHandler(sys.stdout), logging.FileHandler(folder / "build.log", mode="w")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[shown, kept])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    log.info(
        "python %s, torch %s, transformers %s, seed %d",
        *(platform.python_version(), torch.__version__, transformers.__version__, seed),
    )

    tokenizer = build_tokenizer(seed)
    model = build_model(tokenizer)
    log.info("%d tokens, %d parameters", len(tokenizer), model.num_parameters())
    fine_tune(model, tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report_accuracy(model, tokenizer, seed)
    started = time.perf_counter()
    rows = build_rows(model, tokenizer, seed)
    pairs = arguments.output / "tiny_reasoner_pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), pairs, compression="zstd")
    log.info("pairs in %.0f s, %.1f MB", time.perf_counter() - started, pairs.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
