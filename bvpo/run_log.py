"""A run's log: `metrics.csv`, which survives kills and full disks, and TensorBoard's events."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from bvpo.checkpoints import replacing, write_whole
from bvpo.errors import UserError

METRICS = "metrics.csv"


class EventLogger(TensorBoardLogger):
    """TensorBoard events, handed to the system step by step: a killed run loses none."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)  # type: ignore[arg-type]
        self.experiment.flush()


class MetricsLogger(Logger):
    """`metrics.csv`: a row a call, a column a log key, in alphabetical order.

    A row is appended in one write. A new key takes another header, so the file is written anew and renamed into its
    place. A kill leaves the rows that were logged; a torn last row is cut off when the run goes on.

    Args:
        path: Of the file.
        resumed_at: Rows of this step and later ones come again: what the file has of them is dropped.
    """

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        if path.exists():
            columns, rows = read_table(path)
            self._write(columns, [row for row in rows if int(row["step"]) < resumed_at])

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        return str(self.path.parent.parent)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row. Raises UserError where the disk does not take it; the rows before it remain."""
        assert step is not None
        row = {key: float(value) for key, value in metrics.items()} | {"step": step}
        try:
            if new := row.keys() - set(self._columns):
                rows = read_table(self.path)[1] if self._columns else []
                self._write(sorted([*self._columns, *new]), [*rows, row])
            else:
                self._append(_csv(self._columns, [row]))
        except OSError as error:
            raise UserError(
                f"{self.path}: step {step} cannot be logged: {error.strerror}. What is in the file is kept: make room "
                "and go on with --ckpt_path last"
            ) from error

    def _append(self, line: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                write_whole(file, line)
            except BaseException:
                file.truncate(end)
                raise

    def _write(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            write_whole(file, _csv(columns, rows, header=True))
        self._columns = columns

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Wait until the disk has the rows too, not only the checkpoint that stands for them."""
        with suppress(OSError), self.path.open("ab") as file:
            os.fsync(file.fileno())


def _csv(columns: list[str], rows: list[dict[str, Any]], header: bool = False) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def whole_lines(path: Path) -> str:
    """A table's text; what stands behind the last line break was torn by a kill. Raises UserError as `read_table`."""
    try:
        return path.read_bytes().rpartition(b"\n")[0].decode()
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows, as text; every value is a number or empty, and every row has a step.

    Raises UserError where the file is no such table.
    """
    reader = csv.DictReader(io.StringIO(whole_lines(path), newline=""))
    rows = []
    try:
        for row in reader:
            int(row["step"])
            for value in row.values():
                float(value or 0)
            rows.append(row)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        cause = "there is no column step" if isinstance(error, KeyError) else str(error)
        raise _damaged(path, f"line {reader.line_num}: {cause}") from error
    return list(reader.fieldnames or []), rows


def _damaged(path: Path, cause: str) -> UserError:
    return UserError(f"{path}: is no table of a run's log ({cause}): the file is damaged; mend it, or move it away")
