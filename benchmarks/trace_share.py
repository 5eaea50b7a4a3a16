"""Which share of the trace gradient's variance the sampled traces cause, on the tiny reasoner at θ = θ_ref.

    python benchmarks/trace_share.py [--prompts 256] [--samples 256] [--seed 0] [--temperature 1.0] [--json FILE]

A row is a prompt and two answers, formed as the built-in pairs are: the first right and the first wrong answer of 5
responses. Its traces are those of the pair and of the next response to the prompt with the very same answers. Which
responses these are is settled by answers alone, so both traces of an answer are independent draws from the sampler's
posterior: at T = 1 that is π_ref(r|x,y), at another T the tempered sampler's. With a row's gradients g and g' so drawn,

    trΣ_t = Var E[g | row] + E Var[g | row]        answers' part and traces' part (Theorem 1 speaks of the second)
    E Var[g | row] = E ½‖g − g'‖²                  trΣ_t by the U-statistic over the same rows

in exact gradients. An answer that never comes again has no second trace, and its row is left out: this favours frequent
answers. So the responses to a prompt go on, up to `--samples`, until both answers came twice, and the table has a line
for the rows that fewer responses would have found. `pairs' trΣ_t` is over all pairs, and `pairs' share` the least share
there: with no variance from the traces of rows left out. Errors are a delete-one-row jackknife of the ratio of means.
Shapes: M rows, P parameters, K subsets of rows.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, field, replace
from typing import cast

import record
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from bvpo.assets.build_tiny_reasoner import DECODING, conversation_of
from bvpo.batches import SequenceBatch
from bvpo.generation import generate
from bvpo.losses import DPO
from bvpo.moments import GradientMoments
from bvpo.pairs import encode_prompt
from bvpo.policy import load_policy, load_tokenizer, sequence_logps
from bvpo.tasks import Question, draw_questions, is_correct
from bvpo.traces import render_prompt, split

LOSS = DPO(beta=0.5)  # as in experiments/alpaca.yaml; at θ_ref it scales both parts alike
RESPONSES = 5  # from which each of the built-in pairs was formed
BUDGETS = (RESPONSES, 16, 64, 256, 1024)  # responses to a prompt


@dataclass
class Prompt:
    question: Question
    token_ids: list[int]
    seed: int  # of its first response; the next ones follow
    completions: list[list[int]] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)  # of the completions, verbatim; None: not finished

    def draws(self) -> tuple[list[int], list[int]] | None:
        """Indices of the responses with the chosen and with the rejected answer; None where there is no pair."""
        pair: dict[bool, str] = {}
        for answer in self.answers[:RESPONSES]:
            if answer is not None:
                pair.setdefault(is_correct(self.question, answer), answer)
        if len(pair) < 2:
            return None
        chosen, rejected = ([n for n, answer in enumerate(self.answers) if answer == pair[s]] for s in (True, False))
        return chosen, rejected

    def needed(self) -> float:
        """Responses until both answers had two traces; infinite where that has not happened."""
        draws = self.draws()
        return max(own[1] for own in draws) + 1 if draws and min(map(len, draws)) > 1 else math.inf


def sample_prompts(policy: PreTrainedModel, options: argparse.Namespace, budgets: list[int]) -> list[Prompt]:
    """Prompts and their responses; those with a pair go on, budget by budget, until both answers came twice."""
    tokenizer = load_tokenizer("builtin:tiny_reasoner")
    prompts = []
    questions = draw_questions(options.prompts, options.seed + 1, "train")  # with seed 0, those of the built-in pairs
    for index, question in enumerate(questions):
        text = render_prompt(tokenizer, conversation_of(question), "thinking")
        prompts.append(Prompt(question, encode_prompt(tokenizer, text), (options.seed * 10_000 + index) * 10_000))
    decoding = replace(DECODING, temperature=options.temperature)
    asked = prompts
    for budget in budgets:
        wanted = [(prompt, n) for prompt in asked for n in range(len(prompt.answers), budget)]
        ids, seeds = [prompt.token_ids for prompt, _ in wanted], [prompt.seed + n for prompt, n in wanted]
        eos, label = [cast(int, tokenizer.eos_token_id)], f"{len(asked)} prompts, up to {budget} responses"
        completions = generate(policy, ids, seeds, decoding, eos_token_ids=eos, batch_size=256, progress=label)
        for (prompt, _), completion in zip(wanted, completions, strict=True):
            response = split(str(tokenizer.decode(completion.token_ids[:-1])))
            finished = completion.finish_reason == "stop" and response.closed
            prompt.completions.append(completion.token_ids)
            prompt.answers.append(response.answer if finished else None)
        asked = [prompt for prompt in asked if prompt.draws() and prompt.needed() > budget]
    return prompts


def row_gradient(policy: PreTrainedModel, row: Prompt, draw: int) -> Tensor:
    """(P,) gradient of the DPO loss with both answers' first (0) or second (1) trace; the reference is the policy."""
    draws = row.draws()
    assert draws is not None
    sequences = [torch.tensor(row.token_ids + row.completions[own[draw]]) for own in draws]
    lengths = torch.tensor([len(ids) for ids in sequences])
    prompt_lengths = torch.full_like(lengths, len(row.token_ids))
    logps = sequence_logps(policy, SequenceBatch(pad_sequence(sequences, True), prompt_lengths, lengths, 1))
    reference = replace(logps, chosen=logps.chosen.detach(), rejected=logps.rejected.detach())
    gradients = torch.autograd.grad(LOSS(logps, reference).sum(), list(policy.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


@dataclass(frozen=True)
class Share:
    """trΣ_t per pair over the rows that so many responses to a prompt find, its parts, and the traces' share in it."""

    responses: int
    rows: int
    total: float
    traces: float
    answers: float
    share: float
    standard_error: float


def trace_share(moments: GradientMoments, found: Tensor, responses: int) -> Share:
    """The share over the rows of `found`, (M,) bool. The estimators 0 and 1 of `moments` are g and g'."""
    inner = moments.gram.diagonal(dim1=-2, dim2=-1)  # (2, 2, M)
    half_squares = (inner[0, 0] + inner[1, 1]) / 2 - inner[0, 1]

    def parts(keep: Tensor) -> tuple[Tensor, Tensor]:  # (K, M) → (K,) traces' part and total
        covariance = moments.statistics(keep).covariance
        return keep @ half_squares / keep.sum(-1), (covariance[0, 0] + covariance[1, 1]) / 2

    rows, kept = int(found.sum()), found.double()
    traces, total = (float(part) for part in parts(kept[None]))
    without_one = parts(kept * moments.leave_one_step_out()[found])
    error = float((rows - 1) * (without_one[0] / without_one[1]).var(correction=0)) ** 0.5
    return Share(responses, rows, total, traces, total - traces, traces / total, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples", type=int, default=256, help="most responses to a prompt")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and responses")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--json", help="write the figures to this file too")
    options = parser.parse_args()
    if options.samples < RESPONSES:
        parser.error(f"--samples must be ≥ {RESPONSES}, the responses that a pair is formed from")
    measured = record.circumstances()
    torch.set_num_threads(1)
    policy = load_policy("builtin:tiny_reasoner")
    budgets = [*(budget for budget in BUDGETS if budget < options.samples), options.samples]
    prompts = sample_prompts(policy, options, budgets)
    rows = [prompt for prompt in prompts if prompt.needed() <= options.samples]
    needed = torch.tensor([row.needed() for row in rows])
    if int((needed <= budgets[0]).sum()) < 3:
        parser.error("fewer than 3 rows in the table's first line: raise --prompts")
    first, second = (torch.stack([row_gradient(policy, row, draw) for row in rows]) for draw in (0, 1))
    moments = GradientMoments.from_gradients(first, second)
    shares = [trace_share(moments, needed <= budget, budget) for budget in budgets]

    pairs = [prompt for prompt in prompts if prompt.draws()]
    all_total = float(torch.stack([row_gradient(policy, pair, 0) for pair in pairs]).var(0).sum())
    answers = [answer for prompt in prompts for answer in prompt.answers]
    facts = vars(options) | {
        "pairs": len(pairs),  # with a second trace or without
        "pairs' trΣ_t": f"{all_total:.4g}",
        "pairs' share": f"≥ {shares[-1].traces * len(rows) / len(pairs) / all_total:.3f}",
        "responses": len(answers),
        "unfinished": answers.count(None),
    }
    table = Table("responses", "rows", "trΣ_t a pair", "traces", "answers", "traces' share", "95% interval")
    for s in shares:
        reach = stats.t.ppf(0.975, s.rows - 1) * s.standard_error
        cells = [f"{s.total:.4g}", f"{s.traces:.4g}", f"{s.answers:.4g}", f"{s.share:.3f} ± {s.standard_error:.3f}"]
        table.add_row(f"{s.responses}", f"{s.rows}", *cells, f"{s.share - reach:.3f} to {s.share + reach:.3f}")
    Console(width=110).print(table)
    for name, value in facts.items():
        print(f"{name:14} {value}")
    record.show(measured)
    record.write(options.json, measured, facts | {"shares": [asdict(s) for s in shares]})


if __name__ == "__main__":
    main()
