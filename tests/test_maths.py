"""The mathematical benchmarks: what of an answer is compared, and 200 pairs of answers judged by hand."""

from __future__ import annotations

import importlib.metadata
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bvpo.benchmark import Answer, Item, Verdict
from bvpo.errors import UserError
from bvpo.maths import BENCHMARKS, INSTRUCTION, RULES, Maths, formula, in_prose, last_boxed, same_text
from tests.conftest import write_rows

TOY = Maths("toy", "toy.jsonl", workers=2)


def answer(gold: str, text: str) -> Answer:
    return Answer(Item("toy-0", [], {"gold": gold}), "thinking", 0, text, "stop", 1, 1)


def verdicts(pairs: list[tuple[str, str]], work: Path, benchmark: Maths = TOY) -> list[Verdict]:
    return benchmark.verdicts([answer(gold, text) for gold, text in pairs], work, progress=False)


# ---------------------------------------------------------------------- pairs judged by hand

RIGHT = r"""
204 | 204
204 | 204.0
025 | 25
27.0 | 27
0 | -0
1{,}234 | 1234
1,234 | 1234
10,\!080 | 10080
\$36 | 36
36 | \$36
36 | 36 \text{ dollars}
5.4 \text{ cents} | 5.4
12 | 12\text{ cm}
12 | 12\,\mathrm{cm}^2
14.0\,\mathrm{m/s} | 14
90^\circ | 90
90 | 90^{\circ}
10\% | 10
10 | 10\%
10\% | 0.1
50\% | \frac{1}{2}
1/2 | \frac{1}{2}
\frac{1}{2} | 0.5
\frac12 | \dfrac{1}{2}
\frac{3}{56} | 3/56
-\frac{1}{3} | \frac{-1}{3}
2\frac{1}{2} | 2.5
\frac{x+2}{7} | \frac{x}{7}+\frac{2}{7}
2:3 | \frac{2}{3}
11\sqrt{2} | 11\sqrt2
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}}
\sqrt{50} | 5\sqrt{2}
3\pi | 3 \pi
2^{10} | 1024
\binom{10}{3} | 120
3! | 6
\log_2 8 | 3
e^{2} | \exp(2)
4.5e33 | 4.5 \times 10^{33}
4.5e33 | 4.5e33
6.02e23 | 6.02\cdot 10^{23}
1e-3 | 0.001
0.001 | 1e-3
1.23 \times 10^5 \text{ m} | 123000
p - q | -q+p
x^2+2x+1 | (x+1)^2
\tan x | \frac{\sin x}{\cos x}
\arcsin{1.3 \sin \theta} | \arcsin(1.3\sin\theta)
y = 2x+3 | 2x+3
x = 5 | 5
5 | x = 5
f(x) = 2x | 2x
6 - 5i | -5i+6
[-2,7] | [-2, 7]
x \in [-2,7] | [-2,7]
x > 2 | (2,\infty)
(-\infty,0)\cup(1,\infty) | (-\infty, 0) \cup (1, \infty)
\{1,2,3\} | \{3,2,1\}
1,2,3 | \{1,2,3\}
1,-2 | -2, 1
1,-2 | x=1, x=-2
1,2 | 1 \text{ and } 2
\pm 3 | 3, -3
(6,31,-1) | (6, 31, -1)
\left( 3, \frac{\pi}{2} \right) | (3,\pi/2)
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
\text{Evelyn} | Evelyn
\text{even} | \textbf{even}
\text{(C)} | C
\text{C} | \text{(C)}
\text{June 20} | June 20
4210_{5} | 4210_5
\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2} | \frac{-1 \pm \sqrt{17}}{2}
\frac{-1 \pm \sqrt{17}}{2} | \frac{-1-\sqrt{17}}{2}, \frac{-1+\sqrt{17}}{2}
\frac{-1 \pm \sqrt{17}}{2}, \frac{5 \pm \sqrt{13}}{2} | \frac{5 \pm \sqrt{13}}{2}, \frac{-1 \pm \sqrt{17}}{2}
\frac{1 \pm \sqrt{5}}{2} | \left\{\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}\right\}
\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2} | \left\{\frac{1 \pm \sqrt{5}}{2}\right\}
x=\frac{3\pm\sqrt{5}}{2} | \frac{3\pm\sqrt5}{2}
1 \pm \sqrt{19} | 1 \mp \sqrt{19}
1 \pm \sqrt{2}, 3 | 3 \text{ or } 1 ± \sqrt{2}
(1+\sqrt2, 1-\sqrt2), (1-\sqrt2, 1+\sqrt2) | (1 \pm \sqrt2, 1 \mp \sqrt2)
\pm 2 | \pm 2
2, -2 | \pm2
45^\circ | 45\degree
45^\circ | 45^{\degree}
45\degree | 45
30^\circ | 30°
12 | 12~\mathrm{km/h}
0.\overline{3} | 1/3
\frac{1}{3} | 0.\overline{3}
\frac{1}{6} | 0.1\overline{6}
-\frac{14}{11} | -1.\overline{27}
3 1/4 | \frac{13}{4}
\frac{13}{4} | 3 1/4
3\,1/4 | 3.25
1 2/3 | \frac{5}{3}
-\frac{5}{3} | -1 2/3
1250000 | 1 250 000
1250000 | 1\,250\,000
1~250~000 | 1{,}250{,}000
1250000.5 | 1 250 000.5
45^\circ | 45 \text{ degrees}
3\frac{1}{4} | 3 \frac{1}{4}
1.25e+6 | 1250000
1e-05 | 0.00001
(1,234) | (1, 234)
12,345.67 | 12345.67
2\pi | 2π
18.9 | $18.90$
\pi | 3.141593
5 | \boldsymbol{5}
\frac{1}{2} | \boldsymbol{\frac{2}{4}}
5 | \bm{\mathbf{5.0}}
5 | \color{red}{5}
5.5 | \color{blue} 11/2
5 | \textcolor{red}{5.0}
\mathbf{7} | 7.0
\text{even} | \boldsymbol{\text{even}}
0.\dot{3} | \frac13
\frac{1}{6} | 0.1\dot{6}
\frac{1}{7} | 0.\dot{1}4285\dot{7}
\frac{4}{11} | 0.\dot3\dot6
6.63e-34 | 6.63 \times 10^{-34} \text{ J s}
1.6 \times 10^{-19} | 1.60 \cdot 10^{-19}
0.00069 | 6.9 \times 10^{-4}
2^{-60} | \frac{1}{2^{60}}
2^{-2000} | \frac{1}{2^{2000}}
\frac{1}{20!} | \frac{1}{20 \cdot 19!}
0.05\% | \frac{1}{2000}
0.00005\% | 5 \times 10^{-7}
\frac{1}{3000} | 0.000333333
0 | \sqrt{2}-\sqrt{2}
0 | \sin(\pi)
x = 1.6e-19 | 1.6 \times 10^{-19}
1.6e-19 | q = 1.6 \times 10^{-19}
1e-7, 2e-7 | 2e-7, 1e-7
[0,10^{-17}] | [0,\frac{1}{10^{17}}]
10^{-17}x^2 | \frac{x^2}{10^{17}}
y = 10^{-9}x | x = 10^9y
\begin{pmatrix} 10^{-17} & 0 \\ 1 & x \end{pmatrix} | \begin{pmatrix} \frac{1}{10^{17}} & 0 \\ 1 & x \end{pmatrix}
"""

WRONG = r"""
204 | 205
-5 | 5
12 | 1 2
\frac{2}{3} | 0.67
\frac{1}{3} | 0.3333
\pi | 3.14159
10\% | 20\%
[-2,7] | (-2,7)
[0,1) | [0,1]
(-\infty,0)\cup(1,\infty) | (-\infty,0)
1,2 | 1
1,2 | 1,2,3
(6,31,-1) | (31, 6, -1)
(3,\frac{\pi}{2}) | (3, 1.5708)
x^2+2x+1 | y^2+2y+1
x^3+3x-6 | x^3+3x-5
6-5i | 6+5i
\text{Evelyn} | \text{Carla}
\text{(C)} | \text{(D)}
\text{June 20} | June 21
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}
6.02e23 | 6.02 \times 10^{22}
2.88e16 | 2.9 \times 10^{16}
\frac{-1 \pm \sqrt{17}}{2} | \frac{-1 + \sqrt{17}}{2}
\frac{-1 + \sqrt{17}}{2} | \frac{-1 \pm \sqrt{17}}{2}
\frac{-1 \pm \sqrt{17}}{2} | \frac{1 \pm \sqrt{17}}{2}
\frac{-1 \pm \sqrt{17}}{2}, \frac{5 \pm \sqrt{13}}{2} | \frac{5 \pm \sqrt{13}}{2}
(1 \pm \sqrt2, 1 \mp \sqrt2) | (1 \pm \sqrt2, 1 \pm \sqrt2)
1,234 \pm 1 | 1233, 235
\pm 2 | 2
45^\circ | 54°
45^\circ | \frac{\pi}{4}
2\,1/2 | 21/2
21/2 | 2 1/2
3 1/4 | \frac{3}{4}
3\frac{1}{4} | \frac{3}{4}
3 1/4 | 31/4
0.\overline{3} | 0.3
\frac{1}{6} | 0.\overline{16}
1 250 000 | 1 250 001
1250000 | 1, 250, 000
1234 | 12  34
12 | 1\,2
3, 5 | 35
1, 234 | 1234
(12,345) | 12345
5 | \boldsymbol{6}
56 | \boldsymbol{5}\boldsymbol{7}
0.\dot{3} | 0.3
\frac{1}{6} | 0.\dot{1}\dot{6}
6.63e-34 | 9.11e-31
1.6e-19 | 1.7e-19
1.6e-19 | -1.6e-19
1.6\times10^{-19} | 3.2\times10^{-19}
1.6\times10^{-19} | 0
0.0000001 | 0.0000002
0.0 | 0.0000001
10^{-20} | 10^{-21}
2^{-60} | 2^{-61}
2^{-2000} | 2^{-2001}
\frac{1}{20!} | \frac{1}{19!}
e^{-50} | e^{-51}
\frac{1}{3000} | 0.000333
0.00005\% | 6 \times 10^{-7}
x = 1.6e-19 | 3.2e-19
x = 1.6e-19 | x = 3.2e-19
1.6e-17, 5 | 1.7e-17, 5
[0,10^{-17}] | [0,10^{-18}]
(10^{-17},2) | (10^{-18},2)
"""

# Not what a person would say; math-verify's own view, and docs/evaluation.md says so.
RIGHT_BUT_NOT_SEEN = r"""
(2,\infty) | x > 2
(1,5) | 1 < x < 5
\varnothing | \emptyset
10 | 10 m/s
10 | \text{The answer is }10
"""
WRONG_BUT_NOT_SEEN = r"""
(1,2) | 1,2
4210_5 | 4210
"""


def pairs_of(table: str) -> list[tuple[str, str]]:
    pairs = [tuple(part.strip() for part in line.split(" | ")) for line in table.strip().splitlines()]
    return [(gold, f"So the answer is $\\boxed{{{own}}}$.") for gold, own in pairs]


TABLES = [(RIGHT, True), (WRONG, False), (RIGHT_BUT_NOT_SEEN, False), (WRONG_BUT_NOT_SEEN, True)]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Verdict]:
    pairs = [pair for table, _ in TABLES for pair in pairs_of(table)]
    return dict(zip(pairs, verdicts(pairs, tmp_path_factory.mktemp("judged")), strict=True))


@pytest.mark.parametrize(("table", "expected"), TABLES, ids=["right", "wrong", "right, not seen", "wrong, not seen"])
def test_answers_are_judged_as_by_hand(judged: dict[tuple[str, str], Verdict], table: str, expected: bool) -> None:
    assert [pair for pair in pairs_of(table) if judged[pair].correct is not expected] == []
    assert not any(judged[pair].problem for pair in pairs_of(table))


def test_the_table_is_long_enough() -> None:
    assert len(pairs_of(RIGHT)) >= 100 and len(pairs_of(WRONG)) >= 40


def test_answers_without_a_box(tmp_path: Path) -> None:
    pairs = [
        ("42", "The answer is 42."),
        ("42", "So $x = 42$."),
        ("42", "**Final answer:** 42"),
        ("\\frac{1}{2}", "It is 1/2"),
        ("42", "First 42, then it is 43."),
        ("42", "I do not know."),
        ("42", ""),
        ("6.02e23", "The answer is 6.02e23."),
        ("1.6e-19", "The charge is 1.7e-19 C."),
        ("1.6e-19", "The charge is 1.6e-19 C."),
        ("6.02e23", "From $n = 2$ moles it is 6.02e23"),
        ("42", "At a rate of 1e3 a day, the answer is 42."),
        ("1+\\sqrt{2}, 1-\\sqrt{2}", "The roots are $x = 1 \\pm \\sqrt{2}$."),
        ("7", "\\fbox{7}"),
    ]
    expected = [True, True, True, True, False, False, False, True, False, True, True, True, True, True]
    assert [v.correct for v in verdicts(pairs, tmp_path)] == expected


def test_boxes_side_by_side_are_one_answer(tmp_path: Path) -> None:
    """A list is asked for whole; boxes with words between them are steps, and the last one counts."""
    pairs = [
        ("1,2", "The roots are \\boxed{2} and \\boxed{1}."),
        ("1,2", "The roots are $\\boxed{1}$, or $\\boxed{2}$."),
        ("1,2", "\\(\\boxed{1} \\text{ and } \\boxed{2}\\)"),
        ("2", "The roots are \\boxed{1} and \\boxed{2}."),
        ("2", "It is \\boxed{2}, \\boxed{2}."),
        ("2", "First \\boxed{1} and then \\boxed{2}"),
        ("2", "First \\boxed{2}. And then \\boxed{1}"),
    ]
    assert [v.correct for v in verdicts(pairs, tmp_path)] == [True, True, True, False, True, True, False]


def test_verdicts_in_a_worker_thread(tmp_path: Path) -> None:
    """math-verify's own time limit is a signal, and would fail outside of the main thread."""
    pairs = [*pairs_of(RIGHT)[:3], *pairs_of(WRONG)[:3]]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(verdicts, pairs, tmp_path / str(k)) for k in range(2)]
        for done in runs:
            assert [v.correct for v in done.result()] == [True] * 3 + [False] * 3


def test_a_pathological_answer_ends_in_time(tmp_path: Path) -> None:
    """9^9^9^9 is one big-integer operation that no signal interrupts; those after it are judged, and it is kept."""
    bad = "\\boxed{9^{9^{9^{9}}}}"
    pairs = [("4", "\\boxed{5}"), ("4", bad), ("4", "\\boxed{8/2}"), ("4", bad)]
    benchmark = Maths("toy", "toy.jsonl", timeout_seconds=3, workers=1)
    started = time.monotonic()
    found = verdicts(pairs, tmp_path, benchmark)
    first = time.monotonic() - started
    assert [v.correct for v in found] == [False, False, True, False]
    assert [v.problem for v in found] == [None, "time was up", None, "time was up"]
    assert first < 60  # once 3 s, and two starts of a process
    assert verdicts(pairs, tmp_path, benchmark) == found
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 3  # equal answers are judged once


def test_a_right_answer_that_is_not_understood_is_counted(tmp_path: Path) -> None:
    [verdict, same] = verdicts([("???", "\\boxed{4}"), ("???", "\\boxed{???}")], tmp_path)
    assert verdict == Verdict(False, "4", "right answer not understood") and same == Verdict(True, "???")


def test_other_settings_ask_anew(tmp_path: Path) -> None:
    pairs = [("4", "\\boxed{8/2}")]
    verdicts(pairs, tmp_path)
    verdicts(pairs, tmp_path, Maths("toy", "toy.jsonl", timeout_seconds=5))
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 2


def test_other_rules_ask_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts that were kept under older rules are not taken again."""
    pairs = [("4", "\\boxed{8/2}")]
    verdicts(pairs, tmp_path)
    monkeypatch.setattr("bvpo.maths.RULES", RULES + 1)
    verdicts(pairs, tmp_path)
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed { 7 }", "7"),
        ("\\boxed{\\left\\{ x : x > 1 \\right.}", "\\left\\{ x : x > 1 \\right."),
        ("\\boxed{}", ""),
        ("\\boxed{12", None),
        ("\\boxed{7}. Check: \\boxed{", "7"),
        ("\\boxed{7}. Check: \\boxed{8", "7"),
        ("\\boxed{x = \\boxed{7}}", "7"),
        ("\\boxed{x = \\boxed{7}", "7"),
        ("} { \\boxed{\\{7\\}} {", "\\{7\\}"),
        ("\\fbox{7}", "7"),
        ("\\\\boxed{7}", "7"),
        ("\\\\\\boxed{7}", "7"),
        ("\\boxed{1}, \\boxed{2}", "1, 2"),
        ("$\\boxed{1}$ or $\\boxed{2}$", "1, 2"),
        ("\\boxed{1} and then \\boxed{2}", "2"),
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{2} and \\boxed{2}", "2"),
        ("\\boxed 5", None),
        ("none", None),
    ],
)
def test_the_last_box(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


def test_texts_that_need_no_parsing() -> None:
    assert same_text("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})")
    assert same_text("\\text{even}", "even.") and same_text("$5$", "5")
    assert not same_text("12", "1 2") and not same_text("1234", "12  34") and not same_text("21/2", "2\\,1/2")
    assert not same_text("", "") and not same_text("x", "X")


def test_powers_of_ten_are_written_out() -> None:
    assert formula("4.5e33") == "4.5 \\times 10^{33}" and formula("-2E-3 m") == "-2 \\times 10^{-3} m"
    assert formula("2e^{3}") == "2e^{3}" and formula("x2e3") == "x2e3" and formula("1.5e3.2") == "1.5e3.2"
    assert in_prose("$n$ of 2e3, in all 4e5.") == "$n$ of 2e3, in all $4 \\times 10^{5}$."
    assert in_prose("$2e3$, 4") == "$2 \\times 10^{3}$, 4" and in_prose("2e3 of 4") == "2e3 of 4"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a \\pm b", "a +b, a -b"),
        ("\\pm 3", "3, -3"),
        ("a \\mp b \\pm c", "a -b +c, a +b -c"),
        ("\\frac{a \\pm b}{2}, c", "\\frac{a +b}{2}, \\frac{a -b}{2}, c"),
        ("f(a, \\pm b); 1,234", "f(a, b), f(a, -b), 1,234"),
        ("\\{a \\pm b, c\\}", "\\{a +b, a -b, c\\}"),
        ("x \\in \\left\\{\\pm 1\\right\\}", "x \\in \\left\\{1, -1\\right\\}"),
        ("\\{\\pm 1\\}, \\{2\\}", "\\{1\\}, \\{-1\\}, \\{2\\}"),
        ("a, b", "a, b"),
        ("3 5/4", "3 5/4"),
        ("2^3 1/4", "2^3 1/4"),
        ("12.5 1/4", "12.5 1/4"),
        ("1 2 3", "1 2 3"),
        ("3.141 592", "3.141 592"),
        ("0.1\\overline{6}", "\\frac{15}{90}"),
        ("\\overline{AB}", "\\overline{AB}"),
        ("0.1\\dot{6}", "\\frac{15}{90}"),
        ("\\dot{x}_0 + 2\\cdot{3}", "\\dot{x}_0 + 2\\cdot{3}"),
        ("\\boldsymbol{a}+\\boldsymbol{b}", "\\boldsymbol{a}+\\boldsymbol{b}"),
        ("\\color{red}\\boldsymbol{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boldsymbol{5", "\\boldsymbol{5"),
    ],
)
def test_notations_are_written_as_math_verify_reads_them(text: str, expected: str) -> None:
    assert formula(text) == expected


# ---------------------------------------------------------------------- sources


def test_the_six_benchmarks() -> None:
    assert list(BENCHMARKS) == ["aime24", "aime25", "amc23", "minerva", "olympiadbench", "math500"]
    assert all(own.source.count("/") == 1 and own.source.endswith(":test") for own in BENCHMARKS.values())


def test_rows_become_questions(tmp_path: Path) -> None:
    golds: list[tuple[Any, str]] = [
        (204, "204"),
        (27.0, "27.0"),
        ("\\boxed{033}", "033"),
        ("So $x = 3$.\n\nHence $\\boxed{x = 3}$.", "x = 3"),
        (" $\\frac{1}{2}$ ", "\\frac{1}{2}"),
        (["$2$", "$-2$"], "2, -2"),
        ("$2$, $3$", "$2$, $3$"),
    ]
    source = write_rows(tmp_path / "own.jsonl", [{"question": f"Q{k}", "answer": g} for k, (g, _) in enumerate(golds)])
    items = Maths("own", str(source), question="question").items()
    assert [item.row["gold"] for item in items] == [gold for _, gold in golds]
    assert items[1].conversation == [{"role": "user", "content": f"Q1\n{INSTRUCTION}"}]
    assert [item.id for item in items[:2]] == ["own-00000", "own-00001"]
    (tmp_path / "own.json").write_text(json.dumps([{"question": "Q0", "answer": 204}]))
    assert Maths("own", str(tmp_path / "own.json"), question="question").items() == items[:1]


def test_right_answers_as_the_sets_hold_them(tmp_path: Path) -> None:
    """AIME's have leading zeros, OlympiadBench's are lists in dollars, AMC 23's are floats."""
    pairs = [
        ("033", "\\boxed{33}"),
        ("2, -2", "\\boxed{\\pm 2}"),
        ("27.0", "\\boxed{27}"),
        ("$2$, $3$", "\\boxed{3, 2}"),
        ("$2$, $3$", "\\boxed{2}"),
    ]
    assert [v.correct for v in verdicts(pairs, tmp_path)] == [True, True, True, True, False]


BAD: dict[str, tuple[str, str]] = {
    "no question": ('{"answer": 1}', "row 1: field problem: expected text, found the fields answer"),
    "blank question": ('{"problem": " ", "answer": 1}', "row 1: field problem: expected text, found str ' '"),
    "no answer": ('{"problem": "Q"}', "row 1: field answer: expected the right answer, found the fields problem"),
    "empty answer": (
        '{"problem": "Q", "answer": 1}\n{"problem": "Q", "answer": ""}',
        "row 2: field answer: expected the right answer, found nothing",
    ),
    "empty list": ('{"problem": "Q", "answer": []}', "row 1: field answer: expected the right answer, found nothing"),
    "an object": ('{"problem": "Q", "answer": {"a": 1}}', "found dict"),
    "half a character": (
        '{"problem": "Q\\ud83d", "answer": 1}',
        "row 1, field problem: character 2 is a lone surrogate",
    ),
    "no JSON": ('{"problem": "Q", "answer": 1}\n{"problem"', "row 2: expected one JSON object"),
    "a list": ("[1, 2]", "row 1: expected an object with named fields"),
    "nothing": ("", "the file is empty"),
    "no rows": ("[]", "no rows; expected one question a row"),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_are_no_questions_are_named(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    (tmp_path / "own.jsonl").write_text(content)
    with pytest.raises(UserError) as refused:
        Maths("own", str(tmp_path / "own.jsonl")).items()
    assert message in str(refused.value) and "own.jsonl" in str(refused.value) and "\n" not in str(refused.value)


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: importlib.metadata.distribution("absent-" + name))
    with pytest.raises(UserError, match=r'pip install "bvpo\[math\]"'):
        Maths("own", "own.jsonl").items()
