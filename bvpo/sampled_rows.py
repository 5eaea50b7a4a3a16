"""Responses → scores → pairs → rows: the second half of `python -m bvpo.sample`.

Scores are of answers alone, so which response is chosen or rejected says nothing of its trace beyond its answer.
Prompts are taken a chunk at a time; memory holds no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bvpo.engines import ServerEngine
from bvpo.errors import UserError
from bvpo.journal import Journal
from bvpo.pairing import Response, problem_of
from bvpo.prompts import Prompt
from bvpo.reward_models import load_config, load_tokenizer
from bvpo.rewards import CachedReward, Item, MathAnswer, SequenceRewardModel, TaskAnswer
from bvpo.row_writer import SCHEMA, write_rows
from bvpo.rows import without_stop
from bvpo.sample_report import Summary
from bvpo.sampler import Kind, Sampler
from bvpo.sampling import Sampling
from bvpo.traces import MODES, Mode, split, starts_with_bos

CHUNK = 256  # prompts
PREFIX: dict[Mode, str] = {"thinking": "", "no_thinking": "empty_"}
CANDIDATES: dict[Mode, str] = {"thinking": "trace_candidates", "no_thinking": "empty_candidates"}


@dataclass(frozen=True)
class Answered:
    """A prompt with its scored responses and, of each mode, its pair or why there is none."""

    prompt: Prompt
    responses: dict[Mode, list[Response]]
    pairs: dict[Mode, tuple[str, str] | str]

    def is_row(self, one_sided: bool) -> bool:
        """Whether there are pairs enough."""
        return sum(not isinstance(pair, str) for pair in self.pairs.values()) >= (1 if one_sided else 2)


def check_start(sampler: Sampler) -> None:
    """Raises UserError where what follows from the responses is bound to fail: before any is generated."""
    options, own = sampler.options, sampler.reward
    if options.anchor_traces and options.stage not in ("score", "pairs"):
        _check_anchors(sampler)
    if options.stage == "generate":
        return
    _check_pairs(options)
    _ = own.fingerprint
    if isinstance(own, TaskAnswer | MathAnswer) and all(prompt.reference is None for prompt in sampler.prompts):
        raise UserError(
            f"{options.prompts}: the reward {own.name} compares with a right answer, and no prompt has one (reference, "
            "answer, solution): name its column by --reference, or give a reward model as --reward"
        )
    if isinstance(own, SequenceRewardModel) and options.stage in ("all", "score"):
        load_config(own.model, own.trust_remote_code)
        load_tokenizer(own.model, own.trust_remote_code)


def _check_anchors(sampler: Sampler) -> None:
    options, engine = sampler.options, sampler.options.backend
    known = options.temperature == 0 or options.temperature == options.top_p == 1
    if isinstance(engine, ServerEngine) and not engine.processed_logprobs and not known:
        raise UserError(
            "anchor_traces: each needs its log-probability after temperature and top-p, which this server is not said "
            "to give: start it with --logprobs-mode processed_logprobs and give backend.processed_logprobs: true, or "
            "sample at temperature 1 and top_p 1"
        )
    sampler.ends("anchor")


def _check_pairs(options: Sampling) -> None:
    others = sum(mode not in options.pairs.of_two for mode in MODES)  # modes whose pair one response may give
    if others >= (1 if options.one_sided else 2):
        return
    if options.samples < 2:
        raise UserError("samples 1: a pair is of two responses: give at least 2; the paper has 5")
    if options.temperature == 0:
        raise UserError(
            f"temperature 0: the {options.samples} responses to a prompt would be the same and give no pair: give a "
            "temperature above 0; the paper has 0.8"
        )


class SampledRows:
    """What follows from a sampler's responses. Every stage goes on where an earlier start stopped."""

    def __init__(self, sampler: Sampler, journal: Journal) -> None:
        self.sampler, self.options, self.journal = sampler, sampler.options, journal

    def score(self) -> None:
        """Score this shard's answers; what is scored already is found in the folder."""
        for _ in self.answered(self.sampler.mine):
            pass

    def draw_anchors(self) -> None:
        """Draw this shard's anchor traces, of the prompts that give a row."""
        if not self.options.anchor_traces:
            return
        own = {found.prompt.id for found in self.answered(self.sampler.mine) if found.is_row(self.options.one_sided)}
        blocks = ([prompt for prompt in block if prompt.id in own] for block in self.sampler.own_blocks)
        self.sampler.complete([self.sampler.jobs(block, ["anchor"]) for block in blocks], self.journal, "anchors")

    def write(self) -> Summary:
        """Write the rows of all prompts; an older file is replaced at once, or not at all.

        Raises:
            UserError: Responses are missing: a shard is not finished.
        """
        sampler, options = self.sampler, self.options
        summary = Summary(sampler.total, sampler.total - len(sampler.prompts), options.samples)
        self._check_there(sampler.prompts, MODES)
        leave_out = () if options.anchor_traces else ("anchor_traces",)
        summary.rows = write_rows(Path(options.output), self._rows(summary), leave_out)
        return summary

    def _rows(self, summary: Summary) -> Iterator[dict[str, Any]]:
        for found in self.answered(self.sampler.prompts):
            summary.count(found.responses, found.pairs)
            if found.is_row(self.options.one_sided):
                yield self.row(found, summary)

    def _check_there(self, prompts: Sequence[Prompt], kinds: Sequence[Kind]) -> None:
        missing = [job.prompt.id for job in self.sampler.jobs(prompts, kinds) if job.key not in self.journal]
        if missing:
            raise UserError(
                f"{self.options.work}: {len(missing)} responses are missing (the first to prompt {missing[0]}): start "
                "the shards that are not finished again, or this command with stage all"
            )

    def answered(self, prompts: Sequence[Prompt]) -> Iterator[Answered]:
        """The prompts with their responses, scored and paired."""
        options = self.options
        self._check_there(prompts, MODES)
        with tqdm(total=len(prompts), desc="scoring", unit="prompt", disable=not self.sampler.progress) as bar:
            for start in range(0, len(prompts), CHUNK):
                part = prompts[start : start + CHUNK]
                responses = self._scored(part)
                for prompt in part:
                    own = {mode: responses[prompt.id, mode] for mode in MODES}
                    pairs: dict[Mode, tuple[str, str] | str] = {}
                    unfit = self._holds_bos(prompt)
                    for mode in MODES:
                        pair = options.pairs.pair(own[mode], mode, self.sampler.think, options.seed)
                        pairs[mode] = "the prompt holds BOS as text" if unfit else pair
                    yield Answered(prompt, own, pairs)
                bar.update(len(part))

    def _holds_bos(self, prompt: Prompt) -> bool:
        """Whether BOS stands inside a prompt, as where it asks about the HTML tag `<s>`: no row is read with that."""
        tokenizer, bos = self.sampler.tokenizer, self.sampler.tokenizer.bos_token
        if not bos or not any(str(bos) in message["content"] for message in prompt.conversation):
            return False
        if str(bos) in self.sampler.stops or not starts_with_bos(tokenizer):
            return False
        return any(tokenizer.bos_token_id in self.sampler.prompt_ids(prompt, mode)[1:] for mode in MODES)

    def _scored(self, prompts: Sequence[Prompt]) -> dict[tuple[str, Mode], list[Response]]:
        """Responses of both modes, by prompt id and mode; only complete ones have a score."""
        keys = [(prompt, mode, k) for prompt in prompts for mode in MODES for k in range(self.options.samples)]
        opens = {prompt.id: self.sampler.opens(prompt) for prompt in prompts}
        responses = [
            self._response(self.journal[prompt.id, mode, k], mode, mode == "thinking" and opens[prompt.id])
            for prompt, mode, k in keys
        ]
        complete = [index for index, r in enumerate(responses) if r.problem in (None, "ids differ")]
        prompt_of = {index: keys[index][0] for index in complete}
        items = [Item(prompt_of[k].conversation, responses[k].answer, prompt_of[k].reference) for k in complete]
        for index, score in zip(complete, self._scores.scores(items), strict=True):
            problem = "no score" if score is None else responses[index].problem
            responses[index] = replace(responses[index], score=score, problem=problem)
        grouped: dict[tuple[str, Mode], list[Response]] = {(p.id, mode): [] for p in prompts for mode in MODES}
        for (prompt, mode, _), response in zip(keys, responses, strict=True):
            grouped[prompt.id, mode].append(response)
        return grouped

    @cached_property
    def _scores(self) -> CachedReward:
        return CachedReward(self.sampler.reward, self.options.work, self.sampler.part)

    def _response(self, record: dict[str, Any], mode: Mode, opened: bool) -> Response:
        body, think = without_stop(record["text"], self.sampler.stops), self.sampler.think
        problem, trace, answer = problem_of(body, mode, record["finish_reason"], record["same_ids"], think, opened)
        kept = ("text", "finish_reason", "seed", "n_tokens", "logprob")
        return Response(answer=answer, trace=trace, problem=problem, **{name: record[name] for name in kept})

    def row(self, found: Answered, summary: Summary) -> dict[str, Any]:
        """A row of the documented schema."""
        sampler, prompt = self.sampler, found.prompt
        row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
        row |= {"prompt_id": prompt.id, "conversation": prompt.conversation}
        for mode, prefix in PREFIX.items():
            pair = found.pairs[mode]
            row[f"{prefix}prompt"] = sampler.prompt_text(prompt, mode)
            row[f"{prefix}chosen"], row[f"{prefix}rejected"] = (None, None) if isinstance(pair, str) else pair
            row[CANDIDATES[mode]] = [response.candidate() for response in found.responses[mode]]
        if self.options.anchor_traces:
            row["anchor_traces"] = self._anchors(found, summary)
        row |= {"template_sha": sampler.template, "sampler_model": sampler.policy}
        return row | {"reward_model": sampler.reward.name}

    def _anchors(self, found: Answered, summary: Summary) -> list[dict[str, Any]]:
        """The traces that can stand in the pair's completions with the log-probability that they were drawn with.

        A row keeps no think tags: in training an anchor trace begins as the pair's completions do. So it is left out
        where it, or they, do not open the block as the prompt wants it. Leaving traces out shifts the row's
        log-marginals by one constant, which cancels.
        """
        self._check_there([found.prompt], ["anchor"])
        think, pair, opens = self.sampler.think, found.pairs["thinking"], self.sampler.opens(found.prompt)
        sides = [split(text, think) for text in (() if isinstance(pair, str) else pair)]
        traces = []
        for number in range(self.options.anchor_traces):
            record = self.journal[found.prompt.id, "anchor", number]
            own, logprob = split(record["text"], think), record["logprob"]
            whole = record["same_ids"] and record["text"].endswith(think.close)
            begins = own.opened != opens and all((own.opened, own.before) == (s.opened, s.before) for s in sides)
            if whole and begins and logprob is not None and math.isfinite(logprob):
                traces.append({"trace": own.trace, "logprob": logprob})
        summary.lost_anchors += self.options.anchor_traces - len(traces)
        return traces
