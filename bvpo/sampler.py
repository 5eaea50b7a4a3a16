"""Prompts → responses in both modes: the generating half of `python -m bvpo.sample`.

The paper's D_t and D_e: a model answers each prompt several times with a trace and with thinking disabled, the answers
alone are scored, and the best and the worst of each mode make the row's two pairs.

Every response has a seed of its own, made from what it answers, and is written down the moment it ends. So a run that
was killed goes on where it was, shards on other machines write into the same folder, and the rows are the same however
often and wherever it ran.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from array import array
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch.utilities import rank_zero_warn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bvpo.decoding import Decoding
from bvpo.engines import Engine, TransformersEngine
from bvpo.errors import UserError
from bvpo.generation import Backend, Completion, Request
from bvpo.journal import SETTINGS, Journal, read_settings, write_settings
from bvpo.pairing import BestWorst, PairSource, response_seed
from bvpo.pairs import encode_completion, encode_prompt
from bvpo.policy import WEIGHTS, load_tokenizer, resolve_model, stop_tokens
from bvpo.prompts import Prompt, dated, load_prompts
from bvpo.rewards import Reward, reward
from bvpo.traces import MODES, Mode, ThinkFormat, render_prompt, template_fingerprint, think_format

Kind = Literal["thinking", "no_thinking", "anchor"]
Stage = Literal["all", "generate", "score", "anchors", "pairs"]
PIECES, PIECE = 256, 1 << 14  # of a large file of weights, these many of so many bytes enter its hash


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
        anchor_traces: Further traces of each prompt that gives a row, drawn independently of its pairs, for the
            marginal anchor.
        backend: What generates.
        think: How the model marks its traces: a name or the fields of a format, as in `data.think`.
        limit: The first so many prompts; null takes all.
        reference: The prompts' column with the right answer, where it has a name of its own.
        max_prompt_tokens: Longer prompts are left out, as are those that leave too few positions to answer in.
        one_sided: Also keep rows that have a pair in one mode only.
        stage: `generate`, `score`, `anchors` or `pairs` alone. `pairs` generates nothing: it joins what shards wrote.
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
        if Path(self.output).is_dir():
            raise UserError(f"output {self.output}: is a folder; give a file that ends in .jsonl or .parquet")
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
        given = re.fullmatch("([1-9][0-9]*)/([1-9][0-9]*)", self.shard or "1/1")
        if given is None or int(given[1]) > int(given[2]):
            raise UserError(f"shard {self.shard!r}: expected i/n with 1 ≤ i ≤ n, such as 2/8")
        return int(given[1]) - 1, int(given[2])


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
        self.policy = str(Path(options.policy)) if Path(options.policy).is_dir() else options.policy
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(options.policy)
        self.template = template_fingerprint(self.tokenizer)
        date = str(read_settings(options.work).get("date") or datetime.now().isoformat())
        self.tokenizer.chat_template = dated(self.tokenizer.chat_template, datetime.fromisoformat(date))
        self.stops = stop_tokens(options.policy, self.tokenizer)
        if not self.stops:
            raise UserError(
                f"{options.policy}: neither tokenizer nor generation config names a token that ends a response"
            )
        self.reward = reward(options.reward)
        source = load_prompts(options.prompts, options.limit, options.seed + 1, options.reference)
        self.total = len(source)
        self.prompts, digest = list[Prompt](), hashlib.sha256()
        for prompt in source:
            ids = [self.prompt_ids(prompt, mode) for mode in MODES]
            if max(map(len, ids)) <= self._longest:
                self.prompts.append(prompt)
                digest.update(json.dumps(ids).encode())
        if not self.prompts:
            raise UserError(
                f"{options.prompts}: all {self.total} prompts are too long: they may have {max(0, self._longest)} "
                "tokens, the lesser of max_prompt_tokens and what max_new_tokens leaves of the model's positions"
            )
        self.settings = self._settings(digest.hexdigest(), date)
        self._agree(self.settings)
        self._tokens, self._started = 0, time.monotonic()

    # ------------------------------------------------------------------ what is to be done

    def prompt_text(self, prompt: Prompt, kind: Kind) -> str:
        """The text that generation starts from. Raises UserError, naming the prompt, as `render_prompt` does."""
        mode: Mode = "no_thinking" if kind == "no_thinking" else "thinking"
        try:
            return render_prompt(self.tokenizer, prompt.conversation, mode, self.think)
        except UserError as error:
            raise UserError(f"{self.options.prompts}, prompt {prompt.id}: {error}") from error

    def prompt_ids(self, prompt: Prompt, kind: Kind) -> list[int]:
        """The ids that generation starts from."""
        return encode_prompt(self.tokenizer, self.prompt_text(prompt, kind))

    def opens(self, prompt: Prompt) -> bool:
        """Whether the prompt of `thinking` ends in the open tag."""
        return self.prompt_text(prompt, "thinking").rstrip().endswith(self.think.open)

    @cached_property
    def _longest(self) -> float:
        positions = self.options.backend.positions(self.options.policy)
        limits = [self.options.max_prompt_tokens, positions and positions - self.options.max_new_tokens]
        return min((limit for limit in limits if limit is not None), default=float("inf"))

    @property
    def mine(self) -> list[Prompt]:
        """This shard's prompts."""
        return [prompt for block in self.own_blocks for prompt in block]

    @property
    def own_blocks(self) -> list[list[Prompt]]:
        """The same, cut into what is generated together: whole blocks, or one where the back end has none."""
        (index, parts), unit = self.options.part, self.options.backend.block or 1
        units = math.ceil(len(self.prompts) / unit)
        first, end = (unit * (units * k // parts) for k in (index, index + 1))
        own = self.prompts[first:end]
        size = self.options.backend.block or max(1, len(own))
        return [own[start : start + size] for start in range(0, len(own), size)]

    def jobs(self, prompts: Sequence[Prompt], kinds: Sequence[Kind] = MODES) -> list[Job]:
        counts = dict.fromkeys(MODES, self.options.samples) | {"anchor": self.options.anchor_traces}
        return [Job(prompt, kind, number) for prompt in prompts for kind in kinds for number in range(counts[kind])]

    def _settings(self, prompt_ids: str, date: str) -> dict[str, Any]:
        """What responses depend on, but for the back end."""
        names = ("temperature", "top_p", "max_new_tokens", "seed")
        settings: dict[str, Any] = {"policy": self.policy} | {name: getattr(self.options, name) for name in names}
        prompts = hashlib.sha256(json.dumps([[p.id, p.conversation] for p in self.prompts]).encode()).hexdigest()
        settings |= {"think": asdict(self.think), "prompts": prompts, "prompt_count": len(self.prompts)}
        settings |= {"prompt_ids": prompt_ids, "stops": list(self.stops), "template_sha": self.template}
        return settings | {"weights": model_files(self.policy), "date": date}

    def _agree(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What is written down. Raises UserError where the folder's responses were made with other settings."""
        found = read_settings(self.options.work)
        if differing := differences(found, settings):
            raise UserError(
                f"{self.options.work} holds responses that were sampled with other settings: {'; '.join(differing)}. "
                "Give these again, another output, or delete the folder"
            )
        return found

    def _settle(self, settings: Mapping[str, Any]) -> set[str]:
        """Write down what is not written down yet; its names. Raises UserError as `_agree` does, or a full disk."""
        found = self._agree(settings)
        if new := settings.keys() - found.keys():
            write_settings(self.options.work, dict(settings) | found)
        return new if found else set()

    def journal(self) -> Journal:
        """What has been sampled, by all shards, and this shard's file."""
        if new := self._settle(self.settings):
            rank_zero_warn(
                f"{self.options.work / SETTINGS}: an older version of this package wrote it and did not note "
                f"{', '.join(sorted(new))}: these are taken to be the same as now"
            )
        return Journal(self.options.work, "responses", lambda r: (r["prompt"], r["kind"], r["number"]), self.part)

    @property
    def part(self) -> str:
        """The shard's name in the files that it writes; empty where there is one machine."""
        return self.options.shard.replace("/", "-of-") if self.options.shard else ""

    # ------------------------------------------------------------------ generate

    def generate(self, journal: Journal) -> None:
        """Sample every response of this shard that is not there yet."""
        self.complete([self.jobs(block) for block in self.own_blocks], journal, "sampling")

    def complete(self, blocks: Sequence[Sequence[Job]], journal: Journal, label: str) -> None:
        """Write down the jobs' responses that are not there yet; each block of jobs is generated together."""
        total = sum(map(len, blocks))
        left = sum(job.key not in journal for block in blocks for job in block)
        if not left:
            return
        engine = self.options.backend
        kind = {
            "class": f"{type(engine).__module__}.{type(engine).__qualname__}",
            "dtype": getattr(engine, "dtype", None),
        }
        self._settle({"backend": kind})
        backend = self._backend
        with tqdm(total=total, initial=total - left, desc=label, unit="response", disable=not self.progress) as bar:
            for block in blocks:
                self._complete(backend, block, journal, bar)

    @cached_property
    def _backend(self) -> Backend:
        return self.options.backend.start(self.options.policy)

    def _complete(self, backend: Backend, jobs: Sequence[Job], journal: Journal, bar: tqdm[Any]) -> None:
        todo = [job for job in jobs if job.key not in journal]
        if not todo:
            return
        if self.options.backend.block is not None:
            todo = list(jobs)
        requests: list[Request] = []
        prompts: dict[tuple[str, str], array[int]] = {}
        for job in todo:
            key = job.prompt.id, job.kind
            prompts[key] = prompts.get(key) or array("i", self.prompt_ids(job.prompt, job.kind))
            name = f"prompt {job.prompt.id}, {job.kind}, response {job.number + 1}"
            requests.append(Request(prompts[key], response_seed(self.options.seed, *job.key), name))
        ended = backend.complete(requests, self.options.decoding, self.ends(jobs[0].kind))
        with closing(cast(Any, ended)) as stream:
            for index, completion in stream:
                if todo[index].key not in journal:
                    journal.append(self._record(todo[index], requests[index].seed, completion))
                    self._tokens += len(completion.token_ids)
                    rate = self._tokens / (time.monotonic() - self._started)
                    bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                    bar.update()

    def ends(self, kind: Kind) -> list[int]:
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
        before, logprob = self.prompt_text(job.prompt, job.kind), completion.logprob
        return {
            "prompt": job.prompt.id,
            "kind": job.kind,
            "number": job.number,
            "seed": seed,
            "text": text,
            "n_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "logprob": logprob if logprob is not None and math.isfinite(logprob) else None,
            "same_ids": encode_completion(self.tokenizer, text, before) == completion.token_ids,
        }


# ---------------------------------------------------------------------- what responses depend on


def model_files(policy: str) -> dict[str, str]:
    """The configuration and weights in a policy's folder, each with a hash of its size and content; {} of a Hub id.

    Of a file above 4 MiB, 256 pieces of 16 KiB enter, evenly spaced, the first and the last among them. Times do not:
    shards run on machines with copies.
    """
    folder = Path(resolve_model(policy))
    if not folder.is_dir():
        return {}
    names = ("config.json", "adapter_config.json", *WEIGHTS)
    return {path.name: _content(path) for path in sorted({path for name in names for path in folder.glob(name)})}


def _content(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= PIECES * PIECE:
            digest.update(file.read())
        else:
            for number in range(PIECES):
                file.seek((size - PIECE) * number // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def differences(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """In words, where settings differ from those found; one that was not written down is none, and nor is the date."""
    differing = {name: found[name] for name, value in settings.items() if name in found and found[name] != value}
    differing.pop("date", None)
    words = []
    before, count = differing.pop("prompt_count", settings.get("prompt_count")), settings.get("prompt_count")
    template, ids = differing.pop("template_sha", None), differing.pop("prompt_ids", None)
    if differing.pop("prompts", None):
        words.append(f"prompts was a list of {before}, is another one of {count} (file, limit, max_prompt_tokens)")
    elif template:
        words.append("the policy's chat template is another")
    elif ids:
        words.append(
            "the same prompts have other token ids: another tokenizer, or a chat template that writes the time"
        )
    if "weights" in differing:
        files = {name for name, _ in differing.pop("weights").items() ^ settings["weights"].items()}
        words.append(f"the policy's folder holds other files than it did: {', '.join(sorted(files))}")
    return words + [f"{name} was {value!r}, is {settings[name]!r}" for name, value in differing.items()]
