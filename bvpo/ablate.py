"""A grid of fits over settings and seeds → a table: `python -m bvpo.ablate experiments/ablations/alpha.yaml`.

Every cell is an ordinary `python -m bvpo.fit` in a process of its own, started by submitit, here or on Slurm. Finished
fits are not run again and half-done ones go on, so a grid that was killed is started again with the same command. A
failed fit leaves the others standing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from bvpo.ablation_table import Entry, Values, compare, fit_values, plot, write
from bvpo.commands import begin
from bvpo.errors import UserError
from bvpo.grid import JOBS, Fit, Grid, load_grid
from bvpo.grid_run import GridRun, check_settings, finished_run, make_executor


def prepare(commands: Sequence[str]) -> None:
    """Run the grid's commands one after the other. Raises UserError at the first that fails."""
    for command in commands:
        words = shlex.split(command)
        if words[0] == "python":
            words[0] = sys.executable
        print(command, flush=True)
        try:
            code = subprocess.run(words).returncode
        except OSError as error:
            raise UserError(f"prepare: {command}: {error.strerror}") from error
        if code:
            raise UserError(f"prepare: {command}: ended with exit code {code}")


def run(grid: Grid, jobs: int, slurm: Mapping[str, Any] | None, console: Console) -> dict[Fit, str]:
    """Run what is not finished. Returns the fits that failed, and why."""
    check_settings(grid)
    prepare(grid.prepare)
    folder = grid.output / JOBS / time.strftime("%F_%H-%M-%S")  # submitit names its files by process ids: they recur
    fits = GridRun(grid, make_executor(folder, slurm), jobs, console)
    fits.run()
    if not fits.failed:  # else submitit's own files may tell more
        shutil.rmtree(folder.parent, ignore_errors=True)
    return fits.failed


def results(grid: Grid) -> Values:
    """The metrics of the fits that are finished."""
    values: dict[str, dict[int, dict[str, float]]] = {}
    for fit in grid.fits:
        if run := finished_run(fit):
            values.setdefault(fit.cell.name, {})[fit.seed] = fit_values(run, grid.metrics)
    return values


# ---------------------------------------------------------------------- command line


def report(grid: Grid, command: str, console: Console) -> None:
    """Write and print the table of what is finished; it names the command that made it."""
    values = results(grid)
    if not values:
        console.print("no fit is finished: there is no table")
        return
    entries = compare(values, {cell.name: cell.baseline for cell in grid.cells}, grid.metrics)
    files = write(entries, values, _note(grid, values, command), grid.output)
    print(files[-1].read_text())
    files += _plot(entries, grid.output / "table.png", console)
    console.out("written: " + ", ".join(map(str, files)), highlight=False)


def _plot(entries: Sequence[Entry], path: Path, console: Console) -> list[Path]:
    try:
        plot(entries, path)
    except UserError as error:
        console.out(f"no plot: {error}", highlight=False)
        return []
    return [path]


def _note(grid: Grid, values: Values, command: str) -> str:
    """What made the table."""
    done = sum(map(len, values.values()))
    missing = "" if done == len(grid.fits) else f", {len(grid.fits) - done} of {len(grid.fits)} fits missing"
    versions = ", ".join(f"{name} {version(name)}" for name in ("bvpo", "torch", "lightning", "transformers"))
    return (
        f"`{command}`, {date.today()}, {versions}{missing}. Mean ± standard error over "
        "seeds; differences are paired by seed, with their 95% t interval."
    )


def parse(args: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and those of `bvpo.fit` that every cell gets."""
    parser = argparse.ArgumentParser(
        prog="python -m bvpo.ablate",
        description=__doc__,
        epilog="Any other option is one of bvpo.fit and goes to every cell, such as --trainer.max_steps=3.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("grid", type=Path, help="YAML file; bvpo/grid.py describes it.")
    parser.add_argument("--jobs", type=int, default=1, help="Fits at once.")
    parser.add_argument("--output", type=Path, help="Folder of runs and tables, in place of the file's.")
    parser.add_argument("--seeds", type=json.loads, help="How many seeds, or a list, in place of the file's.")
    parser.add_argument("--slurm", type=json.loads, help="Run on Slurm: submitit's parameters as a JSON object.")
    parser.add_argument("--report", action="store_true", help="Run nothing: the table of what is finished.")
    return parser.parse_known_args(args)


def command(options: argparse.Namespace, others: Sequence[str]) -> str:
    """The command that makes the same table, wherever and however many at once its fits are run."""
    words = ["python", "-m", "bvpo.ablate", str(options.grid)]
    words += [] if options.output is None else [f"--output={options.output}"]
    words += [] if options.seeds is None else [f"--seeds={json.dumps(options.seeds)}"]
    return shlex.join([*words, *others])


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0; 1 where a fit failed; 2 after an error that the user can mend;
    130 when interrupted."""
    begin()
    options, others = parse(args)
    console = Console(width=None if sys.stdout.isatty() else 200, emoji=False)  # a cell may be named :warning:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed: dict[Fit, str] = {}
    code = 0
    try:
        if options.jobs < 1:
            raise UserError(f"jobs must be ≥ 1, got {options.jobs}")
        grid = load_grid(options.grid, others, options.output, options.seeds)
        if not options.report:
            failed = run(grid, options.jobs, options.slurm, console)
        report(grid, command(options, others), console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    for fit, cause in failed.items():
        print(f"error: {fit.name} failed: {cause}", file=sys.stderr)
    return code or (1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
