"""Rows reach the disk whole or not at all, and read back the same from JSONL and from Parquet."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from bvpo.errors import UserError
from bvpo.reading import load_rows, read_records
from bvpo.row_writer import BLOCK, SCHEMA, write_rows

SUFFIXES = ("jsonl", "parquet")
EMPTY_PAIR = ("empty_chosen", "empty_rejected")


def candidate(index: int) -> dict[str, Any]:
    """Every second one was cut off and has neither score nor log-probability."""
    known = index % 2 == 0
    return {
        "trace": f"\n1 + {index} \u2028 語\n",
        "answer": f"It is {index + 1}.",
        "score": index / 3 if known else None,
        "finish_reason": "stop" if known else "length",
        "seed": 2**48 - 1 - index,
        "n_tokens": 7 + index,
        "logprob": -1e-3 * index if known else None,
    }


def row(index: int) -> dict[str, Any]:
    return {
        "prompt_id": f"p{index}",
        "conversation": [{"role": "system", "content": ""}, {"role": "user", "content": f"1 + {index} ?"}],
        "prompt": f"<|user|>1 + {index} ?<|assistant|>",
        "chosen": f"<think>\n1 + {index}\n</think>\n\nIt is {index + 1}.<eos>",
        "rejected": f"<think>\n1 + {index}\r\n\x00</think>\n\nIt is\u2028 -1.<eos>",
        "empty_prompt": f"<|user|>1 + {index} ?<|assistant|><think>\n\n</think>\n\n",
        "empty_chosen": f"It is {index + 1}.<eos>",
        "empty_rejected": "It is 😀.<eos>",
        "trace_candidates": [candidate(index), candidate(index + 1)],
        "empty_candidates": [candidate(index)],
        "anchor_traces": [{"trace": "\n1\n", "logprob": -2.5}] * (index % 3),
        "template_sha": "0" * 64,
        "sampler_model": "builtin:tiny_reasoner",
        "reward_model": "builtin:tasks",
    }


def rows(count: int) -> Iterator[dict[str, Any]]:
    return (row(index) for index in range(count))


def one_sided(index: int) -> dict[str, Any]:
    return row(index) | dict.fromkeys(EMPTY_PAIR)


def read(path: Path) -> list[dict[str, Any]]:
    return list(read_records(str(path)))


# --- What is written is read back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, BLOCK, BLOCK + 1])
def test_jsonl_and_parquet_hold_the_rows(tmp_path: Path, count: int) -> None:
    for suffix in SUFFIXES:
        path = tmp_path / "new" / f"rows.{suffix}"
        assert write_rows(path, rows(count)) == count
        assert read(path) == list(rows(count))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"rows.jsonl", "rows.parquet"}


def test_the_training_data_reads_equal_rows(tmp_path: Path) -> None:
    found = []
    for suffix in SUFFIXES:
        write_rows(tmp_path / f"rows.{suffix}", rows(5))
        loaded = load_rows(str(tmp_path / f"rows.{suffix}"))
        found.append([{name: value for name, value in own.items() if name in row(0)} for own in loaded])
    for own, other, written in zip(*found, rows(5), strict=True):
        for name in ("prompt_id", "prompt", "chosen", "rejected", "empty_prompt", *EMPTY_PAIR, "anchor_traces"):
            assert own[name] == other[name] == written[name]
        for name in ("trace_candidates", "empty_candidates"):
            for one, two, three in zip(own[name], other[name], written[name], strict=True):
                assert one.items() <= three.items() and two == three  # JSON's reader takes the fields that it knows


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_reader_of_data_sets_reads_them(tmp_path: Path, suffix: str) -> None:
    """Without this package: types are what the file says, or what its first rows show."""
    path = tmp_path / f"rows.{suffix}"
    write_rows(path, rows(BLOCK + 2))
    kind = "json" if suffix == "jsonl" else suffix
    loaded = datasets.load_dataset(kind, data_files=str(path), split="train")
    assert len(loaded) == BLOCK + 2
    for index in (0, BLOCK, BLOCK + 1):
        assert {name: loaded[index][name] for name in SCHEMA.names} == row(index)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_are_left_out_by_name_only(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    write_rows(path, rows(2), leave_out=["anchor_traces"])
    assert read(path) == [{name: value for name, value in own.items() if name != "anchor_traces"} for own in rows(2)]
    write_rows(path, (own | {"anchor_traces": None} for own in rows(2)))
    assert [own["anchor_traces"] for own in read(path)] == [None, None]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_column_that_begins_after_the_first_block_is_there(tmp_path: Path, suffix: str) -> None:
    """One-sided rows: none of the first blocks' has an empty-trace pair, a later one has."""
    path = tmp_path / f"rows.{suffix}"
    count = 2 * BLOCK + 3
    write_rows(path, (row(k) if k >= 2 * BLOCK else one_sided(k) for k in range(count)))
    loaded = load_rows(str(path), one_sided=True)
    assert set(EMPTY_PAIR) <= set(loaded.column_names)
    found = [text or None for text in loaded["empty_chosen"][:]]  # a null of JSON is read as blank text
    assert found == [row(k)["empty_chosen"] if k >= 2 * BLOCK else None for k in range(count)]
    assert read(path)[-1] == row(count - 1) and read(path)[0] == one_sided(0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_of_one_side_alone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    write_rows(path, (one_sided(k) for k in range(3)))
    assert read(path) == [one_sided(k) for k in range(3)]
    assert load_rows(str(path), one_sided=True)["chosen"][:] == [row(k)["chosen"] for k in range(3)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_rows_are_a_file_that_says_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    assert write_rows(path, iter(())) == 0
    assert path.is_file()
    with pytest.raises(UserError, match=r"no rows|the file is empty"):
        load_rows(str(path))
    if suffix == "parquet":
        assert pq.read_schema(path).names == SCHEMA.names


def test_a_parquet_file_has_the_documented_types(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", (one_sided(k) for k in range(2)))
    assert pq.read_schema(tmp_path / "rows.parquet").equals(SCHEMA)


# --- Whole or not at all ----------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Like an interrupt."""


@pytest.mark.parametrize("error", [Stopped, KeyError, UserError], ids=lambda error: error.__name__)
@pytest.mark.parametrize("after", [0, 3, BLOCK + 3])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_error_leaves_the_older_file_and_no_other(
    tmp_path: Path, suffix: str, after: int, error: type[BaseException]
) -> None:
    """The rows' own error comes through as it is, an interrupt too."""
    path = tmp_path / f"rows.{suffix}"
    write_rows(path, rows(2))
    before = path.read_bytes()

    def failing() -> Iterator[dict[str, Any]]:
        yield from rows(after)
        raise error("a score is missing")

    with pytest.raises(error, match="a score is missing") as raised:
        write_rows(path, failing())
    assert type(raised.value) is error
    assert path.read_bytes() == before and [own.name for own in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_a_kill_has_left_is_written_over(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.with_name(f"{path.name}.unfinished").write_bytes(b"half a file" * 1000)
    write_rows(path, rows(2))
    assert read(path) == list(rows(2)) and [own.name for own in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_takes_no_more_is_said(tmp_path: Path, suffix: str) -> None:
    """A limit of 20,000 bytes on files, in a process of its own; the rows are 1,200 different ones."""
    path = tmp_path / f"rows.{suffix}"
    write_rows(path, rows(2))
    before = path.read_bytes()
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from bvpo.errors import UserError\n"
        "from bvpo.row_writer import write_rows\n"
        "from tests.test_row_writer import rows\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        "    write_rows(Path(sys.argv[1]), rows(1200))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert "cannot be written" in done.stdout and "File too large" in done.stdout, done.stderr
    assert path.read_bytes() == before and [own.name for own in tmp_path.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        write_rows(tmp_path / "file" / "rows.jsonl", rows(1))
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match=r"rows\.jsonl: cannot be written: Is a directory"):
        write_rows(tmp_path / "rows.jsonl", rows(1))
    assert sorted(own.name for own in tmp_path.iterdir()) == ["file", "rows.jsonl"]


def test_a_line_of_jsonl_is_a_row_in_plain_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", rows(2))
    lines = (tmp_path / "rows.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == list(rows(2)) and lines[-1] == b""
    assert "語".encode() in lines[0]
