"""The mathematical benchmarks, scored by math-verify: AIME 2024 and 2025, AMC 23, Minerva, OlympiadBench, MATH-500.

A question is asked as it stands, with `INSTRUCTION` on a line of its own behind it. Of an answer, what stands in its
last closed `\\boxed{…}` is compared; without a box, math-verify looks for the final formula or number. A response that
was not finished has no answer, whatever it holds in boxes. The reward `math` compares by the same `right_answer` and
`to_compare`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bvpo.benchmark import Answer, Item, Scored, Verdict, source_rows, text_field
from bvpo.errors import UserError
from bvpo.journal import Journal
from bvpo.math_check import check_all
from bvpo.reading import describe
from bvpo.traces import check_text

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."  # R1's model card has this
RULES = 3  # of comparing, below and in math_check; raise it with every change, for scores that are kept depend on them

_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\(?!\\(?:boxed|fbox)\s*\{).|[{}]", re.DOTALL)  # \{ is no brace
_GAP = r"(?:[\s$]|\\[()]){0,9}"  # bounded, as below: an answer may be a loop of one character
_JOINT = re.compile(rf"{_GAP}(?:,|,?\s?(?:and|or)|\\text\s*\{{\s*,?\s*(?:and|or)\s*\}}){_GAP}")  # between two boxes
_DOLLARS = re.compile(r"\$[^$]+\$")
_SPACES = re.compile(r"(?:\s|~|\\[,;: ])+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_STYLE = re.compile(r"\\(?:(?P<switch>color\s*\{[^{}]*\})|(?:boldsymbol|bm|mathbf|textcolor\s*\{[^{}]*\})(?=\s*\{))\s*")
_LAYOUT = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\!|\\displaystyle|\$|(?<!\d) | (?!\d)|\.$")

_SCIENTIFIC = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w|\.\d)")
_LAST_SCIENTIFIC = re.compile(_SCIENTIFIC.pattern + r"(?=\D*\Z)")
_DEGREE = re.compile(r"\^\s*\{\s*(?:\\degree|°)\s*\}|\^?(?:\\degree(?![a-zA-Z])|°)")
_SPACE = r"(?:\s|~|\\[,;:! ])"
_MIXED = re.compile(rf"(?<![\w.,/^}}])(\d{{1,9}}){_SPACE}+(\d{{1,9}})/(\d{{1,9}})(?!\w|/|\^|\.\d)")
_GROUPED = re.compile(rf"(?<![\w.,/^}}])[1-9]\d{{0,2}}(?:{_SPACE}\d{{3}})+(?!\d)")
_REPEATING = re.compile(r"(?<![\w.,}])(\d{0,9})\.(\d{0,9})\\(?:overline|bar)\s*\{(\d{1,9})\}(?!\d)")
_DOTTED = re.compile(r"\.(\d{0,9})\\dot\s*\{?(\d)\}?(?:(\d{0,7})\\dot\s*\{?(\d)\}?)?(?!\d|\\dot)")
_SIGN = re.compile(r"\\(pm|mp)(?![a-zA-Z])\s*")
_FIRST_PLUS = re.compile(r"((?:^|[=({\[,])\s*)\+")
_SET = re.compile(r"((?:[a-zA-Z]\s*(?:=|\\in)\s*)?\\(?:left\\)?\{)(.*?)(\\(?:right\\)?\})", re.DOTALL)
_STRUCTURE = re.compile(
    r"(?P<separator>;|(?<!\d),|,(?!\d{3}(?!\d))|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![\\\w])(?:and|or)(?!\w))"
    r"|(?P<open>\\?[({\[])|(?P<close>\\?[)}\]])"
)
_INLINE = re.compile(r"(?<![\\\d])(\$\$?|\\\(|\\\[)([^$\n]{1,999}?)((?<!\\)\$\$?|\\\)|\\\])")


@dataclass(frozen=True)
class Maths(Scored):
    """Questions with one right answer each.

    Args:
        name: Of the benchmark.
        source: A JSON, JSONL or Parquet file, or a Hub data set `owner/name:split`.
        question: Its column with the question.
        answer: Its column with the right answer: text (of a worked solution, what stands in its last box), a number, or
            a list of these, which are all asked for.
        samples: Responses to a question in each mode; null takes the evaluation's.
        timeout_seconds: For comparing one answer; one that takes longer is wrong, and counted.
        workers: Processes that compare answers at the same time.
    """

    name: str
    source: str
    question: str = "problem"
    answer: str = "answer"
    samples: int | None = None
    timeout_seconds: float = 10.0
    workers: int = 4

    def __post_init__(self) -> None:
        if self.timeout_seconds <= 0 or self.workers < 1:
            raise UserError(f"expected timeout_seconds > 0 and workers ≥ 1, got {self.timeout_seconds}, {self.workers}")

    def items(self) -> list[Item]:
        _ = self.scorer
        items = []
        for number, (where, row) in enumerate(source_rows(self.source)):
            content = f"{text_field(row, self.question, where)}\n{INSTRUCTION}"
            gold = gold_text(row, self.answer, where)
            items.append(Item(f"{self.name}-{number:05d}", [{"role": "user", "content": content}], {"gold": gold}))
        return items

    @property
    def scorer(self) -> str:
        """What a verdict depends on beside the two answers. Raises UserError without math-verify."""
        try:
            version = importlib.metadata.version("math-verify")
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f'{self.name}: math-verify is not installed: pip install "bvpo[math]"') from error
        return f"math-verify {version}, {self.timeout_seconds} s, rules {RULES}"

    def verdicts(self, answers: Sequence[Answer], work: Path, progress: bool) -> list[Verdict]:
        """As `Scored`; what math-verify said is kept in `work/verdicts.jsonl`, and asked once for equal answers."""
        boxes = [last_boxed(answer.text or "") for answer in answers]
        pairs = [to_compare(own.item.row["gold"], own.text or "") for own in answers]
        keys = [None if pair is None else self._key(pair) for pair in pairs]
        with Journal(work, "verdicts", lambda record: record["key"]) as journal:
            asked = {key: pair for key, pair in zip(keys, pairs, strict=True) if key and pair and key not in journal}
            names, done = list(asked), check_all(list(asked.values()), self.timeout_seconds, self.workers)
            for index, correct, expired in tqdm(
                done, f"{self.name}: scoring", len(asked), unit="answer", disable=not progress
            ):
                gold, answer = asked[names[index]]
                journal.append(
                    {"key": names[index], "gold": gold, "answer": answer, "correct": correct, "expired": expired}
                )
            return [
                Verdict(True, box) if key is None else _verdict(journal[key], box)
                for key, box in zip(keys, boxes, strict=True)
            ]

    def _key(self, pair: tuple[str, str]) -> str:
        return hashlib.sha256(json.dumps([self.scorer, *pair]).encode()).hexdigest()


def _verdict(record: Mapping[str, Any], box: str | None) -> Verdict:
    if record["expired"]:
        return Verdict(False, box, "time was up")
    if record["correct"] is None:
        return Verdict(False, box, "right answer not understood")
    return Verdict(record["correct"], box)


BENCHMARKS = {
    own.name: own
    for own in (
        Maths("aime24", "math-ai/aime24:test", answer="solution"),
        Maths("aime25", "math-ai/aime25:test"),
        Maths("amc23", "math-ai/amc23:test", question="question"),
        Maths("minerva", "math-ai/minervamath:test", question="question"),
        Maths("olympiadbench", "math-ai/olympiadbench:test", question="question", answer="final_answer"),
        Maths("math500", "HuggingFaceH4/MATH-500:test"),
    )
}


def gold_text(row: Mapping[str, Any], name: str, where: str) -> str:
    """The right answer as one text, those of a list joined by commas. Raises UserError where there is none."""
    if name not in row:
        raise UserError(f"{where}: field {name}: expected the right answer, found the fields {', '.join(row)}")
    values = row[name] if isinstance(row[name], list) and row[name] else [row[name]]
    texts = []
    for value in values:
        if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
            raise UserError(f"{where}: field {name}: expected the right answer, found {describe(value)}")
        check_text(str(value), f"{where}, field {name}")
        texts.append(right_answer(str(value)))
    return ", ".join(texts)


# ---------------------------------------------------------------------- what is compared


def right_answer(solution: str) -> str:
    """The right answer of a solution: what stands in its last box, or all of it, without dollars around it."""
    return _bare(last_boxed(solution) or solution.strip())


def to_compare(gold: str, text: str) -> tuple[str, str] | None:
    """The right answer and an answer as math-verify is asked to compare them; None where the two are the same text.

    Args:
        gold: As of `right_answer`.
        text: The whole answer.
    """
    box = last_boxed(text)
    if same_text(gold, text if box is None else box):
        return None
    return _readable(gold), in_prose(text) if box is None else f"\\boxed{{{_readable(_bare(box))}}}"


def last_boxed(answer: str) -> str | None:
    r"""What stands in the last `\boxed{…}` or `\fbox{…}` that is closed; None where there is none.

    Boxes that only a comma, `and` or `or` stands between are one answer: `\boxed{1} and \boxed{2}` is the list 1, 2.
    """
    boxes = _closed_boxes(answer)
    if not boxes:
        return None
    start, _, content = boxes[-1]
    contents = [content]
    for own_start, end, content in reversed(boxes[:-1]):
        if not _JOINT.fullmatch(answer, end, start):
            break
        start, contents = own_start, [content, *contents]
    return ", ".join(dict.fromkeys(contents))


def _closed_boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each, by rising start: of two boxes in each other, the inner one is last."""
    boxes, opened = list[tuple[int, int, str]](), list[re.Match[str]]()
    for brace in _BRACE.finditer(text):
        if brace["box"] or brace[0] == "{":
            opened.append(brace)
        elif brace[0] == "}" and opened:
            own = opened.pop()
            if own["box"]:
                boxes.append((own.start(), brace.end(), text[own.end() : brace.start()].strip()))
    return sorted(boxes)


def same_text(gold: str, answer: str) -> bool:
    """Whether two answers are the same letter by letter, layout and text macros aside: nothing need be parsed then."""
    return bool(answer) and _plain(gold) == _plain(answer)


def _plain(text: str) -> str:
    return _LAYOUT.sub("", _SPACES.sub(" ", _TEXT.sub(r"\1", _unstyled(text.strip()))).strip())


def _unstyled(text: str) -> str:
    """Without the colour and the bold type that all of a formula is in."""
    for _ in range(9):  # an answer may be a loop of them
        own = _STYLE.match(text)
        if own is None:
            break
        rest = text[own.end() :]
        braces = _closed_boxes(box := f"\\boxed{rest}")
        if braces and braces[0][:2] == (0, len(box)):
            text = braces[0][2]
        elif own["switch"]:
            text = rest
        else:  # a part of it alone
            break
    return text


def _bare(text: str) -> str:
    return text[1:-1].strip() if _DOLLARS.fullmatch(text) else text


def _readable(text: str) -> str:
    return in_prose(text) if re.search(r"(?<!\\)\$", text) else formula(text)


def in_prose(text: str) -> str:
    """As `formula`, for the formulas that a text holds, and for a power of ten that is its last number."""
    pieces, end = list[str](), 0
    for own in _INLINE.finditer(text):
        pieces += [text[end : own.start()], own[1] + formula(own[2]) + own[3]]
        end = own.end()
    return "".join([*pieces, _LAST_SCIENTIFIC.sub(r"$\1 \\times 10^{\2}$", text[end:])])


def formula(text: str) -> str:
    r"""Notations that math-verify does not read or takes for others, written as it reads them.

    `4.5e33` is a product with Euler's number in LaTeX; `3 1/4` is 13/4 and not 3/4; `1 250 000` is one number;
    `0.\overline{3}` and `0.\dot{3}` are 1/3; `30°` and `30\degree` are `30^\circ`; each part with `\pm` is a list of
    two; and colour and bold type of the whole are taken away.
    """
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", _unstyled(text))
    text = _DOTTED.sub(r".\1\\overline{\2\3\4}", text)
    text = _REPEATING.sub(_as_fraction, _DEGREE.sub(r"^\\circ ", text))
    text = _GROUPED.sub(lambda own: re.sub(r"\D", "", own[0]), _MIXED.sub(_as_improper, text))
    return _both_signs(text.replace("~", " ").replace("±", "\\pm ").replace("∓", "\\mp "))


def _as_fraction(repeating: re.Match[str]) -> str:
    """0.1\\overline{6} is (16 − 1) / 90."""
    whole, tail, period = repeating.groups()
    numerator = int(whole + tail + period) - int(whole + tail or "0")
    return f"\\frac{{{numerator}}}{{{10 ** len(tail) * (10 ** len(period) - 1)}}}"


def _as_improper(mixed: re.Match[str]) -> str:
    whole, numerator, denominator = map(int, mixed.groups())
    proper = 0 < numerator < denominator
    return f"\\frac{{{whole * denominator + numerator}}}{{{denominator}}}" if proper else mixed[0]


def _both_signs(text: str) -> str:
    r"""Each part of a list that holds `\pm` or `\mp`, with the upper signs and with the lower ones."""
    if not _SIGN.search(text):
        return text
    if (own := _SET.fullmatch(text)) and len(_parts(text)) == 1:
        return own[1] + _both_signs(own[2]) + own[3]
    return ", ".join(reading for part in _parts(text) for reading in dict.fromkeys(_signed(part, s) for s in "+-"))


def _signed(part: str, upper: str) -> str:
    lower = "-" if upper == "+" else "+"
    return _FIRST_PLUS.sub(r"\1", _SIGN.sub(lambda own: upper if own[1] == "pm" else lower, part))


def _parts(text: str) -> list[str]:
    """Cut at the commas, semicolons, `and` and `or` that stand in no bracket."""
    parts, start, depth = list[str](), 0, 0
    for mark in _STRUCTURE.finditer(text):
        if mark["separator"] is None:
            depth += 1 if mark["open"] else -1
        elif depth == 0:
            parts.append(text[start : mark.start()])
            start = mark.end()
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]
