"""What an evaluation found: the table at its end, and results.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, cast

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bvpo.benchmark_scores import Estimate, Figures
from bvpo.traces import MODES, Mode

Found = Mapping[str, Mapping[Mode, Figures]]  # by benchmark and mode


def print_figures(found: Found, judges: Mapping[str, Mapping[Mode, str]], console: Console | None = None) -> None:
    """The table: every row says how many responses were truncated. Then what is left to the user's judges.

    Args:
        judges: By benchmark and mode, the command that judges.
    """
    console = console or Console()
    table = Table(
        title="Right answers in percent ± standard error over questions",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("task", "mode", "n × k", "avg@k", "pass@k", "truncated", "tokens"):
        whole = column != "task"  # a long name is folded, and no figure cut
        table.add_column(
            column, justify="left" if column in ("task", "mode") else "right", no_wrap=whole, overflow="fold"
        )
    notes = []
    for name, modes in found.items():
        for mode, own in modes.items():
            table.add_row(
                Text(name),
                mode,
                f"{own.questions} × {own.samples}",
                _percent(own.average) if own.average else "by a judge",
                f"{100 * own.pass_at[own.samples].mean:.1f}" if own.pass_at else "",
                f"{100 * own.truncated:.1f}",
                f"{own.tokens.mean:.0f}",
            )
            if own.unfinished:
                notes.append(f"{name}, {mode}: {100 * own.unfinished:.1f}% of the responses ended inside their trace")
            notes += [f"{name}, {mode}: {count} answers count as wrong: {why}" for why, count in own.problems.items()]
    console.print(table)
    for note in notes:
        console.out(note, highlight=False)
    for name, commands in judges.items():
        for mode, command in commands.items():
            console.out(f"judge {name}, {mode}:\n{command}", highlight=False)


def _percent(value: Estimate) -> str:
    error = "" if value.standard_error is None else f" ± {100 * value.standard_error:.1f}"
    return f"{100 * value.mean:.1f}{error}"


def as_json(
    settings: Mapping[str, Any], found: Found, judges: Mapping[str, Mapping[Mode, str]], versions: Mapping[str, str]
) -> dict[str, Any]:
    """The content of results.json: no time of day in it, so that the same evaluation gives the same file."""
    tasks = {
        name: {mode: asdict(own) | {"judge": judges.get(name, {}).get(mode)} for mode, own in modes.items()}
        for name, modes in found.items()
    }
    content = {"settings": dict(settings), "tasks": tasks, "versions": dict(versions)}
    return cast(dict[str, Any], json.loads(json.dumps(content)))  # as it will be read: its keys are texts


def merged(content: dict[str, Any], earlier: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """results.json with the tasks of an earlier one that this start was not asked for, and what to say of them.

    Only figures with the same settings and versions stand in one file: those with others are left out.

    Args:
        content, earlier: As of `as_json`.
    """
    differing = [f"{k} was {v!r}, is {w!r}" for k, v, w in _differences(earlier, content)]
    own, found = content["tasks"], earlier["tasks"]
    described = dict(zip(found, earlier["settings"]["tasks"], strict=True))
    described |= dict(zip(own, content["settings"]["tasks"], strict=True))
    kept = [] if differing else [name for name in found if name not in own]
    lost = [name for name in found if name not in own and name not in kept]
    lost += [f"{name} ({mode})" for name in found if name in own for mode in found[name] if mode not in own[name]]
    names = [name for name in found if name in own or name in kept] + [name for name in own if name not in found]
    tasks = {name: own.get(name) or found[name] for name in names}
    modes = [mode for mode in MODES if any(mode in of_task for of_task in tasks.values())]
    settings = content["settings"] | {"modes": modes, "tasks": [described[name] for name in names]}
    notes = [f"results.json keeps what earlier starts with these settings found: {', '.join(kept)}"] if kept else []
    if lost:
        why = "; ".join(differing) or "their responses are not all there"
        notes.append(f"results.json no longer has what an earlier start found: {', '.join(lost)}. {why}")
    return content | {"settings": settings, "tasks": tasks}, notes


def _differences(earlier: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for part in ("settings", "versions"):
        before, now = earlier[part], content[part]
        for name in sorted((before.keys() | now.keys()) - {"modes", "tasks"}):
            if before.get(name) != now.get(name):
                yield name, before.get(name), now.get(name)
