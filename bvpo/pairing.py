"""Scored responses to one prompt → a pair: best and worst of those sampled, or a trace beside its corruption.

A pair source sees the responses of one mode. None of them adds text to what a model wrote, and each of them says why a
prompt gives no pair.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from bvpo.errors import UserError
from bvpo.traces import MODES, Mode, ThinkFormat, answer_of, join, split

Problem = Literal["cut", "think block", "unfinished trace", "no answer", "ids differ", "no score"]


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        text: Verbatim, the stop token included.
        answer: What is scored: without trace and stop token, white space around it stripped. Empty where there is none.
        trace: Verbatim; empty in `no_thinking`.
        finish_reason: `length` where it was cut off.
        seed: That it was drawn with.
        n_tokens: As they were sampled, the stop token included.
        logprob: Natural log-probability of these tokens under the distribution they were drawn from, if known.
        problem: Why it may not enter a pair; None where it may.
        score: Of the answer; None where it has none.
    """

    text: str
    answer: str
    trace: str
    finish_reason: Literal["stop", "length"]
    seed: int
    n_tokens: int
    logprob: float | None
    problem: Problem | None
    score: float | None = None

    def candidate(self) -> dict[str, Any]:
        """As a row keeps it."""
        names = ("trace", "answer", "score", "finish_reason", "seed", "n_tokens", "logprob")
        return {name: getattr(self, name) for name in names}


def problem_of(
    text: str, mode: Mode, finish_reason: str, same_ids: bool, think: ThinkFormat, opened: bool
) -> tuple[Problem | None, str, str]:
    """Why a completion without its stop token may not enter a pair, if it may not; its trace and its answer.

    A completion that opens a think block behind the one of its prompt is `think block`: no row may hold it.

    Args:
        same_ids: Whether the text is tokenized into the ids that were sampled: what is trained on is what was sampled.
        opened: Whether the prompt ends in the open tag. Formats may leave this to the template.
    """
    answer = answer_of(text, mode, think)
    trace = split(text, think).trace if mode == "thinking" else ""
    if finish_reason == "length":
        return "cut", trace, answer or ""
    if text.lstrip().startswith(think.open) and (mode == "no_thinking" or opened):
        return "think block", trace, answer or ""
    if answer is None:
        return "unfinished trace", trace, ""
    if not answer:
        return "no answer", trace, ""
    return (None if same_ids else "ids differ"), trace, answer


class PairSource(ABC):
    """What `--pairs` takes: makes a pair of one mode's responses to a prompt. Subclasses are frozen dataclasses.

    Attributes:
        of_two: The modes whose pair is of two different responses, so that one response, or greedy ones, give none.
    """

    of_two: ClassVar[tuple[Mode, ...]] = ()

    @abstractmethod
    def pair(self, responses: Sequence[Response], mode: Mode, think: ThinkFormat, seed: int) -> tuple[str, str] | str:
        """The chosen and the rejected completion, or why there is no pair."""


@dataclass(frozen=True)
class BestWorst(PairSource):
    """The response with the highest score is chosen and the one with the lowest rejected; the first of equals.

    Only complete responses with a score are looked at. The choice sees scores of answers alone, so traces stay samples
    of π_ref(r|x, y).
    """

    of_two: ClassVar[tuple[Mode, ...]] = MODES

    def pair(self, responses: Sequence[Response], mode: Mode, think: ThinkFormat, seed: int) -> tuple[str, str] | str:
        usable = [r for r in responses if r.problem is None and r.score is not None]
        if len(usable) < 2:
            return "fewer than two complete responses"
        best, worst = max(usable, key=_score), min(usable, key=_score)
        if _score(best) == _score(worst):
            return "all scores are equal"
        if best.text == worst.text:
            return "equal responses with different scores"
        return best.text, worst.text


@dataclass(frozen=True)
class CorruptedDigits(PairSource):
    """The best response beside a copy in whose trace digits are replaced by other ones, as in PORT (arXiv 2406.16061).

    Answers stay as they are: the pair differs in the trace alone. In `no_thinking` there is no trace, and the pair is
    `BestWorst`'s.

    Args:
        fraction: Of the trace's digits that are replaced, at least one.
    """

    of_two: ClassVar[tuple[Mode, ...]] = ("no_thinking",)
    fraction: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be in (0, 1], got {self.fraction}")

    def pair(self, responses: Sequence[Response], mode: Mode, think: ThinkFormat, seed: int) -> tuple[str, str] | str:
        if mode == "no_thinking":
            return BestWorst().pair(responses, mode, think, seed)
        usable = [r for r in responses if r.problem is None and r.score is not None]
        if not usable:
            return "no complete response"
        chosen = max(usable, key=_score).text
        rejected = corrupt_digits(chosen, think, self.fraction, seed)
        return "no digit in the trace" if rejected is None else (chosen, rejected)


def corrupt_digits(completion: str, think: ThinkFormat, fraction: float, seed: int) -> str | None:
    """The completion with other digits in place of a fraction of its trace's, at least one; None where it has none."""
    response = split(completion, think)
    places = [place for place, letter in enumerate(response.trace) if letter in "0123456789"]
    if not places:
        return None
    rng = random.Random(f"{seed} {completion}")
    trace = list(response.trace)
    for place in rng.sample(places, max(1, round(fraction * len(places)))):
        trace[place] = rng.choice([digit for digit in "0123456789" if digit != trace[place]])
    return join(replace(response, trace="".join(trace)), think)


def response_seed(seed: int, prompt_id: str, kind: str, number: int) -> int:
    """A response's own seed, 48 bits from a hash of what it answers: the same for every order, shard and back end.

    Not consecutive: vLLM derives seeds by adding to one, and neighbours would overlap.
    """
    digest = hashlib.blake2b(f"{seed}\n{prompt_id}\n{kind}\n{number}".encode(), digest_size=6).digest()
    return int.from_bytes(digest)


def _score(response: Response) -> float:
    assert response.score is not None
    return response.score
