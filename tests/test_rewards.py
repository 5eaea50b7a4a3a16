"""Rewards: exact checkers, names and class paths, and a cache that never scores twice."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from jsonargparse import ArgumentParser

from bvpo.benchmark import Answer
from bvpo.errors import UserError
from bvpo.maths import RULES, Maths
from bvpo.rewards import CachedReward, Item, MathAnswer, Reward, SequenceRewardModel, TaskAnswer, reward
from bvpo.tasks import answer_sentence, draw_questions
from tests.conftest import write_rows


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ANSWERS = ["It is 4.", "", "Ja — été 日本 🙂\n\n    x = 1\n", "end", "4", "It is 4.", "  spaced  ", "a", "b"]
ITEMS = [Item(user("What is 2 + 2?"), answer) for answer in ANSWERS]


# ---------------------------------------------------------------------- exact checkers


def test_task_answers_are_compared_with_the_rows_own_result() -> None:
    question = draw_questions(1, 0, "train")[0]
    right = f"{answer_sentence(question, question.answer)}"
    answers = [right, answer_sentence(question, "999"), "", f"\n {right} ", question.answer]
    items = [Item(user(question.instruction), answer, question.answer) for answer in answers]
    assert TaskAnswer().scores(items) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert TaskAnswer().scores([replace(items[0], reference=None)]) == [None]


MATHS = [
    ("1/2", "The answer is $\\boxed{\\frac{2}{4}}$.", 1.0),
    ("\\frac{1}{2}", "0.5", 1.0),
    ("$\\frac{1}{2}$", "$\\frac{1}{3}$", 0.0),
    ("\\boxed{7}", "été 日本: so it is 7", 1.0),
    ("x^2+2x+1", "$(x+1)^2$", 1.0),
    ("42", "", 0.0),
    ("42", "I do not know.", 0.0),
    ("42", "\\boxed{", 0.0),
    ("???", "4", None),
    ("???", "???", 1.0),
    ("7", "first \\boxed{3} and then \\boxed{7}", 1.0),
    ("7", "first \\boxed{7} and then \\boxed{3}", 0.0),
    ("First \\boxed{3}, finally \\boxed{7}.", "\\boxed{7}", 1.0),
    ("First \\boxed{3}, finally \\boxed{7}.", "\\boxed{3}", 0.0),
    ("1,2", "\\boxed{1} and \\boxed{2}", 1.0),
    ("2", "\\boxed{1} and \\boxed{2}", 0.0),
    ("4.5e33", "\\boxed{4.5 \\times 10^{33}}", 1.0),
    ("1e-3", "\\boxed{0.001}", 1.0),
    ("1.6e-19", "\\boxed{1.7 \\times 10^{-19}}", 0.0),
    ("1.6e-19", "\\boxed{1.60 \\times 10^{-19}}", 1.0),
    ("1,-2", "\\boxed{\\frac{-1 \\pm 3}{2}}", 1.0),
    (" ", "1", None),
    ("", "1", None),
    (None, "1", None),
]


def test_maths_is_compared_by_value() -> None:
    items = [Item(user("?"), answer, gold) for gold, answer, _ in MATHS]
    expected = [score for *_, score in MATHS]
    assert MathAnswer(workers=2).scores(items) == expected
    assert MathAnswer(workers=1).scores([]) == []
    with ThreadPoolExecutor(1) as pool:  # math-verify's own time limit would fail outside of the main thread
        assert pool.submit(MathAnswer(workers=1).scores, items).result() == expected


def test_a_score_is_the_evaluations_verdict(tmp_path: Path) -> None:
    pairs = [(gold, answer) for gold, answer, score in MATHS if gold and score is not None]
    rows = [{"problem": "?", "answer": gold} for gold, _ in pairs]
    benchmark = Maths("own", str(write_rows(tmp_path / "own.jsonl", rows)), workers=2)
    asked = zip(benchmark.items(), pairs, strict=True)
    answers = [Answer(item, "thinking", 0, text, "stop", 1, 1) for item, (_, text) in asked]
    found = [float(verdict.correct) for verdict in benchmark.verdicts(answers, tmp_path, progress=False)]
    assert MathAnswer(workers=2).scores([Item(user("?"), answer, gold) for gold, answer in pairs]) == found


def test_other_rules_are_another_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that were kept under older rules are not taken again."""
    before = MathAnswer().fingerprint
    monkeypatch.setattr("bvpo.rewards.RULES", RULES + 1)
    assert MathAnswer().fingerprint != before


def test_an_endless_check_is_wrong_and_those_after_it_are_checked() -> None:
    """9^9^9^9 is one big-integer operation that no signal interrupts."""
    answers = ["$4$", "$9^{9^{9^{9}}}$", "$4$", "$5$"]
    with pytest.warns(UserWarning, match="1 of 4 answers could not be checked within 3 s"):
        scores = MathAnswer(timeout_seconds=3, workers=1).scores([Item(user("?"), answer, "4") for answer in answers])
    assert scores == [1.0, 0.0, 1.0, 0.0]


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: importlib.metadata.distribution("absent-" + name))
    with pytest.raises(UserError, match=r"pip install bvpo\[math\]"):
        MathAnswer().scores(ITEMS)
    with pytest.raises(UserError, match=r"pip install bvpo\[math\]"):
        _ = MathAnswer().fingerprint


ENDLESS = """
import os
from bvpo import math_check
math_check.GRACE = 0.5
start = math_check.Checker._start
def noted(checker):
    start(checker)
    os.write(1, f"{checker.process.pid}\\n".encode())
math_check.Checker._start = noted
try:
    list(math_check.check_all([("4", "$9^{9^{9^{9}}}$")] * 8, TIMEOUT, 2))
except KeyboardInterrupt:
    pass
"""


def endless(timeout: float) -> tuple[subprocess.Popen[str], list[int]]:
    """A process in the middle of two checks, and the checkers' ids."""
    program = [sys.executable, "-c", ENDLESS.replace("TIMEOUT", str(timeout))]
    pipe = subprocess.PIPE
    process = subprocess.Popen(program, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert process.stdout is not None
    checkers = [int(process.stdout.readline()) for _ in range(2)]
    time.sleep(1)  # until they are at it
    return process, checkers


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_an_interrupt_ends_the_checkers_at_once_and_without_a_word() -> None:
    """Ctrl-C goes to all processes of a terminal's group."""
    process, checkers = endless(timeout=100)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert not any(map(is_running, checkers))


def test_checkers_end_with_a_killed_process() -> None:
    process, checkers = endless(timeout=3)
    assert all(map(is_running, checkers))
    process.kill()
    process.communicate(timeout=30)
    end = time.monotonic() + 20  # 3.5 s, on a machine with other things to do
    while any(map(is_running, checkers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_running, checkers))


# ---------------------------------------------------------------------- names and YAML


def test_names_stand_for_rewards() -> None:
    assert reward("builtin:tasks") == TaskAnswer()
    assert reward("math") == MathAnswer()
    assert reward("org/model") == SequenceRewardModel("org/model")
    assert reward(MathAnswer(workers=1)) == MathAnswer(workers=1)
    assert [reward(name).name for name in ("builtin:tasks", "math", "org/model")] == [
        "builtin:tasks",
        "math",
        "org/model",
    ]
    with pytest.raises(UserError, match="builtin:tasks, math"):
        reward("builtin:maths")


CLASS_PATHS: list[tuple[str, Reward | str]] = [
    ("math", "math"),
    ("org/model", "org/model"),
    ("bvpo.rewards.TaskAnswer", TaskAnswer()),
    ('{"class_path": "bvpo.rewards.MathAnswer", "init_args": {"workers": 2}}', MathAnswer(workers=2)),
    (
        '{"class_path": "bvpo.rewards.CachedReward", "init_args": {"folder": "a", "reward": {"class_path": '
        '"bvpo.rewards.SequenceRewardModel", "init_args": {"model": "org/model", "dtype": "float16"}}}}',
        CachedReward(SequenceRewardModel("org/model", dtype="float16"), Path("a")),
    ),
]


@pytest.mark.parametrize(("text", "expected"), CLASS_PATHS)
def test_every_reward_can_be_given_by_class_path(text: str, expected: Reward | str) -> None:
    parser = ArgumentParser()
    parser.add_argument("--reward", type=Reward | str)
    assert parser.instantiate(parser.parse_args([f"--reward={text}"])).reward == expected


# ---------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class Counting(Reward):
    """Scores an answer by its length, None where it is empty, and notes what it was asked."""

    setting: str = ""
    asked: list[str] = field(default_factory=list, compare=False)

    @property
    def name(self) -> str:
        return "counting"

    @property
    def fingerprint(self) -> str:
        return self.setting

    def scores(self, items: Sequence[Item], progress: str | None = None) -> list[float | None]:
        self.asked.extend(item.answer for item in items)
        return [len(item.answer) / 3 if item.answer else None for item in items]


def test_nothing_is_scored_twice(tmp_path: Path) -> None:
    path = tmp_path / "new"
    inner = Counting()
    cached = CachedReward(inner, path, chunk=3)
    expected = Counting().scores(ITEMS)
    assert cached.scores(ITEMS) == expected
    assert inner.asked == [item.answer for index, item in enumerate(ITEMS) if index != 5]  # the sixth is the first
    assert cached.scores(ITEMS[::-1]) == expected[::-1]
    again = Counting()
    assert CachedReward(again, path).scores(ITEMS) == expected
    assert again.asked == [] and len(inner.asked) == len(ITEMS) - 1
    assert (cached.name, cached.fingerprint) == (inner.name, inner.fingerprint)


def test_whatever_a_score_depends_on_is_part_of_its_key(tmp_path: Path) -> None:
    path = tmp_path
    CachedReward(Counting(), path).scores([Item(user("a"), "b", "c")])
    for item in (Item(user("x"), "b", "c"), Item(user("a"), "x", "c"), Item(user("a"), "b", None)):
        inner = Counting()
        CachedReward(inner, path).scores([item])
        assert inner.asked == [item.answer]
    inner = Counting(setting="other")
    CachedReward(inner, path).scores([Item(user("a"), "b", "c")])
    assert inner.asked == ["b"]


@pytest.mark.parametrize("left", range(1, 40))
def test_a_line_torn_by_a_kill_is_scored_again(tmp_path: Path, left: int) -> None:
    """Cut anywhere in the last line, also inside of the key or the number."""
    path = tmp_path / "scores.jsonl"
    expected = CachedReward(Counting(), tmp_path).scores(ITEMS[:3])
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rindex(b"\n") + 1
    path.write_bytes(whole[: start + left * (len(whole) - 1 - start) // 40])
    first, second = Counting(), Counting()
    assert CachedReward(first, tmp_path).scores(ITEMS[:4])[:3] == expected
    assert first.asked == [ITEMS[2].answer, ITEMS[3].answer]
    assert CachedReward(second, tmp_path).scores(ITEMS[:4])[:3] == expected
    assert second.asked == []


KILLED = """
import os, signal, sys
from pathlib import Path
from bvpo.rewards import CachedReward, Item, TaskAnswer

class Killed(TaskAnswer):
    def scores(self, items, progress=None):
        if items[0].answer == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().scores(items)

items = [Item([{"role": "user", "content": "?"}], str(number), "4") for number in range(6)]
CachedReward(Killed(), Path(sys.argv[1]), chunk=2).scores(items)
"""


def test_scoring_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """The process ends, without any clean-up, in the second chunk of two."""
    path = tmp_path / "scores.jsonl"
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    items = [Item(user("?"), str(number), "4") for number in range(6)]
    left = path.read_bytes()
    assert CachedReward(TaskAnswer(), tmp_path, chunk=2).scores(items) == TaskAnswer().scores(items)
    added = path.read_bytes().removeprefix(left)
    assert (left.count(b"key"), added.count(b"key")) == (2, 4)


def test_a_file_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(UserError, match=r"scores\.jsonl, line 1: expected a score"):
        CachedReward(Counting(), tmp_path).scores(ITEMS)
    assert path.read_text() == json.dumps({"prompt": "x"}) + "\n"
    with pytest.raises(UserError, match="cannot be kept"):
        CachedReward(Counting(), path / "inside").scores(ITEMS)


def test_shards_read_each_others_scores_and_write_their_own(tmp_path: Path) -> None:
    CachedReward(Counting(), tmp_path, "1-of-2").scores(ITEMS[:3])
    inner = Counting()
    CachedReward(inner, tmp_path, "2-of-2").scores(ITEMS[:4])
    assert inner.asked == [ITEMS[3].answer]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.1-of-2.jsonl", "scores.2-of-2.jsonl"]


@dataclass(frozen=True)
class Gives(Reward):
    """A user's reward that gives what it is told to."""

    value: Any = None

    @property
    def name(self) -> str:
        return "mine"

    @property
    def fingerprint(self) -> str:
        return ""

    def scores(self, items: Sequence[Item], progress: str | None = None) -> Any:
        return self.value


NO_SCORES = {
    "NaN": ([1.0, math.nan], "gave an answer the score nan, which is no finite number"),
    "inf": ([1.0, -math.inf], "gave an answer the score -inf, which is no finite number"),
    "text": (["1.0", None], "gave an answer the score '1.0', which is no finite number"),
    "a list": ([[1.0], None], "which is no finite number"),
    "too few": ([1.0], "gave 1 scores to 2 answers"),
    "too many": ([1.0, 2.0, 3.0], "gave 3 scores to 2 answers"),
    "none": (None, "gave 0 scores to 2 answers"),
}


@pytest.mark.parametrize("case", NO_SCORES)
def test_what_is_no_score_is_refused_and_not_kept(tmp_path: Path, case: str) -> None:
    value, message = NO_SCORES[case]
    items = [Item(user("?"), answer) for answer in "ab"]
    with pytest.raises(UserError, match=r"^reward mine: ") as caught:
        CachedReward(Gives(value), tmp_path / "new").scores(items)
    assert message in str(caught.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [numpy.array([1, 3], numpy.float32), torch.tensor([1.0, 3.0]), [True, 3], (1.0, 3.0)])
def test_numbers_of_every_kind_are_scores(tmp_path: Path, value: Any) -> None:
    items = [Item(user("?"), answer) for answer in "ab"]
    found = CachedReward(Gives(value), tmp_path).scores(items)
    assert found == [1.0, 3.0] and all(type(score) is float for score in found)
    assert CachedReward(Gives(), tmp_path).scores(items) == found


@pytest.mark.parametrize("score", ["abc", '"x"', "NaN", "true", ""])
def test_a_cached_value_that_is_no_number_is_named(tmp_path: Path, score: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(f'{{"key": "a", "score": null}}\n{{"key": "b", "score": {score or " "}}}\n')
    with pytest.raises(UserError, match=r"scores\.jsonl, line 2: expected a score"):
        CachedReward(Counting(), tmp_path).scores(ITEMS)
