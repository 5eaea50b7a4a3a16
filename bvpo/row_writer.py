"""Rows → a JSONL or Parquet file of the documented schema, which is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

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

    Written under another name, synced, renamed: an older file is replaced by a whole one, or not touched.

    Raises:
        UserError: The file cannot be written, or the disk takes no more.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    schema = pa.schema([field for field in SCHEMA if field.name not in leave_out])
    write = _write_parquet if path.suffix == ".parquet" else _write_jsonl
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            count = write(file, rows, schema)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return count


def _write_jsonl(file: BinaryIO, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> int:
    count = 0
    for row in rows:
        line = json.dumps({name: row[name] for name in schema.names}, ensure_ascii=False)
        file.write(line.encode() + b"\n")
        count += 1
    return count


def _write_parquet(file: BinaryIO, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> int:
    count, iterator = 0, iter(rows)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while block := list(islice(iterator, BLOCK)):
            writer.write_table(pa.Table.from_pylist(block, schema))
            count += len(block)
    return count
