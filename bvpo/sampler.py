"""Prompts → responses in both modes → scores → pairs: the work behind `python -m bvpo.sample`.

The paper's D_t and D_e: a model answers each prompt several times with a trace and with thinking disabled, the answers
alone are scored, and the best and the worst of each mode make the row's two pairs.

Every response has a seed of its own, made from what it answers, and is written down the moment it ends. So a run that
was killed goes on where it was, shards on other machines write into the same folder, and the rows are the same however
often and wherever it ran.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bvpo.decoding import Decoding
from bvpo.engines import Engine, TransformersEngine
from bvpo.errors import UserError
from bvpo.generation import Backend, Completion, Request
from bvpo.journal import Journal
from bvpo.pairing import BestWorst, PairSource, Response, problem_of, response_seed
from bvpo.pairs import encode_completion, encode_prompt
from bvpo.policy import context_length, load_tokenizer, stop_tokens
from bvpo.prompts import Prompt, load_prompts
from bvpo.rewards import CachedReward, Item, Reward, reward
from bvpo.row_writer import SCHEMA, write_rows
from bvpo.rows import without_stop
from bvpo.sample_report import Summary
from bvpo.traces import MODES, Mode, ThinkFormat, render_prompt, split, template_fingerprint, think_format

Kind = Literal["thinking", "no_thinking", "anchor"]
Stage = Literal["all", "generate", "score", "pairs"]
CHUNK = 256  # prompts scored, paired and held in memory at a time


@dataclass(frozen=True)
class Sampling:
    """What is sampled, how it is scored and where it goes.

    Args:
        policy: The model that answers: a Hub id, a folder, or `builtin:tiny_reasoner`.
        prompts: A JSONL or Parquet file, a Hub data set id, or `builtin:tasks`.
        output: The file of rows, .jsonl or .parquet. Responses and scores are kept beside it, in `OUTPUT.work`.
        samples: Responses to a prompt in each mode.
        temperature: Of the responses. Anchor traces are drawn at it too.
        top_p: Only the most probable tokens that sum to at least this are drawn from. Below 1 some traces are never
            drawn, and a marginal anchor misses them.
        max_new_tokens: Longer responses are cut, and enter no pair.
        seed: Of all responses.
        reward: What scores the answers: a reward model's Hub id or folder, `builtin:tasks`, `math`, or a class path.
        pairs: What makes a pair of the responses.
        anchor_traces: Further traces of each prompt, drawn independently of the pair, for the marginal anchor.
        backend: What generates.
        think: How the model marks its traces: a name or the fields of a format, as in `data.think`.
        limit: The first so many prompts; null takes all.
        reference: The prompts' column with the right answer, where it has a name of its own.
        max_prompt_tokens: Longer prompts are left out, as are those that leave too few positions to answer in.
        one_sided: Also keep rows that have a pair in one mode only.
        stage: `generate`, `score` or `pairs` alone. `pairs` generates nothing: it joins what shards have written.
        shard: `i/n`: answer and score the i-th of n parts of the prompts, into the same folder.
    """

    policy: str
    prompts: str
    output: str
    samples: int = 5
    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int = 4096
    seed: int = 0
    reward: Reward | str = "builtin:tasks"
    pairs: PairSource = field(default_factory=BestWorst)
    anchor_traces: int = 0
    backend: Engine = field(default_factory=TransformersEngine)
    think: str | ThinkFormat = "qwen3"
    limit: int | None = None
    reference: str | None = None
    max_prompt_tokens: int | None = None
    one_sided: bool = False
    stage: Stage = "all"
    shard: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("anchor_traces", 0), ("max_new_tokens", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be ≥ {least}, got {value}")
        if Path(self.output).suffix not in (".jsonl", ".parquet"):
            raise UserError(f"output {self.output}: give a file that ends in .jsonl or .parquet")
        _ = self.decoding, self.part
        if self.shard is not None and self.stage == "pairs":
            raise UserError("the rows are made from all shards together: give stage pairs without a shard")

    @property
    def decoding(self) -> Decoding:
        try:
            return Decoding(self.temperature, self.top_p, self.max_new_tokens)
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def work(self) -> Path:
        """The folder of what is kept between starts."""
        return Path(f"{self.output}.work")

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many parts, from 0."""
        index, slash, parts = (self.shard or "1/1").partition("/")
        if not (slash and index.isdigit() and parts.isdigit() and 1 <= int(index) <= int(parts)):
            raise UserError(f"shard {self.shard!r}: expected i/n with 1 ≤ i ≤ n, such as 2/8")
        return int(index) - 1, int(parts)


@dataclass(frozen=True)
class Job:
    """One response to be sampled: which prompt's, of which kind, and its number."""

    prompt: Prompt
    kind: Kind
    number: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.prompt.id, self.kind, self.number


class Sampler:
    """One start of the tool. Its methods are the stages; each goes on where an earlier start stopped."""

    def __init__(self, options: Sampling, progress: bool = True) -> None:
        self.options, self.progress = options, progress
        self.think = think_format(options.think)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(options.policy)
        self.stops = stop_tokens(options.policy, self.tokenizer)
        if not self.stops:
            raise UserError(
                f"{options.policy}: neither tokenizer nor generation config names a token that ends a response"
            )
        self.reward = reward(options.reward)
        source = load_prompts(options.prompts, options.limit, options.seed + 1, options.reference)
        self.total = len(source)
        self.prompts = [prompt for prompt in source if self._fits(prompt)]
        if not self.prompts:
            raise UserError(f"{options.prompts}: all {self.total} prompts are too long: see max_prompt_tokens")
        self._settle()
        self._tokens, self._started = 0, time.monotonic()

    # ------------------------------------------------------------------ what is to be done

    def prompt_ids(self, prompt: Prompt, kind: Kind) -> list[int]:
        """The ids that generation starts from."""
        mode: Mode = "no_thinking" if kind == "no_thinking" else "thinking"
        return encode_prompt(self.tokenizer, render_prompt(self.tokenizer, prompt.conversation, mode, self.think))

    @cached_property
    def _longest(self) -> float:
        positions = context_length(self.options.policy)
        limits = [self.options.max_prompt_tokens, positions and positions - self.options.max_new_tokens]
        return min((limit for limit in limits if limit is not None), default=float("inf"))

    def _fits(self, prompt: Prompt) -> bool:
        return max(len(self.prompt_ids(prompt, mode)) for mode in MODES) <= self._longest

    def blocks(self) -> list[list[Prompt]]:
        """All prompts, cut into what is generated together."""
        size = self.options.backend.block or len(self.prompts)
        return [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]

    @property
    def mine(self) -> list[Prompt]:
        """This shard's prompts: whole blocks."""
        return [prompt for block in self._own_blocks for prompt in block]

    @property
    def _own_blocks(self) -> list[list[Prompt]]:
        (index, parts), blocks = self.options.part, self.blocks()
        cut = [len(blocks) * k // parts for k in (index, index + 1)]
        return blocks[cut[0] : cut[1]]

    def jobs(self, prompts: Sequence[Prompt]) -> Iterator[Job]:
        kinds: dict[Kind, int] = dict.fromkeys(MODES, self.options.samples)
        kinds["anchor"] = self.options.anchor_traces
        for prompt in prompts:
            for kind, count in kinds.items():
                yield from (Job(prompt, kind, number) for number in range(count))

    def _settle(self) -> None:
        """Write down what responses depend on. Raises UserError where the folder's were made with other settings."""
        options = self.options
        prompts = hashlib.sha256(json.dumps([[p.id, p.conversation] for p in self.prompts]).encode()).hexdigest()
        settings = {
            name: getattr(options, name) for name in ("policy", "temperature", "top_p", "max_new_tokens", "seed")
        }
        settings |= {"think": asdict(self.think), "prompts": prompts, "stops": list(self.stops)}
        settings |= {"template_sha": template_fingerprint(self.tokenizer)}
        path = options.work / "settings.json"
        if path.exists():
            found = json.loads(path.read_text())
            differing = [f"{k} was {found.get(k)!r}, is {v!r}" for k, v in settings.items() if found.get(k) != v]
            if differing:
                raise UserError(
                    f"{options.work} holds responses that were sampled with other settings: {'; '.join(differing)}. "
                    "Give these again, another output, or delete the folder"
                )
        else:
            options.work.mkdir(parents=True, exist_ok=True)
            own = path.with_suffix(f".{os.getpid()}")
            own.write_text(json.dumps(settings, indent=1))
            own.replace(path)

    def journal(self) -> Journal:
        """What has been sampled, by all shards, and this shard's file."""
        return Journal(self.options.work, "responses", lambda r: (r["prompt"], r["kind"], r["number"]), self._part)

    @property
    def _part(self) -> str:
        return self.options.shard.replace("/", "-of-") if self.options.shard else ""

    # ------------------------------------------------------------------ generate

    def generate(self) -> None:
        """Sample every response of this shard that is not there yet."""
        with self.journal() as journal:
            jobs = list(self.jobs(self.mine))
            left = sum(job.key not in journal for job in jobs)
            if not left:
                return
            backend, done = self.options.backend.start(self.options.policy), len(jobs) - left
            with tqdm(
                total=len(jobs), initial=done, desc="sampling", unit="response", disable=not self.progress
            ) as bar:
                for block in self._own_blocks:
                    for anchors in (False, True):  # they end with another token
                        self._complete(
                            backend, [j for j in self.jobs(block) if (j.kind == "anchor") == anchors], journal, bar
                        )

    def _complete(self, backend: Backend, jobs: list[Job], journal: Journal, bar: tqdm[Any]) -> None:
        """Write down the jobs' responses that are not there yet."""
        todo = [job for job in jobs if job.key not in journal]
        if not todo:
            return
        if self.options.backend.block is not None:
            todo = jobs
        requests: list[Request] = []
        prompts: dict[tuple[str, str], array[int]] = {}
        for job in todo:
            key = job.prompt.id, job.kind
            prompts[key] = prompts.get(key) or array("i", self.prompt_ids(job.prompt, job.kind))
            requests.append(Request(prompts[key], response_seed(self.options.seed, *job.key)))
        ended = backend.complete(requests, self.options.decoding, self._ends(jobs[0].kind))
        with closing(cast(Any, ended)) as stream:
            for index, completion in stream:
                if todo[index].key not in journal:
                    journal.append(self._record(todo[index], requests[index].seed, completion))
                    self._tokens += len(completion.token_ids)
                    bar.set_postfix_str(
                        f"{self._tokens / (time.monotonic() - self._started):.0f} tokens/s", refresh=False
                    )
                    bar.update()

    def _ends(self, kind: Kind) -> list[int]:
        """Ids that end a response; an anchor trace ends with its close tag."""
        ends = [cast(int, self.tokenizer.convert_tokens_to_ids(stop)) for stop in self.stops]
        if kind == "anchor":
            close = encode_completion(self.tokenizer, self.think.close)
            if len(close) != 1:
                raise UserError(
                    f"anchor_traces: {self.think.close!r} is {len(close)} tokens to {self.options.policy}; it must be "
                    "one, for generation to end there"
                )
            ends += close
        return ends

    def _record(self, job: Job, seed: int, completion: Completion) -> dict[str, Any]:
        text = cast(str, self.tokenizer.decode(completion.token_ids, clean_up_tokenization_spaces=False))
        return {
            "prompt": job.prompt.id,
            "kind": job.kind,
            "number": job.number,
            "seed": seed,
            "text": text,
            "n_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "logprob": completion.logprob,
            "same_ids": encode_completion(self.tokenizer, text) == completion.token_ids,
        }

    # ------------------------------------------------------------------ score, pair

    def score(self) -> None:
        """Score this shard's answers; what is scored already is found in the folder."""
        with self.journal() as journal:
            for _ in self._scored(journal, self.mine):
                pass

    def write_rows(self) -> Summary:
        """Make the rows of all prompts and write them; an older file is replaced at once, or not at all.

        Raises:
            UserError: Responses are missing: a shard is not finished.
        """
        summary = Summary(self.total, self.total - len(self.prompts), self.options.samples)
        with self.journal() as journal:
            missing = [job.prompt.id for job in self.jobs(self.prompts) if job.key not in journal]
            if missing:
                raise UserError(
                    f"{self.options.work}: {len(missing)} responses are missing (the first to prompt {missing[0]}): "
                    "start the shards that are not finished again, or this command with stage all"
                )
            rows = (row for scored in self._scored(journal, self.prompts) if (row := self._row(*scored, summary)))
            leave_out = () if self.options.anchor_traces else ("anchor_traces",)
            summary.rows = write_rows(Path(self.options.output), rows, leave_out)
        return summary

    def _scored(
        self, journal: Journal, prompts: Sequence[Prompt]
    ) -> Iterator[tuple[Prompt, dict[Mode, list[Response]], list[dict[str, Any]]]]:
        """Prompts with their scored responses of both modes and their anchor traces' records."""
        scores = CachedReward(self.reward, self.options.work, self._part)
        with tqdm(total=len(prompts), desc="scoring", unit="prompt", disable=not self.progress) as bar:
            for start in range(0, len(prompts), CHUNK):
                part = prompts[start : start + CHUNK]
                records = [journal[job.key] | {"prompt": job.prompt} for job in self.jobs(part) if job.kind != "anchor"]
                responses = [self._response(record) for record in records]
                complete = [k for k, r in enumerate(responses) if r.problem in (None, "ids differ")]
                items = [
                    Item(records[k]["prompt"].conversation, responses[k].answer, records[k]["prompt"].reference)
                    for k in complete
                ]
                for k, score in zip(complete, scores.scores(items), strict=True):
                    problem = "no score" if score is None else responses[k].problem
                    responses[k] = replace(responses[k], score=score, problem=problem)
                by_mode: dict[tuple[str, str], list[Response]] = defaultdict(list)
                for record, response in zip(records, responses, strict=True):
                    by_mode[record["prompt"].id, record["kind"]].append(response)
                for prompt in part:
                    anchors = [journal[prompt.id, "anchor", k] for k in range(self.options.anchor_traces)]
                    yield prompt, {mode: by_mode[prompt.id, mode] for mode in MODES}, anchors
                bar.update(len(part))

    def _response(self, record: dict[str, Any]) -> Response:
        body = without_stop(record["text"], self.stops)
        problem, trace, answer = problem_of(
            body, record["kind"], record["finish_reason"], record["same_ids"], self.think
        )
        kept = ("text", "finish_reason", "seed", "n_tokens", "logprob")
        return Response(answer=answer, trace=trace, problem=problem, **{name: record[name] for name in kept})

    def _row(
        self,
        prompt: Prompt,
        responses: dict[Mode, list[Response]],
        anchors: list[dict[str, Any]],
        summary: Summary,
    ) -> dict[str, Any] | None:
        """The prompt's row; None, and counted, where it has no pair."""
        options = self.options
        pairs = {mode: options.pairs.pair(responses[mode], mode, self.think, options.seed) for mode in MODES}
        summary.count(responses, pairs)
        found = {mode: pair for mode, pair in pairs.items() if not isinstance(pair, str)}
        if len(found) < (1 if options.one_sided else 2):
            return None
        row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
        row |= {"prompt_id": prompt.id, "conversation": prompt.conversation}
        for mode, prefix, branch in zip(MODES, ("", "empty_"), ("trace", "empty"), strict=True):
            row[f"{prefix}prompt"] = render_prompt(self.tokenizer, prompt.conversation, mode, self.think)
            row[f"{prefix}chosen"], row[f"{prefix}rejected"] = found.get(mode, (None, None))
            row[f"{branch}_candidates"] = [response.candidate() for response in responses[mode]]
        if options.anchor_traces:
            row["anchor_traces"] = self._anchors(anchors, summary)
        row |= {"template_sha": template_fingerprint(self.tokenizer), "sampler_model": options.policy}
        return row | {"reward_model": self.reward.name}

    def _anchors(self, records: list[dict[str, Any]], summary: Summary) -> list[dict[str, Any]]:
        """The finished ones. Leaving others out shifts every log-marginal of the row by one constant, which cancels."""
        traces = []
        for record in records:
            if record["same_ids"] and record["text"].endswith(self.think.close):
                trace = split(record["text"], self.think).trace
                traces.append({"trace": trace, "logprob": record["logprob"]})
            else:
                summary.lost_anchors += 1
        return traces
