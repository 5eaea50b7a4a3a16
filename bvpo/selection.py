"""Which of the tokenized rows are trained on. Whatever is left out, cut, guessed or repeated is counted and shown.

A step apart from tokenizing, so that a cached row serves any choice, and that the doctor can look without choosing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import datasets
from lightning.pytorch.utilities import rank_zero_warn

from bvpo.batches import BRANCHES, PREFIX
from bvpo.errors import UserError
from bvpo.traces import QWEN3, ThinkFormat

OnBadRow = Literal["error", "drop"]
OnOneSided = Literal["error", "keep"]
OnOverlong = Literal["error", "drop", "truncate_prompt", "truncate_trace"]
SEQUENCES = {
    f"{branch} {side}": (PREFIX[branch] + "prompt", PREFIX[branch] + side)
    for branch in BRANCHES
    for side in ("chosen", "rejected")
}
ANCHORS = "anchor"  # the fifth length of a row


@dataclass(frozen=True)
class RowOptions:
    """What happens to rows that cannot be trained on as they are. See `PairData`.

    Args:
        anchors: Whether each row needs traces for the marginal anchor.
        on_bad_row: A row that is no pair of pairs.
        max_length: Tokens of prompt and completion that a sequence may have.
        on_overlong: A row with a longer sequence.
        workers: Processes that tokenize, where the data set is large.
        think: How the model marks its traces.
        stops: The texts that end a completion, the tokenizer's EOS first; () takes that one alone.
        on_one_sided: A row with a trace pair or an empty-trace pair only.
        together: Consecutive rows that have one prompt, and are trained on or left out together.
    """

    anchors: bool = False
    on_bad_row: OnBadRow = "error"
    max_length: int | None = None
    on_overlong: OnOverlong = "error"
    workers: int = 0
    think: ThinkFormat = QWEN3
    stops: tuple[str, ...] = ()
    on_one_sided: OnOneSided = "error"
    together: int = 1

    @property
    def cut_to(self) -> int | None:
        """The length that rows are cut to; None where they are left as they are."""
        return self.max_length if self.on_overlong.startswith("truncate") else None

    @property
    def content(self) -> dict[str, Any]:
        """All of it that decides what a tokenized row holds."""
        cut = {"cut_to": self.cut_to, "how": self.on_overlong} if self.cut_to else {}
        return {"anchors": self.anchors, "think": asdict(self.think), "stops": self.stops, **cut} | {
            "one_sided": self.on_one_sided
        }


@dataclass(frozen=True)
class RowReport:
    """What a tokenized data set holds, by row index.

    Attributes:
        total: Rows of the source.
        bad: Rows that are no pair of pairs, and why.
        lengths: Tokens of each row's sequences, in the order of `SEQUENCES`, then of the anchor's longest.
        overlong: Rows with a sequence longer than `max_length`.
        one_sided: Rows without a pair of the branch.
        endless, guessed: Rows with a completion that does not end in a stop token; whose prompt was found, not given.
        repeated: Rows whose prompt an earlier row has.
        mixed: The first row of each group of `together` rows that has several prompts.
    """

    total: int
    bad: Mapping[int, str]
    lengths: list[list[int]]
    overlong: list[int]
    one_sided: Mapping[str, list[int]]
    endless: list[int]
    guessed: list[int]
    repeated: list[int]
    mixed: list[int]

    def longer(self, limit: float) -> str:
        """How many of the over-long rows' sequences are too long, by branch and side."""
        sides = enumerate([*SEQUENCES, ANCHORS])
        counts = {name: sum(self.lengths[i][side] > limit for i in self.overlong) for side, name in sides}
        return ", ".join(f"{name} {count}" for name, count in counts.items() if count or name != ANCHORS)


def survey(tokenized: datasets.Dataset, options: RowOptions) -> RowReport:
    """Look at all tokenized rows; nothing is refused."""
    facts = tokenized.select_columns(["problem", "lengths", "prompt_key", "endless", "guessed"])[:]
    limit = options.max_length or math.inf
    bad = {index: problem for index, problem in enumerate(facts["problem"]) if problem}
    good = [index for index in range(len(tokenized)) if index not in bad]
    lengths, keys = facts["lengths"], facts["prompt_key"]
    first: dict[int, int] = {}
    for index in good:
        first.setdefault(keys[index], index)
    return RowReport(
        total=len(tokenized),
        bad=bad,
        lengths=lengths,
        overlong=[index for index in good if max(lengths[index]) > limit],
        one_sided={
            branch: [index for index in good if not lengths[index][2 * side]] for side, branch in enumerate(BRANCHES)
        },
        endless=[index for index in good if facts["endless"][index]],
        guessed=[index for index in good if facts["guessed"][index]],
        repeated=[index for index in good if first[keys[index]] != index],
        mixed=[
            start
            for start in range(0, len(tokenized), options.together)
            if len({keys[i] for i in range(start, min(start + options.together, len(tokenized))) if i not in bad}) > 1
        ],
    )


def left_out(report: RowReport, options: RowOptions) -> set[int]:
    """The rows that are dropped: bad ones, over-long ones where options say so, and the others of their groups."""
    dropped, size = set(report.bad) | set(report.overlong if options.on_overlong == "drop" else ()), options.together
    groups = {index // size for index in dropped}
    return {i for group in groups for i in range(group * size, min((group + 1) * size, report.total))}


def select_rows(tokenized: datasets.Dataset, source: str, options: RowOptions) -> datasets.Dataset:
    """The rows to train on; what happened to the others is shown.

    Raises:
        UserError: A row is bad or over-long and the options refuse it, or no row is left.
    """
    report = survey(tokenized, options)
    refuse(report, source, options)
    dropped = left_out(report, options)
    kept = [index for index in range(report.total) if index not in dropped]
    if not kept:
        sides = report.longer(options.max_length or math.inf)
        raise UserError(
            f"{source}: all {report.total} rows are longer than max_length = {options.max_length} tokens, or bad "
            f"({sides})"
        )
    for note in [*notes(report, options, dropped), *group_notes(report, options)]:
        rank_zero_warn(f"{source}: {note}")
    return tokenized if len(kept) == report.total else tokenized.select(kept)


def refuse(report: RowReport, source: str, options: RowOptions) -> None:
    """Raises UserError at the first row that the options do not let pass."""
    bad, total, over = report.bad, report.total, report.overlong
    if bad and (options.on_bad_row == "error" or len(bad) == total):
        first, problem = next(iter(bad.items()))
        hint = "" if len(bad) == 1 else f" ({len(bad)} of {total} rows are no pairs: {count_reasons(bad)})"
        remedy = "; set on_bad_row to drop to go on without" if len(bad) < total else ""
        raise UserError(f"{source}, row {first + 1}: {problem}{hint}{remedy}")
    if over and options.on_overlong == "error":
        limit = options.max_length or math.inf
        raise UserError(
            f"{source}, row {over[0] + 1}: longest sequence has {max(report.lengths[over[0]])} tokens, max_length is "
            f"{limit} ({len(over)} of {total} rows are longer: {report.longer(limit)}): raise it, or set on_overlong "
            "to drop, truncate_prompt or truncate_trace"
        )
    if fault := group_fault(report, options):
        raise UserError(f"{source}: {fault.found}: {fault.advice}")


class GroupFault(NamedTuple):
    """Why rows cannot be drawn in groups, and what to do."""

    found: str
    advice: str


def group_fault(report: RowReport, options: RowOptions) -> GroupFault | None:
    """What keeps rows from being drawn `together`: a group that is not full, or has several prompts."""
    size = options.together
    advice = f"let each prompt have {size} consecutive rows, or set data.rows_together to 1"
    if report.total % size:
        return GroupFault(f"has {report.total} rows, no multiple of rows_together = {size}", advice)
    if report.mixed:
        first = report.mixed[0] + 1
        return GroupFault(
            f"rows {first} to {first + size - 1} are drawn as one by rows_together = {size} and have several prompts "
            f"({len(report.mixed)} of {report.total // size} such groups have)",
            advice,
        )
    return None


def group_notes(report: RowReport, options: RowOptions) -> Iterator[str]:
    """How many rows are dropped for another row of their group."""
    alone = len(left_out(report, replace(options, together=1)))
    if others := len(left_out(report, options)) - alone:
        yield (
            f"dropped {others} more of {report.total} rows: of rows_together = {options.together} rows of a prompt one "
            "was dropped, and a group is left out whole"
        )


def notes(report: RowReport, options: RowOptions, dropped: set[int]) -> Iterator[str]:
    """What is worth knowing of the rows that are trained on, and of those that are not."""
    total, limit = report.total, options.max_length or math.inf
    if report.bad:
        yield f"dropped {len(report.bad)} of {total} rows that are no pairs: {count_reasons(report.bad)}"
    if report.overlong:
        done = "dropped" if options.on_overlong == "drop" else f"cut by {options.on_overlong}"
        sides = report.longer(limit)
        yield f"{done} {len(report.overlong)} of {total} rows longer than {limit} tokens ({sides})"
    kept = total - len(dropped)
    for branch, name in zip(BRANCHES, ("trace", "empty-trace"), strict=True):
        if rows := [index for index in report.one_sided[branch] if index not in dropped]:
            yield (
                f"{len(rows)} of {kept} rows (the first is row {rows[0] + 1}) have no {name} pair: each estimator "
                "averages over its own rows"
            )
    if rows := [index for index in report.guessed if index not in dropped]:
        yield (
            f"{len(rows)} of {kept} rows (the first is row {rows[0] + 1}) have no prompt of their own: it is what "
            "chosen and rejected share, up to the think block"
        )
    if rows := [index for index in report.endless if index not in dropped]:
        yield (  # an EOS is never added: where a completion was cut off it would be a lie
            f"{len(rows)} of {kept} rows (the first is row {rows[0] + 1}) have a completion without the tokenizer's "
            "EOS at its end: they are trained on as they are, and teach the policy no end"
        )
    if repeated := [index for index in report.repeated if index not in dropped]:
        yield f"{len(repeated)} of {kept} rows repeat another row's prompt; they are kept"


def count_reasons(bad: Mapping[int, str]) -> str:
    """Reasons by frequency, each with its first row numbers. What was found in one row is no part of a reason."""
    reasons: dict[str, list[int]] = {}
    for index, problem in bad.items():
        reasons.setdefault(re.split(r", found | \(", problem)[0], []).append(index + 1)
    by_count = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return "; ".join(
        f"{len(rows)} × {reason} (row {', '.join(map(str, rows[:3]))}{', …' if len(rows) > 3 else ''})"
        for reason, rows in by_count
    )
