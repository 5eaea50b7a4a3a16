"""Pairs of scored responses: what may enter one, which is best and worst, and what a corrupted trace keeps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bvpo.errors import UserError
from bvpo.pairing import BestWorst, CorruptedDigits, Problem, Response, problem_of, response_seed
from bvpo.rows import check_row
from bvpo.traces import FORMATS, QWEN3, R1_0528, R1_DISTILL, Mode, ThinkFormat, split

EOS = "<|im_end|>"


def response(text: str, score: float | None = 0.0, problem: Problem | None = None) -> Response:
    return Response(
        text, answer="", trace="", finish_reason="stop", seed=1, n_tokens=2, logprob=-1.0, problem=problem, score=score
    )


def scored(*scores: float | None) -> list[Response]:
    return [response(f"response {index}{EOS}", score) for index, score in enumerate(scores)]


def pair(source: Any, responses: Sequence[Response], mode: Mode = "thinking", seed: int = 0) -> Any:
    return source.pair(responses, mode, QWEN3, seed)


# --- Best and worst ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "best", "worst"),
    [
        ([1.0, 3.0, 2.0], 1, 0),
        ([3.0, 1.0], 0, 1),
        ([2.0, 5.0, 5.0, 2.0], 1, 0),  # the first of equals, on both sides
        ([0.0, -1.0, -1.0], 0, 1),
        ([None, 1.0, None, 2.0], 3, 1),
    ],
)
def test_the_first_best_and_the_first_worst(scores: list[float | None], best: int, worst: int) -> None:
    assert pair(BestWorst(), scored(*scores)) == (f"response {best}{EOS}", f"response {worst}{EOS}")


def test_why_there_is_no_pair() -> None:
    fewer = "fewer than two complete responses"
    assert pair(BestWorst(), []) == pair(BestWorst(), scored(1.0)) == pair(BestWorst(), scored(1.0, None)) == fewer
    assert pair(BestWorst(), scored(0.5, 0.5, 0.5)) == "all scores are equal"
    twice = [response("same", 1.0), response("same", 2.0)]
    assert pair(BestWorst(), twice) == "equal responses with different scores"


@pytest.mark.parametrize("problem", get_args(Problem))
def test_a_response_with_a_problem_enters_no_pair(problem: Problem) -> None:
    """Also where it has a score: `ids differ` responses do."""
    good, bad = scored(1.0, 2.0), [response("best", 9.0, problem), response("worst", -9.0, problem)]
    assert pair(BestWorst(), [*bad, *good]) == (good[1].text, good[0].text)
    assert pair(BestWorst(), [*bad, good[0]]) == "fewer than two complete responses"
    assert pair(CorruptedDigits(), bad) == "no complete response"


@given(st.lists(st.one_of(st.none(), st.integers(-3, 3).map(float)), max_size=8), st.randoms())
def test_scores_of_the_pair_do_not_depend_on_the_order(scores: list[float | None], rng: Any) -> None:
    responses = scored(*scores)
    shuffled = rng.sample(responses, len(responses))
    by_text = {r.text: r.score for r in responses}
    found, again = pair(BestWorst(), responses), pair(BestWorst(), shuffled)
    if isinstance(found, str):
        assert found == again
    else:
        numbers = [score for score in scores if score is not None]
        assert [by_text[text] for text in found] == [by_text[text] for text in again] == [max(numbers), min(numbers)]


# --- Corrupted digits -------------------------------------------------------------------------------------------------

TRACE = f"<think>\n12 + 30 = 42\n</think>\n\nThe answer is 42.{EOS}"


def test_digits_of_the_trace_alone_are_replaced() -> None:
    chosen, rejected = pair(CorruptedDigits(0.5), [response("<think>1</think>2", 0.5), response(TRACE, 1.0)])
    assert chosen == TRACE
    changed = [(a, b) for a, b in zip(chosen, rejected, strict=True) if a != b]
    assert len(changed) == 3 and all(a.isdigit() and b.isdigit() for a, b in changed)
    assert rejected.endswith(f"</think>\n\nThe answer is 42.{EOS}")
    assert pair(CorruptedDigits(0.5), [response(TRACE, 1.0)]) == (chosen, rejected)
    others = {pair(CorruptedDigits(0.5), [response(TRACE, 1.0)], seed=seed)[1] for seed in range(20)}
    assert len(others) > 10


def test_a_trace_without_digits_gives_no_pair() -> None:
    """Other scripts' digits are text: replacing them by 0 to 9 would not keep the tokens alike."""
    for text in ("<think>\none\n</think>\n\n42", "<think></think>1", "<think>²٣५</think>1"):
        assert pair(CorruptedDigits(), [response(text)]) == "no digit in the trace"


def test_without_a_trace_the_pair_is_of_best_and_worst() -> None:
    responses = scored(1.0, 3.0, 2.0)
    assert pair(CorruptedDigits(), responses, "no_thinking") == pair(BestWorst(), responses)
    assert pair(CorruptedDigits(), scored(1.0, 1.0), "no_thinking") == "all scores are equal"


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"fraction must be in \(0, 1\]"):
        CorruptedDigits(fraction)


texts = st.text(st.sampled_from("0123456789 abc\n+=٣²😀\u2028"), max_size=40)


@given(texts, texts, st.floats(0.01, 1.0), st.integers(0, 2**32), st.sampled_from(sorted(FORMATS)))
def test_what_a_corruption_keeps(trace: str, answer: str, fraction: float, seed: int, name: str) -> None:
    think = FORMATS[name]
    chosen = ("" if think.prompt_opens else think.open) + trace + think.close + answer + EOS
    found = CorruptedDigits(fraction).pair([response(chosen)], "thinking", think, seed)
    digits = sum(letter in "0123456789" for letter in trace)
    if not digits:
        assert found == "no digit in the trace"
        return
    assert not isinstance(found, str) and found[0] == chosen
    assert found == CorruptedDigits(fraction).pair([response(chosen)], "thinking", think, seed)
    before, after = split(chosen, think), split(found[1], think)
    assert replace(after, trace=before.trace) == before  # tags, answer and stop token
    changed = [(a, b) for a, b in zip(before.trace, after.trace, strict=True) if a != b]
    assert len(changed) == max(1, round(fraction * digits))
    assert all(a in "0123456789" and b in "0123456789" for a, b in changed)


# --- Seeds ------------------------------------------------------------------------------------------------------------


def test_seeds_are_the_same_for_ever() -> None:
    """Responses that were journaled years ago are gone on with by these numbers."""
    assert response_seed(0, "p0", "thinking", 0) == 63681246519011
    assert response_seed(1, "p0", "no_thinking", 4) == 2921193760415
    assert response_seed(0, "ü", "anchor", 0) == 223668427814295


def test_no_two_responses_share_a_seed() -> None:
    """48 bits: among 36,000 a chance of 2e-6 that any two are equal, and here none are. None are neighbours either."""
    names = [*(f"p{index}" for index in range(600)), "p1\nthinking", "p1\nthinking\n0", "", "1", "11"]
    keys = itertools.product((0, 1), names, ("thinking", "no_thinking", "anchor"), range(10))
    seeds = sorted(response_seed(*key) for key in keys)
    assert len(seeds) == 2 * len(names) * 3 * 10
    assert seeds[0] >= 0 and seeds[-1] < 2**48 and seeds[-1] > 2**47
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 5  # vLLM's children of n = 5 have the seeds that follow


# --- What may enter a pair --------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, Mode, str, bool, ThinkFormat, tuple[Any, str, str]]] = {
    "Qwen3": ("<think>\na\n</think>\n\n2", "thinking", "stop", True, QWEN3, (None, "\na\n", "2")),
    "R1-Distill": ("a\n</think>\n\n 2 \n", "thinking", "stop", True, R1_DISTILL, (None, "a\n", "2")),
    "R1-0528": ("<think>a</think>2", "thinking", "stop", True, R1_0528, (None, "a", "2")),
    "no trace": (" 2\n", "no_thinking", "stop", True, QWEN3, (None, "", "2")),
    "other tags": ("<r>a</r>2", "thinking", "stop", True, ThinkFormat("<r>", "</r>", "<r></r>"), (None, "a", "2")),
    "other ids": ("<think>a</think>2", "thinking", "stop", False, QWEN3, ("ids differ", "a", "2")),
    "cut in the trace": ("<think>a", "thinking", "length", True, QWEN3, ("cut", "a", "")),
    "cut in the answer": ("<think>a</think>2", "thinking", "length", True, QWEN3, ("cut", "a", "2")),
    "cut without a trace": ("The ans", "no_thinking", "length", False, QWEN3, ("cut", "", "The ans")),
    "ended in the trace": ("<think>a", "thinking", "stop", True, QWEN3, ("unfinished trace", "a", "")),
    "no tags": ("2", "thinking", "stop", True, R1_DISTILL, ("unfinished trace", "2", "")),
    "nothing": ("", "thinking", "stop", True, QWEN3, ("unfinished trace", "", "")),
    "no answer": ("<think>a</think>\n\n", "thinking", "stop", True, QWEN3, ("no answer", "a", "")),
    "no answer without a trace": (" \n", "no_thinking", "stop", True, QWEN3, ("no answer", "", "")),
    "a trace in spite of the empty block": (
        "\n<think>a</think>2",
        "no_thinking",
        "stop",
        True,
        QWEN3,
        ("think block", "", "<think>a</think>2"),
    ),
    "a block in the block": ("<think>a</think>2", "thinking", "stop", True, R1_DISTILL, ("think block", "a", "2")),
    "empty trace": ("<think>\n\n</think>\n\n2", "thinking", "stop", True, QWEN3, (None, "\n\n", "2")),
}


@pytest.mark.parametrize(("text", "mode", "reason", "same_ids", "think", "expected"), CASES.values(), ids=list(CASES))
def test_problems(text: str, mode: Mode, reason: str, same_ids: bool, think: ThinkFormat, expected: Any) -> None:
    assert problem_of(text, mode, reason, same_ids, think, bool(think.prompt_opens)) == expected


def test_whether_a_block_is_the_second_depends_on_the_prompt() -> None:
    """QWEN3 leaves the opening to the template: Qwen3's does not open the block, Qwen3.5's does."""
    for text in ("<think>a</think>2", "\n<think>a</think>2"):
        assert problem_of(text, "thinking", "stop", True, QWEN3, opened=True)[0] == "think block"
        assert problem_of(text, "thinking", "stop", True, QWEN3, opened=False) == (None, "a", "2")


pieces = st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "1 + 1", "2"]), max_size=6).map("".join)


@given(
    pieces,
    pieces,
    st.sampled_from([(QWEN3, True), (QWEN3, False), (R1_DISTILL, True), (R1_0528, False)]),
    st.sampled_from(["thinking", "no_thinking"]),
)
def test_what_has_no_problem_can_be_trained_on(
    one: str, other: str, case: tuple[ThinkFormat, bool], mode: Mode
) -> None:
    """Whatever a model writes: a pair of responses without a problem is a row that reading the rows accepts."""
    think, opened = case  # Qwen3.5's template opens the block, Qwen3's does not, and one format stands for both
    if one == other or any(problem_of(text, mode, "stop", True, think, opened)[0] for text in (one, other)):
        return
    prefix = "" if mode == "thinking" else "empty_"
    prompt = "<|user|>1 + 1 ?<|assistant|>"
    prompt += think.empty if mode == "no_thinking" else "<think>\n" if opened else ""
    row = {f"{prefix}prompt": prompt, f"{prefix}chosen": one + EOS, f"{prefix}rejected": other + EOS}
    check_row(row, "row", [EOS], think, one_sided=True)
