"""Benchmarks → responses in both modes → figures, or files for a judge: what `python -m bvpo.evaluate` does.

Responses are sampled as `bvpo.sample` samples them: each has a seed of its own and is written down the moment it ends,
so an evaluation that was killed goes on where it was and finds the same. In the output folder:

    results.json                            figures, settings and versions
    TASK/responses.jsonl                    a line a response: its text, its answer, whether that is right
    TASK/responses.jsonl.work/              what is kept between starts
    alpaca_eval/MODE.json, reference.json   for the alpaca_eval package
    arena_hard/model_answer/MODEL.jsonl     for Arena-Hard's scripts
    policy/, policy.json                    the Hugging Face folder of a run's policy, and which checkpoint it is
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard, cast

from bvpo import __version__
from bvpo.alpaca_eval import AlpacaEval
from bvpo.arena_hard import ArenaHard
from bvpo.benchmark import (
    Answer,
    Benchmark,
    Item,
    Judged,
    Scored,
    Verdict,
    final_answer,
    write_json,
    write_jsonl,
)
from bvpo.benchmark_scores import Figures, figures
from bvpo.decoding import Decoding
from bvpo.engines import Engine, TransformersEngine
from bvpo.errors import UserError
from bvpo.evaluated_policy import Policy, find_policy
from bvpo.evaluation_report import as_json, merged
from bvpo.generation import Backend
from bvpo.held_out import HeldOut
from bvpo.journal import Journal
from bvpo.maths import BENCHMARKS
from bvpo.pairs import encode_completion
from bvpo.rows import without_stop
from bvpo.sampler import Sampler
from bvpo.sampling import Sampling
from bvpo.traces import MODES, Mode, ThinkFormat

NAMED: dict[str, Benchmark] = {
    "builtin": HeldOut(),
    **BENCHMARKS,
    "alpaca_eval": AlpacaEval(),
    "arena_hard": ArenaHard(),
}
PACKAGES = ("torch", "transformers", "datasets", "math-verify", "vllm")


@dataclass(frozen=True)
class Evaluation:
    """What is asked of which model, and where the answers go.

    Args:
        policy: The model that answers: a run folder such as runs/version_0 (its last checkpoint) or a checkpoint file,
            a Hugging Face folder, a Hub id, or `builtin:tiny_reasoner`.
        tasks: Benchmarks by name, or by class path with options of their own: one, or a list.
        output: The folder of results.
        modes: With a trace, without, or a list of both.
        samples: Responses to a question in each mode, where the benchmark does not say; the k of avg@k.
        temperature: Of the responses.
        top_p: Only the most probable tokens that sum to at least this are drawn from.
        max_new_tokens: Of trace and answer together; longer responses are cut, count as wrong and are counted.
        seed: Of all responses.
        backend: What generates.
        think: How the model marks its traces: a name or the fields of a format, as in `data.think`.
        limit: The first so many questions of every benchmark; null takes all.
        name: Of the model in the judges' files; null makes one of the policy.
    """

    policy: str
    tasks: list[Benchmark | str] | Benchmark | str
    output: str
    modes: list[Mode] | Mode = field(default_factory=lambda: list(MODES))
    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 8192
    seed: int = 0
    backend: Engine = field(default_factory=TransformersEngine)
    think: str | ThinkFormat = "qwen3"
    limit: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("limit", self.limit)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be ≥ 1, got {value}")
        if not self.asked or sorted(self.asked) != sorted(set(self.asked) & set(MODES)):
            raise UserError(f"modes must be one or both of {', '.join(MODES)}, each once; got {self.modes}")
        if self.name is not None and (not self.name or "/" in self.name):
            raise UserError(f"name {self.name!r}: it becomes part of file names; give one without a slash")
        try:
            Decoding(self.temperature, self.top_p, self.max_new_tokens)
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def asked(self) -> list[Mode]:
        """The modes, as a list."""
        return self.modes if isinstance(self.modes, list) else [self.modes]


@dataclass
class Results:
    """What was found, by benchmark and mode.

    Attributes:
        judges: The commands that judge what is not scored here.
        notes: What became of the figures of earlier starts.
    """

    figures: dict[str, dict[Mode, Figures]] = field(default_factory=dict)
    judges: dict[str, dict[Mode, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def benchmark(choice: Benchmark | str) -> Benchmark:
    """A benchmark given by name. Raises UserError where there is none of that name."""
    if isinstance(choice, Benchmark):
        return choice
    if choice not in NAMED:
        raise UserError(f"there is no task {choice!r}; give {', '.join(NAMED)}, or a class path")
    return NAMED[choice]


def run(options: Evaluation, progress: bool = True) -> Results:
    """Ask, score, and write everything into the output folder. Questions are all read before the first is asked.

    Of a task that is asked for, modes of earlier starts have figures too where their responses are all there. Tasks
    that are not asked for keep theirs in results.json where their settings are the same.
    """
    choices = options.tasks if isinstance(options.tasks, list) else [options.tasks]
    benchmarks = [benchmark(choice) for choice in choices]
    names = [own.name for own in benchmarks]
    if not names or len(set(names)) < len(names) or any(not name or "/" in name for name in names):
        raise UserError(f"tasks: expected one or more, each with a name of its own without a slash; got {names}")
    path = Path(options.output) / "results.json"
    _earlier(path)  # what is wrong with it is said before the first question
    items = [own.items()[: options.limit] for own in benchmarks]
    policy, engine = find_policy(options.policy, options.output, options.name), _Shared(options.backend)
    tasks = [_Task(*own, options, policy, engine, progress) for own in zip(benchmarks, items, strict=True)]
    results = Results()
    for task in tasks:
        task.run(results)
    content = as_json(_settings(options, policy, benchmarks), results.figures, results.judges, _versions())
    content, results.notes = merged(content, _earlier(path) or content)
    write_json(path, content)
    return results


def _earlier(path: Path) -> dict[str, Any] | None:
    """What earlier starts found, if there were any. Raises UserError where the file does not say."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not _is_results(found):
        raise UserError(
            f"{path}: expected the figures of an earlier start: the file is damaged; move it away and start again, all "
            "responses and verdicts are kept"
        )
    return found


def _is_results(found: Any) -> TypeGuard[dict[str, Any]]:
    """Whether it has the form of `evaluation_report.as_json`, as far as a later start reads it."""
    if not isinstance(found, dict) or not all(
        isinstance(found.get(n), dict) for n in ("settings", "tasks", "versions")
    ):
        return False
    described, tasks = found["settings"].get("tasks"), found["tasks"].values()
    return isinstance(described, list) and len(described) == len(tasks) and all(isinstance(t, dict) for t in tasks)


class _Shared(Engine):
    """Starts an engine once, for all benchmarks."""

    def __init__(self, engine: Engine) -> None:
        self.block, self._engine, self._backend = engine.block, engine, cast(Backend | None, None)

    def start(self, policy: str) -> Backend:
        self._backend = self._backend or self._engine.start(policy)
        return self._backend

    def positions(self, policy: str) -> int | None:
        """The engine's own."""
        return self._engine.positions(policy)

    @property
    def identity(self) -> dict[str, Any]:
        """The engine's own."""
        return self._engine.identity


class _Task:
    """One benchmark's part of an evaluation, in a folder of its own."""

    def __init__(
        self, own: Benchmark, items: Sequence[Item], options: Evaluation, policy: Policy, engine: Engine, progress: bool
    ) -> None:
        self.benchmark, self.items, self.options, self.policy = own, items, options, policy
        self.folder, self.progress = Path(options.output) / own.name, progress
        positions = engine.positions(policy.path)
        if positions is not None and options.max_new_tokens >= positions:
            raise UserError(
                f"max_new_tokens {options.max_new_tokens}: {policy.path} has {positions} positions for question and "
                "response together: give fewer"
            )
        prompts = self.folder / "prompts.jsonl"
        write_jsonl(prompts, ({"prompt_id": item.id, "conversation": item.conversation} for item in items))
        sampling = Sampling(
            policy=policy.path,
            prompts=str(prompts),
            output=str(self.folder / "responses.jsonl"),
            samples=own.samples or options.samples,
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            backend=engine,
            think=options.think,
        )
        self.sampler = Sampler(sampling, progress)
        if left_out := self.sampler.total - len(self.sampler.prompts):
            raise UserError(
                f"{own.name}: {left_out} of {self.sampler.total} questions leave fewer than max_new_tokens "
                f"{options.max_new_tokens} of the positions that {policy.path} has: lower it. Without these questions "
                "it would be another benchmark"
            )

    def run(self, results: Results) -> None:
        """Sample what is missing, score or export, and write the responses down."""
        sampler, own, modes = self.sampler, self.benchmark, self.options.asked
        with sampler.journal() as journal:
            modes = [mode for mode in MODES if mode in modes or self._has_all(journal, mode)]
            sampler.complete([sampler.jobs(block, modes) for block in sampler.own_blocks], journal, own.name)
            answers = {mode: self._answers(journal, mode) for mode in modes}
            verdicts = self._verdicts(answers)
            write_jsonl(self.folder / "responses.jsonl", self._records(journal, answers, verdicts))
        results.figures[own.name] = {mode: figures(answers[mode], verdicts.get(mode)) for mode in modes}
        if isinstance(own, Judged):
            started = datetime.fromisoformat(sampler.settings["date"]).timestamp()
            results.judges[own.name] = {
                mode: own.export(answers[mode], self.folder, f"{self.policy.name}-{mode}", started) for mode in modes
            }

    def _has_all(self, journal: Journal, mode: Mode) -> bool:
        """Whether an earlier start has sampled all responses of a mode."""
        return all(job.key in journal for block in self.sampler.own_blocks for job in self.sampler.jobs(block, [mode]))

    def _answers(self, journal: Journal, mode: Mode) -> list[Answer]:
        return [
            self._answer(item, mode, number, journal[item.id, mode, number])
            for item in self.items
            for number in range(self.sampler.options.samples)
        ]

    def _answer(self, item: Item, mode: Mode, number: int, record: dict[str, Any]) -> Answer:
        body, reason = without_stop(record["text"], self.sampler.stops), record["finish_reason"]
        text = final_answer(body, mode, reason, self.sampler.think)
        tokens = len(encode_completion(self.sampler.tokenizer, text)) if text else 0
        return Answer(item, mode, number, text, reason, record["n_tokens"], tokens)

    def _verdicts(self, answers: Mapping[Mode, list[Answer]]) -> dict[Mode, list[Verdict | None]]:
        """By mode, one an answer, None where it has no text; {} where a judge decides."""
        if not isinstance(self.benchmark, Scored):
            return {}
        finished = [answer for own in answers.values() for answer in own if answer.text is not None]
        scored = iter(self.benchmark.verdicts(finished, self.sampler.options.work, self.progress))
        return {mode: [None if a.text is None else next(scored) for a in own] for mode, own in answers.items()}

    def _records(
        self, journal: Journal, answers: Mapping[Mode, list[Answer]], verdicts: Mapping[Mode, list[Verdict | None]]
    ) -> Iterator[dict[str, Any]]:
        """A line a response, as it was sampled and as it was scored."""
        for mode, own in answers.items():
            for answer, verdict in zip(own, verdicts.get(mode, [None] * len(own)), strict=True):
                sampled = journal[answer.item.id, mode, answer.number]
                record = {"question": answer.item.id, "mode": mode, "number": answer.number, "seed": sampled["seed"]}
                record |= {"finish_reason": answer.finish_reason, "n_tokens": answer.n_tokens, "text": sampled["text"]}
                record |= {"answer": answer.text}
                if mode in verdicts:
                    record |= {"gold": answer.item.row["gold"]} | asdict(verdict or Verdict(False))
                yield record


def _settings(options: Evaluation, policy: Policy, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    names = ("samples", "temperature", "top_p", "max_new_tokens", "seed", "limit")
    settings: dict[str, Any] = {
        "policy": options.policy,
        "checkpoint": policy.checkpoint,
        "name": policy.name,
        "modes": options.asked,
    }
    settings |= {name: getattr(options, name) for name in names}
    settings["think"] = options.think if isinstance(options.think, str) else asdict(options.think)
    settings["backend"] = _described(options.backend)
    return settings | {"tasks": [_described(own) for own in benchmarks]}


def _described(value: Any) -> dict[str, Any]:
    """A frozen dataclass as YAML gives it."""
    own = type(value)
    return {"class_path": f"{own.__module__}.{own.__qualname__}", "init_args": asdict(value)}


def _versions() -> dict[str, str]:
    found = {"bvpo": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
