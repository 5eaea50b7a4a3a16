"""Rows → a JSONL or Parquet file of the documented schema, which is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bvpo.errors import UserError

CANDIDATE = pa.struct(
    [
        ("trace", pa.string()),
        ("answer", pa.string()),
        ("score", pa.float64()),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("n_tokens", pa.int64()),
        ("logprob", pa.float64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("conversation", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        *((name, pa.string()) for name in ("prompt", "chosen", "rejected")),
        *((name, pa.string()) for name in ("empty_prompt", "empty_chosen", "empty_rejected")),
        ("trace_candidates", pa.list_(CANDIDATE)),
        ("empty_candidates", pa.list_(CANDIDATE)),
        ("anchor_traces", pa.list_(pa.struct([("trace", pa.string()), ("logprob", pa.float64())]))),
        *((name, pa.string()) for name in ("template_sha", "sampler_model", "reward_model")),
    ]
)
BLOCK = 500  # rows in memory


def write_rows(path: Path, rows: Iterable[dict[str, Any]], leave_out: Collection[str] = ()) -> int:
    """Write the rows, without the columns to leave out, and return their number.

    Written under another name, synced, renamed: an older file is replaced by a whole one.

    Raises:
        UserError: The disk takes no more.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    blocks, count = _blocks(rows), 0
    schema = pa.schema([field for field in SCHEMA if field.name not in leave_out])
    try:
        with unfinished.open("wb") as file:
            writer: pq.ParquetWriter | None = None
            for block in blocks:
                if path.suffix == ".parquet":
                    writer = writer or pq.ParquetWriter(file, schema, compression="zstd")
                    writer.write_table(pa.Table.from_pylist(block, schema))
                else:
                    lines = (
                        json.dumps({name: row[name] for name in schema.names}, ensure_ascii=False) for row in block
                    )
                    file.write("".join(f"{line}\n" for line in lines).encode())
                count += len(block)
            if path.suffix == ".parquet":
                (writer or pq.ParquetWriter(file, schema)).close()
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return count


def _blocks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while block := list(islice(iterator, BLOCK)):
        yield block
