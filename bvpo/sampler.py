"""Prompts → responses in both modes: the generating half of `python -m bvpo.sample`.

The paper's D_t and D_e: a model answers each prompt several times with a trace and with thinking disabled, the answers
alone are scored, and the best and the worst of each mode make the row's two pairs.

Every response has a seed of its own, made from what it answers, and is written down the moment it ends. So a run that
was killed goes on where it was, shards on other machines write into the same folder, and the rows are the same however
often and wherever it ran.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch.utilities import rank_zero_warn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bvpo.errors import UserError
from bvpo.generation import Backend, Completion, Request
from bvpo.journal import Journal
from bvpo.pairing import response_seed
from bvpo.pairs import decode_completion, encode_completion, encode_prompt
from bvpo.policy import load_tokenizer, stop_tokens
from bvpo.prompts import Prompt, dated, load_prompts
from bvpo.rewards import reward
from bvpo.sampling import Sampling
from bvpo.sampling_settings import SETTINGS, PromptDigest, agree, model_files, read_settings, settle
from bvpo.traces import MODES, Mode, render_prompt, template_fingerprint, think_format

Kind = Literal["thinking", "no_thinking", "anchor"]
FIELDS = {"seed": int, "text": str, "n_tokens": int, "finish_reason": str}  # that a response is read for


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
        found = read_settings(options.work)
        date = str(found.get("date") or datetime.now().isoformat())
        self.tokenizer.chat_template = dated(self.tokenizer.chat_template, datetime.fromisoformat(date))
        self.stops = stop_tokens(options.policy, self.tokenizer)
        if not self.stops:
            raise UserError(
                f"{options.policy}: neither tokenizer nor generation config names a token that ends a response"
            )
        self.reward = reward(options.reward)
        source = load_prompts(options.prompts, options.limit, options.seed + 1, options.reference)
        self.total = len(source)
        self.prompts, digest, self._begun = list[Prompt](), PromptDigest(), dict[str, Any]()
        for prompt in source:
            ids = [self.prompt_ids(prompt, mode) for mode in MODES]
            if max(map(len, ids)) <= self._longest:
                self.prompts.append(prompt)
                digest.add(prompt, ids)
                if digest.count == found.get("prompt_count"):
                    self._begun = digest.settings()
        if not self.prompts:
            raise UserError(
                f"{options.prompts}: all {self.total} prompts are too long: they may have {max(0, self._longest)} "
                "tokens, the lesser of max_prompt_tokens and what max_new_tokens leaves of the model's positions"
            )
        self.settings = self._settings(date) | digest.settings()
        agree(options.work, self.settings, self._begun)
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

    def _settings(self, date: str) -> dict[str, Any]:
        """What responses depend on, but for the prompts and the back end."""
        names = ("temperature", "top_p", "max_new_tokens", "seed")
        settings: dict[str, Any] = {"policy": self.policy} | {name: getattr(self.options, name) for name in names}
        settings |= {"think": asdict(self.think), "stops": list(self.stops), "template_sha": self.template}
        return settings | {"weights": model_files(self.policy), "date": date}

    def journal(self) -> Journal:
        """What has been sampled, by all shards, and this shard's file."""
        if new := settle(self.options.work, self.settings, self._begun):
            rank_zero_warn(
                f"{self.options.work / SETTINGS}: an older version of this package wrote it and did not note "
                f"{', '.join(sorted(new))}: these are taken to be the same as now"
            )
        return Journal(
            self.options.work, "responses", lambda r: (r["prompt"], r["kind"], r["number"]), self.part, FIELDS
        )

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
        settle(self.options.work, {"backend": self.options.backend.identity}, {})
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
        before, logprob = self.prompt_text(job.prompt, job.kind), completion.logprob
        text = decode_completion(self.tokenizer, completion.token_ids, before)
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
