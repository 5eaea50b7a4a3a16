"""Files and Hub data sets → rows as they stand, with the columns that are known.

A source that cannot be read is refused whole, in one line. A row that does not fit is named in a column of its own.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import file_digest
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

from bvpo.batches import PREFIX
from bvpo.errors import UserError

BUILTIN = {"builtin:tiny_reasoner": Path(__file__).parent / "assets" / "tiny_reasoner_pairs.parquet"}
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "empty_prompt", "empty_chosen", "empty_rejected")
PROBLEM = "bvpo_problem"  # the column in which a reader notes what is wrong with a row
COMPLETIONS = ("chosen", "rejected", "empty_chosen", "empty_rejected")

TEXT, NUMBER = datasets.Value("string"), datasets.Value("float64")
MESSAGES = datasets.List({"role": TEXT, "content": TEXT, "reasoning_content": TEXT})
TURNS = datasets.List(MESSAGES.feature | {"thinking": TEXT})  # gpt-oss's name of reasoning_content
CANDIDATES = datasets.List({"trace": TEXT, "answer": TEXT, "score": NUMBER, "finish_reason": TEXT})
OPTIONAL_COLUMNS = {
    "prompt_id": TEXT,
    "conversation": MESSAGES,
    "trace_candidates": CANDIDATES,
    "empty_candidates": CANDIDATES,
    "anchor_traces": datasets.List({"trace": TEXT, "logprob": NUMBER}),
    "template_sha": TEXT,
    "sampler_model": TEXT,
    "reward_model": TEXT,
    "all_generated_responses": datasets.List(TEXT),
    "all_rm_scores": datasets.List(NUMBER),
}
STRUCTURE = {
    "conversation": "a list of messages",
    "trace_candidates": "objects with trace, answer, score and finish_reason",
    "empty_candidates": "objects with trace, answer, score and finish_reason",
    "anchor_traces": "objects with trace and logprob",
    "all_generated_responses": "a list of texts",
    "all_rm_scores": "a list of numbers",
}
KNOWN = {*TEXT_COLUMNS, *OPTIONAL_COLUMNS}
CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


def read_records(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a file or a Hub data set as they stand, whatever their columns. Raises UserError as `load_rows`."""
    path = Path(source)
    if path.suffix not in (".json", ".jsonl"):
        yield from _open(source)
        return
    _check_file(path, source)
    for number, value in enumerate(_json_values(path, source), 1):
        if not isinstance(value, dict):
            raise UserError(f"{source}, row {number}: expected an object with named fields, found {describe(value)}")
        yield value


def load_rows(source: str, one_sided: bool = False) -> datasets.Dataset:
    """The rows of a JSON, JSON Lines or Parquet file, a built-in set, or a Hub data set.

    Args:
        source: A file; `builtin:tiny_reasoner`; or `owner/name` on the Hub, its split `train`, or `owner/name:split`.
        one_sided: Whether the columns of one branch may be absent.

    Raises:
        UserError: The source does not exist, cannot be read, is empty, or lacks a column.
    """
    rows = _open(source, KNOWN)
    if len(rows) == 0:
        raise UserError(f"{source}: no rows; expected one row a prompt")
    _check_columns(rows, source, one_sided)
    return rows


def _open(source: str, wanted: Collection[str] = ()) -> datasets.Dataset:
    """All columns of a Parquet file or Hub data set. Where a Parquet file has some of `wanted`, these alone."""
    path = BUILTIN.get(source, Path(source))
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        return _open_hub(source)
    _check_file(path, source)
    kind = "Parquet" if path.suffix == ".parquet" else "JSON"
    try:
        content = _content(path)
        with cache_errors(source, healthy=kind == "JSON"):  # of which we read every row ourselves
            return _read_json(path, source, content) if kind == "JSON" else _read_parquet(path, content, wanted)
    except Exception as error:  # datasets raises whatever its reader or Arrow raises
        root = error if isinstance(error, UserError) else error.__cause__ or error
        if isinstance(root, UserError):
            raise root from None
        if "corresponds to no data" in str(error):
            raise UserError(f"{source}: no rows; expected one row a prompt") from error
        raise UserError(f"{source}: cannot be read as {kind}: {first_line(root)}") from error


def _content(path: Path) -> str:
    """SHA-256 of a file: what its rows are cached by."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


@contextmanager
def cache_errors(source: str, healthy: bool = True) -> Iterator[None]:
    """Raises UserError where the rows of a source cannot be written to the cache, or those in it are damaged.

    Args:
        healthy: Whether the source itself is known not to be what Arrow cannot read.
    """
    try:
        yield
    except Exception as error:
        root, folder = error.__cause__ or error, datasets.config.HF_DATASETS_CACHE
        if isinstance(root, OSError) and root.errno in CANNOT_WRITE:
            raise UserError(
                f"{source}: its rows cannot be cached in {folder}: {root.strerror}; set HF_DATASETS_CACHE to a folder "
                "that can be written and has room"
            ) from error
        unreadable = isinstance(root, pa.ArrowException | json.JSONDecodeError)
        if healthy and (unreadable or (isinstance(root, OSError) and not root.errno)):
            raise UserError(
                f"{source}: its rows in the cache are damaged ({first_line(root)}): delete {folder}, which is made anew"
            ) from error
        raise


def _read_parquet(path: Path, content: str, wanted: Collection[str]) -> datasets.Dataset:
    """A Parquet file's rows. `datasets` takes its date for its content: the name of the configuration says better."""
    if "::" in str(path):
        raise UserError(f"{path}: `datasets` reads no Parquet file with '::' in its path; rename it")
    # the name is taken for a pattern; without a batch size a whole row group is in memory
    options: dict[str, Any] = {"data_files": glob.escape(str(path)), "batch_size": 1000}
    schema = pq.read_schema(path)
    if known := [name for name in schema.names if name in wanted]:  # others may be of a type that it does not have
        fields = pa.schema([schema.field(name) for name in known], schema.metadata)
        options |= {"columns": known, "features": datasets.Features.from_arrow_schema(fields)}
    load = partial(datasets.load_dataset, "parquet", name=content, split="train", **options)
    try:
        return cast(datasets.Dataset, load())
    except Exception:  # of the file, or of what is cached of it: which one, reading it anew says
        return cast(datasets.Dataset, load(download_mode="force_redownload"))


def _open_hub(source: str) -> datasets.Dataset:
    """A data set of the Hub: `owner/name`, or `owner/name:split`."""
    if Path(source).exists() or source.startswith(("builtin:", ".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: not a data set; give a .jsonl or .parquet file, a Hub id, or {_builtin()}")
    name, _, split = source.partition(":")
    try:
        return cast(datasets.Dataset, datasets.load_dataset(name, split=split or "train"))
    except Exception as error:  # datasets raises whatever its reader, the network or Arrow raises
        raise UserError(f"{source}: {_hub_problem(name, error)}") from error


def _hub_problem(name: str, error: Exception) -> str:
    """Why a data set cannot be had from the Hub, and what to do. `datasets` says some of it in its messages only."""
    told, login = str(error), "log in with `hf auth login`, or set HF_TOKEN"
    listed = re.search(r"one (?:of|among)[^\[]*\[([^\]]*)\]", told)
    names = listed[1].replace("'", "") if listed else ""
    if isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in told:
        return "the Hub cannot be reached: check the network, and HF_HUB_OFFLINE, or give a file"
    if isinstance(error, DatasetNotFoundError) and "gated" in told:
        return f"a gated data set: ask for access at https://huggingface.co/datasets/{name}, and {login}"
    if isinstance(error, DatasetNotFoundError):
        return f"there is no such data set on the Hub, or it is private: check the id, or {login}"
    if isinstance(error, DataFilesNotFoundError | EmptyDatasetError):
        return "the data set on the Hub holds no data files"
    if "Unknown split" in told:
        return f"has no such split; it has {names}: give one as {name}:SPLIT"
    if "Config name is missing" in told:
        return f"has several configurations, {names}: download the one to train on and give its file"
    return f"cannot be read: {first_line(error.__cause__ or error)}"


def _check_file(path: Path, source: str) -> None:
    try:
        path.exists()
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    if path.is_dir():
        raise UserError(f"{source}: is a folder; give a JSONL or Parquet file, a Hub id, or {_builtin()}")
    if not path.is_file():
        raise UserError(f"{source}: there is no such file; give a JSONL or Parquet file, a Hub id, or {_builtin()}")
    if path.stat().st_size == 0:
        raise UserError(f"{source}: the file is empty; expected one row a prompt")


def _builtin() -> str:
    return ", ".join(BUILTIN)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _read_json(path: Path, source: str, content: str) -> datasets.Dataset:
    """A JSON file's rows, converted to Arrow row by row: memory is bounded, and each error has its row."""
    kinds = OPTIONAL_COLUMNS | _text_kinds(path, source)
    rows = datasets.Dataset.from_generator(
        json_rows,
        features=datasets.Features(kinds | {PROBLEM: TEXT}),
        gen_kwargs={"path": str(path), "source": source, "kinds": kinds, "stamp": content + _content(Path(__file__))},
    )
    absent = [name for name in rows.column_names if rows.data.column(name).null_count == len(rows)]
    if len(absent) == len(rows.column_names):
        absent.remove(PROBLEM)  # a data set without columns has no rows
    return rows.remove_columns(absent)


def _text_kinds(path: Path, source: str) -> dict[str, Any]:
    """Whether each of the six columns holds text or messages: as its first value has it, in whichever row that is."""
    kinds: dict[str, Any] = {}
    for row in _json_values(path, source):
        for name in set(TEXT_COLUMNS) - kinds.keys() if isinstance(row, dict) else ():
            if (value := row.get(name)) and isinstance(value, str | list):
                kinds[name] = TEXT if isinstance(value, str) else TURNS
        if len(kinds) == len(TEXT_COLUMNS):
            break
    return dict.fromkeys(TEXT_COLUMNS, TEXT) | kinds


def json_rows(path: str, source: str, kinds: Mapping[str, Any], stamp: str) -> Iterator[dict[str, Any]]:
    """Every known column of every row, None where it is absent; what does not fit is named in the column `PROBLEM`.

    `stamp` changes with the file's content: `datasets` caches by the arguments.
    """
    for value in _json_values(Path(path), source):
        row: dict[str, Any] = {PROBLEM: None}
        if not isinstance(value, dict):
            row[PROBLEM] = f"expected an object with named fields, found {describe(value)}"
            value = dict.fromkeys(TEXT_COLUMNS)
        value["prompt_id"] = number_as_text(value.get("prompt_id"))
        for name, kind in kinds.items():
            row[name] = None
            try:
                row[name] = conform(value.get(name), kind)
            except ValueError as error:
                expected = STRUCTURE.get(name) or ("text" if kind == TEXT else "a list of messages")
                row[PROBLEM] = row[PROBLEM] or f"field {name}: expected {expected}, found {error}"
            if row[name] is None and name in value and name in TEXT_COLUMNS:
                row[name] = "" if kind == TEXT else []  # present, but nothing that can be used
        yield row


def _json_values(path: Path, source: str) -> Iterator[Any]:
    """The values of a JSON Lines file, or of a file that holds one JSON list. Blank lines are no rows."""
    with path.open("rb") as file:
        head = file.read(4)
        if head[:2] == b"\x1f\x8b":
            raise UserError(f"{source}: cannot be read as JSON: it is gzip-compressed; decompress it first")
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in head:
            raise UserError(f"{source}: cannot be read as JSON: expected text in UTF-8, found UTF-16 or binary data")
        bom = 3 if head[:3] == b"\xef\xbb\xbf" else 0
        file.seek(bom)
        while (first := file.read(1)).isspace():
            pass
        if first == b"[":
            file.seek(bom)
            try:
                yield from json.loads(file.read())
                return
            except (ValueError, RecursionError):  # lists on lines of their own, or damaged: the lines say which
                pass
        file.seek(bom)
        row = 0
        for line in file:
            if not line.strip():
                continue
            row += 1
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError as error:
                found = f"the byte 0x{line[error.start]:02x} at position {error.start}"
                raise UserError(f"{source}: cannot be read: row {row}: expected UTF-8, found {found}") from None
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{source}: cannot be read: row {row}: expected one JSON object on the line, found "
                    f"{line[:40].decode(errors='replace').strip()!r} ({first_line(error)})"
                ) from None
            yield value


def number_as_text(value: Any) -> Any:
    """A whole number as text, so that a `prompt_id` of 7, 7.0 and "7" is one; anything else as it is.

    None for NaN: pandas writes it where there is no value.
    """
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) else value


def conform(value: Any, kind: Any) -> Any:
    """The part of a JSON value that a column of this kind holds. Raises ValueError with what was found instead."""
    if value is None:
        return None
    if kind == TEXT and isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("text with half a surrogate pair, which is no character") from None
        return value
    if kind == NUMBER and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError("an integer beyond every float") from None
    if isinstance(kind, datasets.List) and isinstance(value, list):
        if isinstance(kind.feature, dict) and None in value:
            raise ValueError("null in the list")
        return [conform(item, kind.feature) for item in value]
    if isinstance(kind, dict) and isinstance(value, dict):
        return {name: conform(value.get(name), own) for name, own in kind.items()}
    raise ValueError(describe(value))


def describe(value: Any) -> str:
    return "nothing" if value in (None, "", []) else f"{type(value).__name__} {str(value)[:40]!r}"


def _check_columns(rows: datasets.Dataset, source: str, one_sided: bool) -> None:
    """Raises UserError, saying what the file seems to be and what it lacks."""
    columns = [name for name in rows.column_names if name != PROBLEM]
    conversational = any(
        name in columns and not isinstance(rows.features[name], datasets.Value) for name in COMPLETIONS
    )
    pairs = [prefix for prefix in PREFIX.values() if {f"{prefix}chosen", f"{prefix}rejected"} <= set(columns)]
    prompts = [f"{prefix}prompt" in columns for prefix in pairs]
    if len(pairs) >= (1 if one_sided else 2) and (conversational or all(prompts) or not any(prompts)):
        return
    rendered = {"prompt", "empty_prompt"} if conversational else set()
    missing = [name for name in TEXT_COLUMNS if name not in columns and name not in rendered]
    hint = f"A row needs {', '.join(TEXT_COLUMNS)}"
    if {"chosen", "rejected"} <= set(columns):
        best = "best and worst of all_generated_responses by all_rm_scores" if "all_rm_scores" in columns else "TRL"
        shape = "conversational" if conversational else "standard"
        hint = (
            f"These are {shape} preference rows ({best}) with one pair a prompt. BVPO needs two: answer the same "
            "prompts with thinking disabled, score the answers, and add the best and the worst as empty_chosen and "
            "empty_rejected" + ("" if conversational else ", with empty_prompt, the prompt that they answer")
        ) + "; or set on_one_sided to keep, and train on one estimator"
    raise UserError(f"{source}: no column {', '.join(missing)}; it has {', '.join(columns) or 'none of them'}. {hint}")
