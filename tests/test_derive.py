"""What `bvpo.derive` leaves alone, and what it refuses to write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bvpo import derive
from tests.conftest import make_rows, write_rows


def command(rows: Path, output: Path) -> int:
    return derive.main([f"--rows={rows}", "--pairs=bvpo.derived_pairs.Pooled", f"--output={output}"])


def test_other_files_of_the_folder_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user calls his own; nothing of ours is left, and the rows can be read by who may read others."""
    rows, mine = write_rows(tmp_path / "rows.jsonl", make_rows(4)), tmp_path / "out.new.jsonl"
    mine.write_text("mine")
    assert command(rows, tmp_path / "out.jsonl") == 0
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.new.jsonl", "rows.jsonl"]
    assert (tmp_path / "out.jsonl").stat().st_mode == mine.stat().st_mode
    before = (tmp_path / "out.jsonl").stat().st_mtime_ns
    assert command(rows, tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == before


def test_an_output_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(4))
    (tmp_path / "dir.jsonl").mkdir()
    assert command(rows, tmp_path / "dir.jsonl") == 2
    assert "dir.jsonl: is a folder" in capsys.readouterr().err
    assert command(rows, rows / "inside.jsonl") == 2
    assert "inside.jsonl: cannot be written" in capsys.readouterr().err
    rename = os.replace

    def refused(self: Path, target: Path) -> None:
        if target.name == "out.jsonl":
            raise OSError(28, "No space left on device")
        rename(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    assert command(rows, tmp_path / "out.jsonl") == 2
    assert "out.jsonl: cannot be written: No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.jsonl", "rows.jsonl"]
