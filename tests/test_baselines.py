"""The baselines: what their rows are made of, what they are equal to, and that every overlay trains."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from bvpo import derive, fit
from bvpo.derived_pairs import CorruptedTraces, Pooled, SeveralTraces, with_other_traces
from bvpo.errors import UserError
from bvpo.reading import load_rows
from bvpo.rows import check_row
from bvpo.traces import QWEN3, R1_DISTILL, split
from tests.conftest import make_rows, write_rows

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
OVERLAYS = sorted((EXPERIMENTS / "baselines").glob("*.yaml"))
STOPS = ("<|im_end|>",)


def candidate(trace: str, answer: str, finish_reason: str = "stop") -> dict[str, Any]:
    return {"trace": trace, "answer": answer, "score": 1.0, "finish_reason": finish_reason}


# --- Rows -------------------------------------------------------------------------------------------------------------

CANDIDATES = [
    candidate("\nslow\n", "12"),
    candidate("\nfast\n", "12"),
    candidate("\nfast\n", "1"),
    candidate("\nfast\n", "12"),  # drawn again
    candidate("\nother\n", "3"),
    candidate("\ncut\n", "12", "length"),
]


def test_traces_with_the_same_answer_take_turns() -> None:
    """The pair's own trace first; an answer counts where it is the same, not where it begins alike."""
    made = with_other_traces("<think>\nfast\n</think>\n\n12<|im_end|>", CANDIDATES, QWEN3)
    assert [split(text, QWEN3).trace for text in made] == ["\nfast\n", "\nslow\n", "\nfast\n"]
    assert all(text.startswith("<think>") and text.endswith("</think>\n\n12<|im_end|>") for text in made)
    assert with_other_traces("\nother\n</think>3", CANDIDATES, R1_DISTILL) == ["\nother\n</think>3"]
    with pytest.raises(ValueError, match="not among trace_candidates"):
        with_other_traces("<think>\nunknown\n</think>\n\n12", CANDIDATES, QWEN3)


def test_every_prompt_has_as_many_rows() -> None:
    row = {
        "prompt": "q",
        "chosen": "<think>\nslow\n</think>\n\n12<|im_end|>",
        "rejected": "<think>\nother\n</think>\n\n3<|im_end|>",
        "trace_candidates": CANDIDATES,
    }
    made = SeveralTraces(traces=4).pairs(row, QWEN3)
    assert [split(pair["chosen"], QWEN3).trace.strip() for pair in made] == ["slow", "fast", "fast", "slow"]
    assert {pair["rejected"] for pair in made} == {row["rejected"]}
    assert SeveralTraces(traces=1).pairs(row, QWEN3) == [{side: row[side] for side in ("chosen", "rejected")}]


def test_pooled_rows_are_both_pairs() -> None:
    row = make_rows(1)[0]
    trace, empty = Pooled().pairs(row, QWEN3)
    assert trace == {"conversation": None}
    assert empty == {"conversation": None} | {k: row[f"empty_{k}"] for k in ("prompt", "chosen", "rejected")}


def test_corrupted_rows_differ_in_the_digits_of_the_trace_alone() -> None:
    row = {"prompt": "q", "chosen": "<think>\n1 + 2 = 3, 3 + 4 = 7\n</think>\n\n7<|im_end|>"}
    (pair,) = CorruptedTraces(fraction=0.5).pairs(row, QWEN3)
    changed = [(a, b) for a, b in zip(row["chosen"], pair["rejected"], strict=True) if a != b]
    assert len(changed) == 3 and all(a.isdigit() and b.isdigit() for a, b in changed)
    assert pair["rejected"].endswith("</think>\n\n7<|im_end|>")
    assert CorruptedTraces().pairs({"prompt": "q", "chosen": "<think>\na\n</think>\n\n7<|im_end|>"}, QWEN3) == []


@pytest.mark.parametrize(
    ("pairs", "count"), [(Pooled(), 2320), (SeveralTraces(2), 2320), (CorruptedTraces(), 1007)], ids=lambda v: str(v)
)
def test_the_built_in_rows_give_good_rows(pairs: Any, count: int, tmp_path: Path) -> None:
    output = tmp_path / "rows.parquet"
    assert derive.derive("builtin:tiny_reasoner", pairs, output, QWEN3) == (1160, count)
    rows = load_rows(str(output), one_sided=True)
    for number, row in enumerate(rows, 1):
        check_row(row, f"row {number}", STOPS, one_sided=True)
    originals = {row["prompt_id"]: row for row in load_rows("builtin:tiny_reasoner")}
    assert set(rows["prompt_id"]) <= originals.keys()

    before = output.stat()
    derive.derive("builtin:tiny_reasoner", pairs, output, QWEN3)
    assert output.stat().st_mtime_ns == before.st_mtime_ns and output.stat().st_ino == before.st_ino
    assert list(tmp_path.iterdir()) == [output]


def test_several_traces_hold_more_traces_of_the_same_answers(tmp_path: Path) -> None:
    """On the built-in rows: what a row's four pairs share is the answers, and most chosen sides have other traces."""
    output = tmp_path / "rows.parquet"
    derive.derive("builtin:tiny_reasoner", SeveralTraces(4), output, QWEN3)
    rows, several = datasets.load_dataset("parquet", data_files=str(output), split="train").to_list(), 0
    for first in range(0, len(rows), 4):
        own = rows[first : first + 4]
        assert len({row["prompt_id"] for row in own}) == 1
        for side in ("chosen", "rejected"):
            assert len({split(row[side], QWEN3).answer for row in own}) == 1
        several += len({row["chosen"] for row in own}) > 1
    assert several > 0.8 * len(rows) / 4


BAD = {
    "no such rows": (["--rows=none.jsonl", "--pairs=bvpo.derived_pairs.Pooled"], "no such file"),
    "a lacking field": (["--rows={rows}", "--pairs=bvpo.derived_pairs.SeveralTraces"], "row 1: field trace_candidates"),
    "no traces": (["--rows={rows}", "--pairs=bvpo.derived_pairs.SeveralTraces", "--pairs.traces=0"], "traces must be"),
    "fraction": (["--rows={rows}", "--pairs=bvpo.derived_pairs.CorruptedTraces", "--pairs.fraction=2"], "(0, 1]"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_derived(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = BAD[case]
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(3))
    args = [option.format(rows=rows) for option in options]
    assert derive.main([*args, f"--output={tmp_path / 'out.parquet'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("absent", ["trace", "answer", "score", "finish_reason"])
def test_candidates_may_lack_fields_in_parquet(absent: str, tmp_path: Path) -> None:
    """A struct has the fields of its file alone; without a trace or an answer no candidate is the pair's own."""
    row = make_rows(1)[0] | {
        "chosen": "<think>\nslow\n</think>\n\n12<|im_end|>",
        "rejected": "<think>\nother\n</think>\n\n3<|im_end|>",
        "trace_candidates": [{k: v for k, v in own.items() if k != absent} for own in CANDIDATES],
    }
    source, output = tmp_path / "rows.parquet", tmp_path / "out.parquet"
    datasets.Dataset.from_list([row]).to_parquet(source)
    if absent in ("trace", "answer"):
        with pytest.raises(
            UserError, match=r"rows\.parquet, row 1: its chosen or its rejected completion is not among"
        ):
            derive.derive(str(source), SeveralTraces(2), output, QWEN3)
    else:
        assert derive.derive(str(source), SeveralTraces(2), output, QWEN3) == (1, 2)


def test_a_null_among_candidates_is_refused_and_a_null_trace_is_no_trace(tmp_path: Path) -> None:
    row = make_rows(1)[0] | {
        "chosen": "<think>\nslow\n</think>\n\n12<|im_end|>",
        "rejected": "<think>\nother\n</think>\n\n3<|im_end|>",
        "trace_candidates": [*CANDIDATES, candidate("", "12") | {"trace": None}],
    }
    output = tmp_path / "out.jsonl"
    source = str(write_rows(tmp_path / "rows.jsonl", [row]))
    assert derive.derive(source, SeveralTraces(8), output, QWEN3) == (1, 8)
    assert len({own["chosen"] for own in load_rows(str(output), one_sided=True)}) == 2  # slow and fast
    row["trace_candidates"].append(None)
    source = str(write_rows(tmp_path / "null.jsonl", [row]))
    with pytest.raises(UserError, match=r"null\.jsonl, row 1: field trace_candidates: .*found null in the list"):
        derive.derive(source, SeveralTraces(8), output, QWEN3)


@pytest.mark.parametrize("name", ["rows.jsonl", "other/../rows.jsonl", "link.jsonl"])
def test_rows_are_never_overwritten_by_what_is_made_of_them(name: str, tmp_path: Path) -> None:
    """The same path, and the same file by another name."""
    read = write_rows(tmp_path / "rows.jsonl", make_rows(3))
    (tmp_path / "other").mkdir()
    (tmp_path / "link.jsonl").symlink_to(read)
    before = read.read_bytes()
    with pytest.raises(UserError, match=r"would overwrite .*, which the rows are read from; give another file"):
        derive.derive(str(read), Pooled(), tmp_path / name, QWEN3)
    assert read.read_bytes() == before


def test_an_output_of_another_kind_is_refused(tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", make_rows(3)))
    with pytest.raises(UserError, match=r"expected a \.parquet or \.jsonl file"):
        derive.derive(rows, Pooled(), tmp_path / "out.csv", QWEN3)


# --- Fits -------------------------------------------------------------------------------------------------------------


def logged(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_the_pool_of_both_pairs_of_a_batch_is_half_and_half(
    fit_llama: Callable[..., Path], pairs_file: Path, tmp_path: Path
) -> None:
    """One step on all 32 rows: the mean over 64 pairs is ½ of each estimator's mean. fp32 sums in another order."""
    pooled = tmp_path / "pooled.jsonl"
    derive.derive(str(pairs_file), Pooled(), pooled, QWEN3)
    one = ["--trainer.max_steps=1", "--model.packing=off"]
    mixed = logged(fit_llama(*one, "--data.batch_size=32", "--model.mixing.alpha=0.5"))[0]
    whole = logged(
        fit_llama(
            *one,
            f"--data.train={pooled}",
            "--data.on_one_sided=keep",
            "--data.batch_size=64",
            "--model.mixing.alpha=1",
            "--model.mixing.window=0",
        )
    )[0]
    assert whole["gradient/mixed_norm"] == pytest.approx(mixed["gradient/mixed_norm"], rel=1e-4)
    assert whole["loss/trace"] == pytest.approx(mixed["loss/mixed"], rel=1e-6)


def launch(overlay: Path) -> tuple[list[str], list[list[str]]]:
    """The overlay's own command and the ones that its header says come first."""
    lines = [line.removeprefix("# ") for line in overlay.read_text().splitlines()]
    first = [shlex.split(line.removeprefix("First: ")) for line in lines if line.startswith("First: ")]
    return shlex.split(lines[0])[3:], [command[3:] for command in first]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_trains_as_its_header_says(
    overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps on the tiny reasoner."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(EXPERIMENTS)
    options, first = launch(overlay)
    for command in first:
        assert derive.main(command) == 0
    short = ["--trainer.max_steps=3", "--trainer.callbacks=[]", "--trainer.enable_progress_bar=false"]
    assert fit.main([*options, *short, "--data.batch_size=4", "--model.accumulate=2"]) == 0
    rows = logged(tmp_path / "runs" / "version_0")
    assert [row["step"] for row in rows] == [0, 1, 2]
    branch = "empty" if overlay.stem == "empty_only" else "trace"
    assert all(row["gradient/mixed_norm"] > 0 and row["mixing/alpha"] == (branch == "trace") for row in rows)
    assert {"loss/trace", "loss/empty"} & rows[0].keys() == {f"loss/{branch}"}
