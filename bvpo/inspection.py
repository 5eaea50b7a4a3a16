"""A source's rows as a fit would find them: tokenized, surveyed, counted and measured; none is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import pyarrow.compute as pc

from bvpo.batches import BRANCHES
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.memory import BatchShape
from bvpo.pairs import prepare_rows
from bvpo.row_faults import Sample, draw_sample
from bvpo.selection import SEQUENCES, RowOptions, RowReport, left_out, survey
from bvpo.traces import template_fingerprint


@dataclass(frozen=True)
class Inspection:
    """What was found in one source of rows."""

    source: str
    options: RowOptions
    tokenized: datasets.Dataset
    report: RowReport
    sample: Sample

    @property
    def kept(self) -> list[int]:
        """Indices of the rows that a fit would train on, were it to start."""
        refused = self.options.on_overlong == "error"
        dropped = left_out(self.report, replace(self.options, on_overlong="drop") if refused else self.options)
        return [index for index in range(self.report.total) if index not in dropped]

    @property
    def trained_on(self) -> datasets.Dataset:
        """Those rows."""
        return self.tokenized.select(self.kept)


def inspect(data: PairData, name: str, anchors: bool, wanted: Sequence[int] = ()) -> Inspection:
    """Read and tokenize one of the data module's sources; nothing is refused that can be read.

    A row that is rare among all, and that a random sample may miss, is looked at whatever the draw.
    """
    source, tokenizer = str(data.sources[name]), data.tokenizer
    rows, options = data.read(source), data.row_options(anchors, name)
    if out := [index for index in wanted if not 0 <= index < len(rows)]:
        raise UserError(f"{source}: there is no row {out[0] + 1}; it has {len(rows)} rows")
    tokenized = prepare_rows(rows, tokenizer, source, options)
    report = survey(tokenized, options)
    templates = rows["template_sha"][:] if "template_sha" in rows.column_names else []
    known = (None, template_fingerprint(tokenizer))
    rare = [*report.endless[:1], *[index for index, sha in enumerate(templates) if sha not in known][:1]]
    sample = draw_sample(rows, tokenizer, options, data.seed, wanted, rare, report.bad)
    return Inspection(source, options, tokenized, report, sample)


def count_rows(found: Inspection) -> dict[str, int]:
    """Rows in all, rows trained on, and how many of either are out of the ordinary."""
    rows, kept = found.report, set(found.kept)
    counts = {"total": rows.total, "trained_on": len(kept), "bad": len(rows.bad), "overlong": len(rows.overlong)}
    counts |= {f"without_{branch}_pair": len(kept & set(rows.one_sided[branch])) for branch in BRANCHES}
    named = {"endless_completions": rows.endless, "guessed_prompts": rows.guessed, "repeated_prompts": rows.repeated}
    return counts | {name: len(kept & set(own)) for name, own in named.items()}


def length_table(found: Inspection) -> dict[str, dict[str, Any]]:
    """Of each sequence: rows, median, 95th percentile and maximum of its tokens before any cut, rows over the limit."""
    limit, table = found.options.max_length, {}
    good = [own for index, own in enumerate(found.report.lengths) if index not in found.report.bad]
    for side, name in enumerate(SEQUENCES):
        lengths = sorted(own[side] for own in good if own[side])
        over = sum(length > limit for length in lengths) if limit else 0
        last = len(lengths) - 1
        cuts = [lengths[round(q * last)] for q in (0.5, 0.95, 1.0)] if lengths else [0, 0, 0]
        table[name] = {"rows": len(lengths), "median": cuts[0], "p95": cuts[1], "max": cuts[2], "overlong": over}
    return table


def batch_shape(found: Inspection, kept: Sequence[int], batch_size: int, max_tokens: int | None = None) -> BatchShape:
    """The most that goes through the model at once: the longest rows, in the branch that has more tokens."""
    table = found.tokenized.data
    counts = {name: pc.list_value_length(table.column(name)).to_numpy() for pair in SEQUENCES.values() for name in pair}
    anchors = max((found.report.lengths[index][-1] for index in kept), default=0)
    shapes = []
    for branch in BRANCHES:
        (prompt, chosen), (_, rejected) = (SEQUENCES[f"{branch} {side}"] for side in ("chosen", "rejected"))
        rows = [i for i in kept if counts[chosen][i]]
        if not rows:
            continue
        longest = max(int(counts[prompt][i] + max(counts[chosen][i], counts[rejected][i])) for i in rows)
        pairs = batch_size if max_tokens is None else min(batch_size, max(1, max_tokens // (2 * longest)))
        completions = sorted((int(counts[chosen][i] + counts[rejected][i]) for i in rows), reverse=True)[:pairs]
        longest = max(longest, anchors) if branch == "trace" else longest
        scored = longest - int(min(counts[prompt][i] for i in rows)) + 1
        shapes.append(BatchShape(2 * min(pairs, len(rows)), longest, scored, sum(completions)))
    return max(shapes, key=lambda shape: shape.tokens)
