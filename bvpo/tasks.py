"""Small questions with exact answers: the checkable instructions of the tiny reasoner.

A question is drawn, phrased in one of three ways and answered by flawless *work*, step by step. Work done with slips
gives the traces, right and wrong, that the tiny reasoner is taught on. Everything needed to do or to check the work is
read from the instruction itself, so whether a question is held out is a property of its text.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "held_out"]

_OPERAND = re.compile(r"\b(?:(?:gains|loses) )?\d+\b|\b[a-z]\b")
_RESULT = re.compile(r"(?:.* (?:is|are) )(.+)\.", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """An instruction and its result: `35`, or `12 35 61`."""

    task: str
    instruction: str
    answer: str


@dataclass(frozen=True)
class Work:
    """The steps taken, each a few words, and the result they end in."""

    steps: list[str]
    result: str


@dataclass(frozen=True)
class Slips:
    """Picks the right value of a step, or with probability `rate` a wrong one."""

    rate: float
    rng: random.Random

    def __call__(self, right: T, wrong: Sequence[T]) -> T:
        return self.rng.choice(wrong) if wrong and self.rng.random() < self.rate else right


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Args:
        phrasings: Instructions; `{all}` stands for the operands, `{first}` and `{rest}` for the first and the others.
        statement: What the answer says before the result.
        draw: Draws the operands.
        work: Does the work on the operands.
        joint: What stands between operands.
    """

    phrasings: tuple[str, str, str]
    statement: str
    draw: Callable[[random.Random], list[str]]
    work: Callable[[list[str], Slips], Work]
    joint: str = " "

    def fill(self, template: str, operands: list[str]) -> str:
        rest = self.joint.join(operands[1:])
        return template.format(all=self.joint.join(operands), first=operands[0], rest=rest)


def draw_questions(count: int, seed: int, split: Split) -> list[Question]:
    """`count` questions of one split with distinct instructions, all tasks equally likely."""
    rng = random.Random(seed)
    questions: dict[str, Question] = {}
    while len(questions) < count:
        name = rng.choice(list(TASKS))
        task = TASKS[name]
        operands = task.draw(rng)
        instruction = task.fill(rng.choice(task.phrasings), operands)
        if split_of(instruction) == split:
            answer = task.work(operands, Slips(0.0, rng)).result
            questions.setdefault(instruction, Question(name, instruction, answer))
    return list(questions.values())


def split_of(instruction: str) -> Split:
    """One question in ten is held out, by a hash of its numbers and letters in sorted order.

    So neither another phrasing nor another order of the same operands crosses the line.
    """
    digest = hashlib.sha256(" ".join(sorted(_OPERAND.findall(instruction))).encode()).digest()
    return "held_out" if int.from_bytes(digest, "big") % 10 == 0 else "train"


def work_on(question: Question, slip_rate: float, rng: random.Random) -> Work:
    """Work out a question; each step slips with probability `slip_rate`, and later steps build on the slip."""
    return TASKS[question.task].work(_OPERAND.findall(question.instruction), Slips(slip_rate, rng))


def answer_sentence(question: Question, result: str) -> str:
    """The sentence that states a result, from its subject on: `the sum of 4 + 7 is 11.`"""
    task = TASKS[question.task]
    return f"{task.fill(task.statement, _OPERAND.findall(question.instruction))} {result}."


def is_correct(question: Question, answer: str) -> bool:
    """Whether the answer is one sentence `… is <result>.` (or `are`) with exactly the right result.

    Only the result is compared, and whitespace around the sentence is ignored.
    """
    match = _RESULT.fullmatch(answer.strip())
    return match is not None and match[1] == question.answer


def _digits(rng: random.Random) -> list[str]:
    return [str(rng.randint(1, 6)) for _ in range(rng.randint(4, 5))]


def _moves(rng: random.Random) -> list[str]:
    total = rng.randint(5, 20)
    operands = [str(total)]
    for _ in range(3):
        size = rng.randint(1, 6)
        verb = rng.choice(["gains", "loses"]) if total >= size else "gains"
        total += size if verb == "gains" else -size
        operands.append(f"{verb} {size}")
    return operands


def _numbers(rng: random.Random) -> list[str]:
    return [str(number) for number in rng.sample(range(10, 60), rng.randint(4, 5))]


def _few_numbers(rng: random.Random) -> list[str]:
    return [str(number) for number in rng.sample(range(10, 60), rng.randint(3, 4))]


def _letters(rng: random.Random) -> list[str]:
    return rng.sample(ascii_lowercase, rng.randint(4, 6))


def _letter_among_few(rng: random.Random) -> list[str]:
    few = rng.sample(ascii_lowercase[:6], 3)
    return [few[0], *rng.choices(few, k=rng.randint(4, 6))]


def _position_and_letters(rng: random.Random) -> list[str]:
    letters = rng.sample(ascii_lowercase, rng.randint(5, 7))
    return [str(rng.randint(3, len(letters) - 1)), *letters]


def _add_up(operands: list[str], slip: Slips) -> Work:
    total, steps = int(operands[0]), []
    for operand in operands[1:]:
        sign, size = "-" if operand.startswith("loses") else "+", int(operand.split()[-1])
        right = total - size if sign == "-" else total + size
        steps.append(f"{total} {sign} {size} = {(total := slip(right, [abs(right - 1), right + 1]))}")
    return Work(steps, str(total))


def _keep(better: Callable[[int, int], int]) -> Callable[[list[str], Slips], Work]:
    """Go through the numbers and keep the better of two."""

    def work(operands: list[str], slip: Slips) -> Work:
        best, steps = int(operands[0]), []
        for number in map(int, operands[1:]):
            right = better(best, number)
            steps.append(f"{best} or {number} : {(best := slip(right, [best + number - right]))}")
        return Work(steps, str(best))

    return work


def _insert(place: Callable[[list[str], str], int]) -> Callable[[list[str], Slips], Work]:
    """Build a list by inserting the operands one by one."""

    def work(operands: list[str], slip: Slips) -> Work:
        row, steps = [operands[0]], []
        for operand in operands[1:]:
            right = place(row, operand)
            row.insert(slip(right, [i for i in (right - 1, right + 1) if 0 <= i <= len(row)]), operand)
            steps.append(f"{operand} : {' '.join(row)}")
        return Work(steps, " ".join(row))

    return work


def _count(operands: list[str], slip: Slips) -> Work:
    """Set each letter beside the one asked for, and count."""
    target, *letters = operands
    total, steps = 0, []
    for letter in letters:
        seen = slip(letter == target, [letter != target])
        steps.append(f"{letter} {target} {'yes' if seen else 'no'} {(total := total + seen)}")
    return Work(steps, str(total))


def _walk(operands: list[str], slip: Slips) -> Work:
    """Number the letters up to the position asked for; a slip skips one."""
    position, letters = int(operands[0]), operands[1:]
    at, steps = -1, []
    for number in range(1, position + 1):
        at = min(slip(at + 1, [at + 2]), len(letters) - 1)
        steps.append(f"{number} {letters[at]}")
    return Work(steps, letters[at])


TASKS = {
    "sum": Task(
        ("What is {all}?", "Work out {all}.", "Find the sum {all}."),
        "the sum {all} is",
        _digits,
        _add_up,
        joint=" + ",
    ),
    "story": Task(
        (
            "A purse holds {first} coins. It {rest}. How many coins does it hold now?",
            "A shelf holds {first} books. It {rest}. Say how many books are left.",
            "The flock is {first} birds strong. It {rest}. How many birds are in it now?",
        ),
        "what becomes of {first} when it {rest} is",
        _moves,
        _add_up,
        joint=", ",
    ),
    "largest": Task(
        ("What is the largest of {all}?", "Find the maximum of {all}.", "Which number is the greatest: {all}?"),
        "the largest of {all} is",
        _numbers,
        _keep(max),
    ),
    "smallest": Task(
        ("What is the smallest of {all}?", "Find the minimum of {all}.", "Which number is the least: {all}?"),
        "the smallest of {all} is",
        _numbers,
        _keep(min),
    ),
    "ascending": Task(
        ("Sort in ascending order: {all}.", "Arrange {all} from small to large.", "Put {all} in rising order."),
        "the numbers {all} in ascending order are",
        _few_numbers,
        _insert(lambda row, number: sum(int(other) < int(number) for other in row)),
    ),
    "descending": Task(
        ("Sort in descending order: {all}.", "Arrange {all} from large to small.", "Put {all} in falling order."),
        "the numbers {all} in descending order are",
        _few_numbers,
        _insert(lambda row, number: sum(int(other) > int(number) for other in row)),
    ),
    "reverse": Task(
        ("Reverse the letters {all}.", "Write {all} backwards.", "Spell {all} from the end to the start."),
        "the letters {all} backwards are",
        _letters,
        _insert(lambda row, letter: 0),
    ),
    "count": Task(
        (
            "How many times does {first} occur in {rest}?",
            "Count the letter {first} in {rest}.",
            "How often is {first} found in {rest}?",
        ),
        "the count of {first} in {rest} is",
        _letter_among_few,
        _count,
    ),
    "letter": Task(
        (
            "What is letter number {first} of {rest}?",
            "Name letter {first} of {rest}.",
            "Pick letter {first} from {rest}.",
        ),
        "letter {first} of {rest} is",
        _position_and_letters,
        _walk,
    ),
}
