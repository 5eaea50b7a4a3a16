"""Finished fits → means over seeds, differences paired by seed, and a table as CSV, Markdown and a plot.

A seed sets the order of the rows, and questions and their random numbers are the same in every cell; so what two cells
have in common cancels in a difference between the same seeds. All intervals are over seeds alone.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from bvpo.checkpoints import replacing, write_whole
from bvpo.errors import UserError
from bvpo.run_log import read_table

LEVEL = 0.95  # of the intervals
ROUNDING = 1e-9  # largest standard error, relative to a mean above 1, that counts as 0
Values = Mapping[str, Mapping[int, Mapping[str, float]]]  # cell → seed → metric's label → value


@dataclass(frozen=True)
class Metric:
    """A number of a fit.

    Attributes:
        label: Its name in the table.
        keys: Log keys, of which the mean is taken: `KEY` stands for its last value logged, `mean KEY` for its mean over
            the run.
    """

    label: str
    keys: tuple[str, ...]

    def of(self, rows: Sequence[Mapping[str, str]]) -> float | None:
        """Its value in a run's log; None where a key was not logged."""
        found = [_value(key, rows) for key in self.keys]
        values = [value for value in found if value is not None]
        return float(np.mean(values)) if len(values) == len(found) else None


def _value(key: str, rows: Sequence[Mapping[str, str]]) -> float | None:
    name = key.removeprefix("mean ")
    values = [float(row[name]) for row in rows if row.get(name)]
    if not values:
        return None
    return values[-1] if key == name else float(np.mean(values))


def fit_values(run: Path, metrics: Sequence[Metric]) -> dict[str, float]:
    """A run folder's metrics, by label; without those that it has not logged."""
    try:
        _, rows = read_table(run / "metrics.csv")
    except OSError as error:
        raise UserError(f"{run / 'metrics.csv'}: cannot be read: {error.strerror}") from error
    values = {metric.label: metric.of(rows) for metric in metrics}
    return {label: value for label, value in values.items() if value is not None}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: nan without a seed.
        standard_error: Of the mean; None below two seeds, and where a seed's value is nan or infinite.
        low, high: Student-t interval, n − 1 degrees of freedom; None as above.
        seeds: n.
    """

    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    seeds: int


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean, standard error s/√n and t interval of (n,) values, one a seed."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2 or not np.isfinite(values).all():
        return Estimate(mean, None, None, None, n)
    error = float(np.std(values, ddof=1)) / n**0.5
    half = float(student_t.ppf((1 + level) / 2, n - 1)) * error
    return Estimate(mean, error, mean - half, mean + half, n)


@dataclass(frozen=True)
class Entry:
    """One cell's row of one metric; the difference from its baseline is over the seeds that both have."""

    cell: str
    metric: str
    value: Estimate
    baseline: str | None
    difference: Estimate | None


def compare(values: Values, baselines: Mapping[str, str | None], metrics: Sequence[Metric]) -> list[Entry]:
    """The table's entries, cell by cell, then metric by metric; without a fit that logged it, an entry has no seed.

    Raises:
        UserError: No fit at all has logged a metric.
    """
    for metric in metrics:
        if not any(metric.label in found for seeds in values.values() for found in seeds.values()):
            raise UserError(
                f"metric {metric.label}: no finished fit has logged {' and '.join(metric.keys)}; the log keys are the "
                "columns of a fit's metrics.csv"
            )
    entries = []
    for cell, baseline in baselines.items():
        for label in (metric.label for metric in metrics):
            own = _by_seed(values, cell, label)
            difference = None
            if baseline is not None and baseline != cell:
                other = _by_seed(values, baseline, label)
                difference = estimate([own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())])
            entries.append(Entry(cell, label, estimate(list(own.values())), baseline, difference))
    return entries


def _by_seed(values: Values, cell: str, label: str) -> dict[int, float]:
    return {seed: found[label] for seed, found in values.get(cell, {}).items() if label in found}


# ---------------------------------------------------------------------- files


def fits_csv(values: Values) -> str:
    """A line a fit and metric."""
    lines = [
        (cell, seed, label, value)
        for cell, seeds in values.items()
        for seed, found in sorted(seeds.items())
        for label, value in found.items()
    ]
    return _csv(["cell", "seed", "metric", "value"], lines)


def table_csv(entries: Sequence[Entry]) -> str:
    """A line a cell and metric; what cannot be estimated is empty."""
    names = ("mean", "standard_error", "low", "high", "seeds")
    header = ["cell", "metric", *names, "baseline", *(f"difference_{name}" for name in names)]

    def fields(found: Estimate | None) -> list[Any]:
        return [None if found is None else getattr(found, name) for name in names]

    lines = [[e.cell, e.metric, *fields(e.value), e.baseline, *fields(e.difference)] for e in entries]
    return _csv(header, lines)


def _csv(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


def table_markdown(entries: Sequence[Entry], note: str) -> str:
    """The table for people: mean ± standard error, and differences with their interval in brackets."""
    cells = list(dict.fromkeys(entry.cell for entry in entries))
    metrics = list(dict.fromkeys(entry.metric for entry in entries))
    of = {(entry.cell, entry.metric): entry for entry in entries}
    compared = {entry.baseline for entry in entries if entry.difference is not None}
    than = f"− {next(iter(compared))}" if len(compared) == 1 else "− baseline"
    columns = ["cell", "seeds"]
    for metric in metrics:
        columns += [metric, *([f"{metric} {than}"] if compared else [])]
    lines = [columns, ["---"] * len(columns)]
    for cell in cells:
        line = [cell, str(max(of[cell, metric].value.seeds for metric in metrics))]
        for entry in (of[cell, metric] for metric in metrics):
            line += [_shown(entry.value), *([_difference(entry.difference)] if compared else [])]
        lines.append(line)
    table = "\n".join(f"| {' | '.join(_escaped(part) for part in line)} |" for line in lines)
    return f"{note}\n\n{table}\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _shown(found: Estimate, sign: str = "") -> str:
    """`0.7187 ± 0.0021`: to two digits of the standard error."""
    if not found.seeds:
        return "—"
    digits = _digits(found)
    error = f" ± {found.standard_error:.{digits}f}" if _error(found) else ""
    return f"{found.mean:{sign}.{digits}f}{error}"


def _difference(found: Estimate | None) -> str:
    if found is None or not found.seeds:
        return ""
    if found.low is None or found.high is None:
        return _shown(found, "+")
    digits = _digits(found)
    return f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def _digits(found: Estimate) -> int:
    """Decimal places: two digits of the standard error; four where there is none."""
    error = _error(found)
    return min(max(1 - math.floor(math.log10(error)), 0), 12) if error else 4


def _error(found: Estimate) -> float:
    """The standard error; 0 where there is none, and where it is the rounding of values that are equal."""
    error = found.standard_error or 0.0
    return error if error > ROUNDING * max(1.0, abs(found.mean)) else 0.0


def literal(name: str) -> str:
    """A name as matplotlib shows it letter by letter: the text between two `$` would be a formula."""
    return name.replace("$", r"\$")


def plot(entries: Sequence[Entry], path: Path) -> None:
    """Means with their 95% intervals, a panel a metric; a line marks the baseline where there is one for all.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('the plot is drawn by matplotlib, which is not installed: pip install "bvpo[notebooks]"')
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(entry.metric for entry in entries))
    cells = list(dict.fromkeys(entry.cell for entry in entries))
    figure = Figure(figsize=(2 + 3 * len(metrics), 1.2 + 0.32 * len(cells)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        own = [entry for entry in entries if entry.metric == metric]
        for place, entry in enumerate(own):
            value, low, high = entry.value.mean, entry.value.low, entry.value.high
            axes.plot([value], [place], "o", color="C0")
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color="C0")
        means = {entry.cell: entry.value.mean for entry in own}
        baselines = {entry.baseline for entry in own if entry.baseline is not None}
        if len(baselines) == 1:
            axes.axvline(means[baselines.pop()], color="0.6", linestyle="--", zorder=0)
        axes.set(title=literal(metric))
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(cells)), [literal(cell) for cell in cells])
    panels[0].invert_yaxis()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def write(entries: Sequence[Entry], values: Values, note: str, folder: Path) -> list[Path]:
    """table.csv, fits.csv and table.md, each whole or not there. Raises UserError where one cannot be written."""
    texts = {
        "table.csv": table_csv(entries),
        "fits.csv": fits_csv(values),
        "table.md": table_markdown(entries, note),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with replacing(folder / name) as file:
                write_whole(file, text.encode())
    except OSError as error:
        raise UserError(f"{folder}: the tables cannot be written: {error.strerror}") from error
    return [folder / name for name in texts]
