"""What became of the prompts: the table at the end of `bvpo.sample`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bvpo.errors import UserError
from bvpo.pairing import Response
from bvpo.traces import MODES, Mode


@dataclass
class ModeCounts:
    """One mode's responses and prompts.

    Attributes:
        problems: Responses that may not enter a pair, by reason.
        without_pair: Prompts without a pair, by reason.
    """

    responses: int = 0
    tokens: int = 0
    scored: int = 0
    score: float = 0.0
    problems: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    without_pair: Counter[str] = field(default_factory=Counter)


@dataclass
class Summary:
    """Counts over all prompts.

    Attributes:
        prompts: Read from the source.
        too_long: Left out before sampling.
        samples: Responses to a prompt in each mode.
        rows: Written.
        lost_anchors: Anchor traces of the rows that were not finished, whose text has other ids, that begin with the
            open tag where the prompt holds it or without where it does not, or whose log-probability is not known.
    """

    prompts: int
    too_long: int
    samples: int
    rows: int = 0
    lost_anchors: int = 0
    modes: dict[Mode, ModeCounts] = field(default_factory=lambda: {mode: ModeCounts() for mode in MODES})

    def count(self, responses: Mapping[Mode, list[Response]], pairs: Mapping[Mode, tuple[str, str] | str]) -> None:
        """Take in one prompt."""
        for mode, counts in self.modes.items():
            own, pair = responses[mode], pairs[mode]
            counts.responses += len(own)
            counts.tokens += sum(response.n_tokens for response in own)
            counts.problems.update(response.problem for response in own if response.problem)
            scores = [response.score for response in own if response.score is not None]
            counts.scored, counts.score = counts.scored + len(scores), counts.score + sum(scores)
            if isinstance(pair, str):
                counts.without_pair[pair] += 1
            else:
                counts.pairs += 1


def print_summary(summary: Summary, output: str, work: Path, console: Console | None = None) -> None:
    """The table, and the same as JSON in the work folder. Raises UserError where that cannot be written."""
    console = console or Console()
    sampled = summary.prompts - summary.too_long
    table = Table(title=f"{summary.samples} responses a mode to {sampled} prompts → {summary.rows} rows")
    table.add_column("")
    for mode in MODES:
        table.add_column(mode, justify="right")
    modes = [summary.modes[mode] for mode in MODES]

    def row(name: str, *values: str) -> None:
        if any(value not in ("", "0") for value in values):
            table.add_row(name, *values)

    row("tokens a response", *(f"{m.tokens / max(m.responses, 1):.1f}" for m in modes))
    row("mean score", *(f"{m.score / m.scored:.3f}" if m.scored else "—" for m in modes))
    for problem in sorted({problem for m in modes for problem in m.problems}):
        row(f"responses: {problem}", *(str(m.problems[problem]) for m in modes))
    row("prompts with a pair", *(f"{m.pairs} ({100 * m.pairs / max(sampled, 1):.0f}%)" for m in modes))
    for reason in sorted({reason for m in modes for reason in m.without_pair}):
        row(f"none: {reason}", *(str(m.without_pair[reason]) for m in modes))
    console.print(table)
    if summary.too_long:
        console.print(f"{summary.too_long} of {summary.prompts} prompts are too long and were left out")
    if summary.lost_anchors:
        console.print(
            f"{summary.lost_anchors} anchor traces were not finished, not their text's ids, not opened as the prompt "
            "wants it, or without log-probability, and left out",
            soft_wrap=True,
        )
    console.out(f"rows        {output}", highlight=False)  # as it is: a name may look like markup
    if summary.rows:
        console.out(f"look first  python -m bvpo.doctor --data.train {output} ...", highlight=False)
    else:
        console.print(
            "no row      nothing can be trained on this: no prompt gave the pairs of a row. Raise --max_new_tokens "
            "where responses were cut or have no finished trace, --samples where scores tie",
            soft_wrap=True,
        )
    counts = vars(summary) | {"modes": {mode: vars(own) for mode, own in summary.modes.items()}}
    path = work / "summary.json"
    try:
        path.write_text(json.dumps(counts, indent=1))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}. The rows are whole, in {output}") from error
