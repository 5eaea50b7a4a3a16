"""A run's table, config and notes when they are damaged: one line, whoever reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bvpo import export, fit
from bvpo.analysis import read_run
from bvpo.errors import UserError
from bvpo.run_log import MetricsLogger, read_table
from bvpo.runs import lock_run, note_ranks, read_config, run_loggers

Fit = Callable[..., Path]
TABLES = {
    "a step that is none": b"loss,step\r\n1.0,a\r\n",
    "no column step": b"loss\r\n1.0\r\n",
    "bytes": b"\xff\xfe,step\r\n1,2\r\n",
    "NUL": b"loss,step\r\n1.0,\x00\r\n",
    "a value that is none": b"loss,step\r\nx,1\r\n",
    "a field too few": b"loss,step\r\n1.0\r\n",
    "a field too many": b"loss,step\r\n1.0,1,2\r\n",
}
CONFIGS = {"nothing": b"", "torn": b"a: [1", "bytes": b"\x00\xff\xfe", "a list": b"- 1\n"}


@pytest.mark.parametrize("damage", TABLES)
def test_a_damaged_table_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(TABLES[damage])
    for reader in (read_table, lambda _: read_run(tmp_path), MetricsLogger):
        with pytest.raises(UserError, match=r"metrics\.csv: is no table of a run's log"):
            reader(path)
    assert path.read_bytes() == TABLES[damage]


def test_a_whole_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"loss,step\r\nnan,0\r\n,1\r\n0.5,2")
    assert read_table(path) == (["loss", "step"], [{"loss": "nan", "step": "0"}, {"loss": "", "step": "1"}])
    path.write_bytes(b"")
    assert read_table(path) == ([], [])


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_damaged_config_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"loss,step\r\n1.0,0\r\n")
    path = tmp_path / "config.yaml"
    path.write_bytes(CONFIGS[damage])
    for reader in (lambda: read_config(path), lambda: read_run(tmp_path)):
        with pytest.raises(UserError, match=r"config\.yaml: expected the run's options"):
            reader()
    path.write_text("model: 1\ndata: {}\n")
    with pytest.raises(UserError, match=r"config\.yaml: does not hold a run's options"):
        read_run(tmp_path)


def test_commands_end_with_one_line(fit_llama: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit_llama("--trainer.max_steps=1")
    log, config = (run / "metrics.csv").read_bytes(), (run / "config.yaml").read_bytes()
    (run / "metrics.csv").write_bytes(b"loss\r\n1.0\r\n")
    capsys.readouterr()
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    arguments = (tmp_path / "again.yaml", "--ckpt_path=last", "--trainer.max_steps=2")
    arguments[0].write_bytes(config)
    assert fit.main([f"--config={arguments[0]}", *arguments[1:]]) == 2
    assert capsys.readouterr().err.count("is no table of a run's log (line 2: there is no column step)") == 2
    (run / "metrics.csv").write_bytes(log)
    (run / "config.yaml").write_bytes(b"a: [1")
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    assert "config.yaml: expected the run's options" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only disk, which refuses root too."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refused)
    for write in (lambda: lock_run(tmp_path), lambda: note_ranks(tmp_path, 2)):
        with pytest.raises(UserError, match=f"{tmp_path}: cannot be written in: Read-only file system"):
            write()
    monkeypatch.setattr("bvpo.runs.remove_partial_files", refused)
    with pytest.raises(UserError, match="cannot be written in: Read-only file system"):
        run_loggers(tmp_path, 0, 3)
