"""Rows → the rows that a baseline trains on: `python -m bvpo.derive --rows FILE --pairs CLASS --output FILE`.

Nothing is sampled: the pairs are made of what the rows hold. The output has trace pairs alone, in TRL's form, for
`data.on_one_sided: keep`; a second run that makes the same rows leaves the file untouched.
"""

from __future__ import annotations

import filecmp
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from bvpo.commands import exit_code, options_parser
from bvpo.derived_pairs import DerivedPairs, Row
from bvpo.errors import UserError
from bvpo.reading import load_rows
from bvpo.row_writer import SCHEMA, write_rows
from bvpo.rows import conform_row
from bvpo.traces import ThinkFormat, think_format

KEPT = ("prompt_id", "conversation", "prompt", "chosen", "rejected", "template_sha", "sampler_model", "reward_model")
LEFT_OUT = [name for name in SCHEMA.names if name not in KEPT]


def derive(rows: str, pairs: DerivedPairs, output: Path, think: ThinkFormat) -> tuple[int, int]:
    """Write the derived rows. Returns the numbers of rows read and written.

    Raises:
        UserError: A row lacks a field, the file cannot be read or written, or one would overwrite the other.
    """
    if output.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"output {output}: expected a .parquet or .jsonl file")
    if output.is_dir():
        raise UserError(f"output {output}: is a folder; give a file that ends in .parquet or .jsonl")
    if output.exists() and Path(rows).exists() and output.samefile(rows):
        raise UserError(f"output {output}: would overwrite {rows}, which the rows are read from; give another file")
    source = load_rows(rows, one_sided=True)
    fresh = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(output.suffix, f".{output.stem}.", output.parent)  # no file of the user's
        os.close(handle)
        written = write_rows(fresh := Path(name), _derived(source, rows, pairs, think), LEFT_OUT)
        if not output.exists() or not filecmp.cmp(fresh, output, shallow=False):
            fresh.replace(output)  # an equal file keeps its date, and with it what is cached of its rows
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from error
    finally:
        if fresh is not None:
            with suppress(OSError):
                fresh.unlink()
    return len(source), written


def _derived(source: Any, name: str, pairs: DerivedPairs, think: ThinkFormat) -> Iterator[dict[str, Any]]:
    for number, read in enumerate(source, 1):
        row = conform_row(read, where := f"{name}, row {number}")
        try:
            made = pairs.pairs(row, think)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        for own in made:
            yield {column: row.get(column) for column in KEPT} | {"prompt_id": _prompt_id(row)} | own


def _prompt_id(row: Row) -> str:
    """Rows of one prompt share it: the statistics never multiply them."""
    return str(row.get("prompt_id") or row.get("prompt"))


def parser() -> ArgumentParser:
    """The command line."""
    own = options_parser("derive", __doc__, progress=False)
    own.add_argument("--rows", type=str, required=True, help="What `bvpo.fit` takes as data.train.")
    own.add_argument("--pairs", type=DerivedPairs, required=True, help="Class path: Pooled, SeveralTraces, …")
    own.add_argument("--output", type=str, required=True, help="A .parquet or .jsonl file.")
    own.add_argument("--think", type=str | ThinkFormat, default="qwen3", help="As data.think.")
    return own


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0; 2 after an error that the user can mend; 130 when interrupted."""

    def work() -> None:
        given = (own := parser()).instantiate_classes(own.parse_args(args))
        read, written = derive(given.rows, given.pairs, Path(given.output), think_format(given.think))
        print(f"{given.output}: {written} rows of {read}")

    return exit_code(work, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
