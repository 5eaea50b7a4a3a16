"""The journal keeps what was whole: torn at any byte, killed at any moment, on a full disk, by two at once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bvpo.errors import UserError
from bvpo.journal import Journal
from bvpo.sampler import FIELDS

RECORDS: list[dict[str, Any]] = [
    {"key": "a", "text": "plain"},
    {"key": "b", "text": "ß → 語 😀 \u2028 \u2029 \x85 \r \n \t \x00 \ufeff", "list": [1, 2.5, None]},
    {"key": "c", "text": ""},
]
WRITER = """
import sys
from pathlib import Path
from bvpo.journal import Journal
with Journal(Path(sys.argv[1]), "records", lambda r: r["key"]) as journal:
    print("ready", len(journal), flush=True)
    {body}
"""


def open_journal(folder: Path, part: str = "") -> Journal:
    return Journal(folder, "records", lambda record: record["key"], part)


def filled(folder: Path, part: str = "", records: list[dict[str, Any]] = RECORDS) -> Path:
    with open_journal(folder, part) as journal:
        for record in records:
            journal.append(record)
    return journal.path


def start(folder: Path, body: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER.format(body=body), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# --- What is written is read back -------------------------------------------------------------------------------------


def test_records_are_read_back_in_any_order(tmp_path: Path) -> None:
    filled(tmp_path / "new" / "folder")
    with open_journal(tmp_path / "new" / "folder") as journal:
        assert len(journal) == 3 and "a" in journal and "x" not in journal
        for record in reversed(RECORDS):
            assert journal[record["key"]] == record
        journal.append({"key": "d", "text": "more"})
        assert journal["d"]["text"] == "more" and journal["a"] == RECORDS[0]


def test_a_record_is_a_line_whatever_its_text(tmp_path: Path) -> None:
    """U+2028 and the like end lines to `str.splitlines`; here only line feeds do, and JSON escapes those of texts."""
    path = filled(tmp_path)
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == RECORDS
    assert "語" in path.read_text(encoding="utf-8")


def test_the_first_of_equal_keys_stands(tmp_path: Path) -> None:
    with open_journal(tmp_path) as journal:
        journal.append({"key": "a", "text": "first"})
        journal.append({"key": "a", "text": "second"})
        assert journal["a"]["text"] == "first" and len(journal) == 1
    with open_journal(tmp_path) as journal:
        assert journal["a"]["text"] == "first" and len(journal) == 1


def test_parts_are_read_together(tmp_path: Path) -> None:
    """Each writer has a file of its own, may be open at once, and sees what the others had written when it opened."""
    first = filled(tmp_path, "1-of-2", RECORDS[:1])
    with open_journal(tmp_path, "2-of-2") as second:
        assert second["a"] == RECORDS[0]
        second.append(RECORDS[1])
        with open_journal(tmp_path) as whole:
            assert len(whole) == 2 and whole["b"] == RECORDS[1]
    assert {path.name for path in tmp_path.iterdir()} == {
        "records.jsonl",
        "records.1-of-2.jsonl",
        "records.2-of-2.jsonl",
    }
    assert first.read_bytes().count(b"\n") == 1


def test_another_writers_unfinished_line_is_left_alone(tmp_path: Path) -> None:
    other = filled(tmp_path, "2-of-2")
    torn = other.read_bytes()[:-5]
    other.write_bytes(torn)
    with open_journal(tmp_path, "1-of-2") as journal:
        assert len(journal) == 2
    assert other.read_bytes() == torn


# --- Torn and damaged -------------------------------------------------------------------------------------------------


def test_a_line_torn_at_any_byte_is_cut_off_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = whole[:size].count(b"\n")
        with open_journal(tmp_path) as journal:
            assert len(journal) == kept
            assert path.read_bytes() == b"".join(line + b"\n" for line in whole.split(b"\n")[:kept])
            journal.append({"key": "new", "text": "z"})
        with open_journal(tmp_path) as journal:
            assert len(journal) == kept + 1 and journal["new"]["text"] == "z"
            assert [record["key"] for record in RECORDS if record["key"] in journal] == ["a", "b", "c"][:kept]


def test_a_torn_line_longer_than_what_is_read_at_once_is_cut_off(tmp_path: Path) -> None:
    """The last line break is searched from the end, 64 KiB at a time."""
    path = filled(tmp_path)
    whole = path.read_bytes()
    for size in (1 << 16, (1 << 16) - 1, (1 << 16) + 1, 200_000):
        path.write_bytes(whole + b"x" * size)
        with open_journal(tmp_path) as journal:
            assert len(journal) == 3
        assert path.read_bytes() == whole
    path.write_bytes(b"x" * 200_000)
    with open_journal(tmp_path) as journal:
        assert len(journal) == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "damage",
    [b'{"key": "b", "te', b"\x00" * 40, b"\xff\xfe", b"", b"[]", b"3", b'{"text": "no key"}'],
    ids=["torn", "zeros", "no text", "blank", "a list", "a number", "no key"],
)
def test_a_damaged_line_is_an_error_that_names_it(tmp_path: Path, damage: bytes) -> None:
    path = filled(tmp_path)
    one, _, three, end = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([one, damage, three, end]))
    with pytest.raises(UserError, match=r"records\.jsonl, line 2: expected one JSON record, found .* delete this line"):
        open_journal(tmp_path)
    path.write_bytes(b"\n".join([one, three, end]))  # as it says
    with open_journal(tmp_path) as journal:
        assert len(journal) == 2


@pytest.mark.parametrize("field", ["seed", "text", "n_tokens", "finish_reason"])
def test_a_response_without_its_fields_is_a_damaged_line(tmp_path: Path, field: str) -> None:
    """All that reads `responses` relies on them: evaluations, rows, the measurement of stochasticity."""
    whole = {"key": "a", "seed": 1, "text": "", "n_tokens": 1, "finish_reason": "stop"}
    path = tmp_path / "responses.jsonl"
    for damaged in ({k: v for k, v in whole.items() if k != field}, whole | {field: None}):
        path.write_text(json.dumps(whole) + "\n" + json.dumps(damaged) + "\n")
        with pytest.raises(UserError, match=r"responses\.jsonl, line 2: expected one JSON record"):
            Journal(tmp_path, "responses", lambda record: record["key"], fields=FIELDS)
    path.write_text(json.dumps(whole) + "\n")
    with Journal(tmp_path, "responses", lambda record: record["key"], fields=FIELDS) as journal:
        assert journal["a"] == whole


# --- Two at once ------------------------------------------------------------------------------------------------------


def test_two_processes_cannot_write_one_file(tmp_path: Path) -> None:
    first = start(tmp_path, "sys.stdin.read()", stdin=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == "ready 0\n"
    with pytest.raises(UserError, match=r"records\.jsonl: another process is writing this file; wait for it"):
        open_journal(tmp_path)
    with open_journal(tmp_path, "2-of-2") as journal:  # another part is free
        journal.append(RECORDS[0])
    first.kill()
    first.communicate()
    with open_journal(tmp_path) as journal:  # the lock went with the process
        assert len(journal) == 1


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"):
        open_journal(tmp_path / "file")
    (tmp_path / "folder" / "records.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"records\.jsonl: cannot be written: Is a directory"):
        open_journal(tmp_path / "folder")


# --- Killed, and out of room ------------------------------------------------------------------------------------------


def test_a_kill_loses_nothing_that_was_written(tmp_path: Path) -> None:
    """The writer says a number once its record is appended. Killed at random moments, each time all of them are there;
    at most the one that was being written is there too, or torn and cut off."""
    body = (
        "number = len(journal)\n"
        "    while True:\n"
        "        journal.append({'key': number, 'text': 'x' * (number * 977 % 5000)})\n"
        "        print(number, flush=True)\n"
        "        number += 1"
    )
    rng, there = random.Random(0), 0
    for _ in range(4):
        process = start(tmp_path, body)
        assert process.stdout is not None and process.stdout.readline() == f"ready {there}\n"
        time.sleep(rng.uniform(0.01, 0.15))
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        process.communicate()
        with open_journal(tmp_path) as journal:
            assert len(journal) - (max(said, default=there - 1) + 1) in (0, 1)
            for number in range(max(0, len(journal) - 200), len(journal)):
                assert journal[number] == {"key": number, "text": "x" * (number * 977 % 5000)}
            there = len(journal)
    assert there > 10


def test_a_disk_that_takes_no_more_is_said_and_the_next_start_repairs(tmp_path: Path) -> None:
    """A limit of 1,000 bytes on files, in a process of its own: the write that meets it is torn."""
    body = (
        "import resource\n"
        "    from bvpo.errors import UserError\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "    for number in range(100):\n"
        "        try:\n"
        "            journal.append({'key': number, 'text': 'x' * 100})\n"
        "        except UserError as error:\n"
        "            print(number, error, flush=True)\n"
        "            break"
    )
    process = start(tmp_path, body)
    said, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    message = said.splitlines()[1]
    failed = int(message.partition(" ")[0])
    assert "cannot be written: File too large. What is in it is kept: make room and start again" in message
    with open_journal(tmp_path) as journal:
        assert len(journal) == failed == 1000 // len(json.dumps({"key": 1, "text": "x" * 100}) + "\n")
        journal.append({"key": failed, "text": "room again"})
    with open_journal(tmp_path) as journal:
        assert len(journal) == failed + 1


def test_a_record_after_one_that_failed_is_whole(tmp_path: Path) -> None:
    """Room may come back while the process lives: what it writes next does not stand behind half a record."""
    body = (
        "import resource\n"
        "    from bvpo.errors import UserError\n"
        "    journal.append({'key': 0})\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (50, 5000))\n"
        "    try:\n"
        "        journal.append({'key': 1, 'text': 'x' * 100})\n"
        "    except UserError:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "        journal.append({'key': 2})"
    )
    _, errors = start(tmp_path, body).communicate(timeout=60)
    assert not errors
    with open_journal(tmp_path) as journal:
        assert len(journal) == 2 and 0 in journal and 2 in journal


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_device(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), journal._file.fileno())
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        journal.append(RECORDS[0])
    assert len(journal) == 0
    journal._file.close()
