"""Each check of the doctor has a planted fault that it catches, and a healthy twin that it passes.

Rows are written with the chat templates that `trl` ships and DeepSeek's tokenizer; models are small, random and real.
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bvpo import doctor
from bvpo.batches import collate
from bvpo.checks import Check, check_padding, quick_checks, require, row_checks
from bvpo.data import PairData
from bvpo.doctor_report import print_example, sequence_text, trace_tokens
from bvpo.errors import UserError
from bvpo.losses import DPO, PairLogps, SimPO
from bvpo.model_checks import check_labels, check_positions, check_start, check_vocabulary
from bvpo.pairs import COLUMNS, prepare_row, tokenize_row
from bvpo.policy import load_policy
from bvpo.row_faults import draw_sample
from bvpo.selection import RowOptions, survey
from bvpo.shapes import ModelShape
from bvpo.traces import QWEN3, R1_DISTILL, ThinkFormat, render_prompt, template_fingerprint
from tests.conftest import EOS, make_rows, write_rows
from tests.test_traces import deepseek, template

ALPACA = Path(__file__).parent.parent / "experiments" / "alpaca.yaml"
Rows = list[dict[str, Any]]

# --- Rows of two families ---------------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[str, ThinkFormat]] = {
    "r1": ("deepseek_r1_distill", R1_DISTILL),
    "qwen3": ("qwen3", QWEN3),
}


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    return deepseek(template(FAMILIES[family][0]), adds_bos=family == "r1")


def healthy_rows(family: str, count: int = 4) -> Rows:
    """Sums, answered right and wrong, as the family's sampler would have written them."""
    tokenizer, think = tokenizer_of(family), FAMILIES[family][1]
    head, eos = "" if think.prompt_opens else "<think>\n", tokenizer.eos_token
    rows = []
    for n in range(2, 2 + count):
        conversation = [{"role": "user", "content": f"{n} + 1 ?"}]
        sums = {"chosen": n + 1, "rejected": n + 2}
        traces = {side: f"I count from {n} to {value}." for side, value in sums.items()}
        rows.append(
            {
                "prompt_id": f"sum-{n}",
                "conversation": conversation,
                "prompt": render_prompt(tokenizer, conversation, "thinking", think),
                "empty_prompt": render_prompt(tokenizer, conversation, "no_thinking", think),
                **{s: f"{head}{traces[s]}\n</think>\n\nIt is {sums[s]}.{eos}" for s in sums},
                **{f"empty_{s}": f"It is {sums[s]}.{eos}" for s in sums},
                "trace_candidates": [
                    {
                        "trace": f"{head.removeprefix('<think>')}{traces[side]}\n",
                        "answer": f"\n\nIt is {sums[side]}.",
                        "score": float(side == "chosen"),
                        "finish_reason": "stop",
                    }
                    for side in sums
                ],
                "template_sha": template_fingerprint(tokenizer),
            }
        )
    return rows


def checked(rows: Rows, family: str, **options: Any) -> dict[str, Check]:
    """The verdicts on some rows, by name."""
    tokenizer = tokenizer_of(family)
    given: dict[str, Any] = {"think": FAMILIES[family][1], "stops": (str(tokenizer.eos_token),)} | options
    return verdicts_on(datasets.Dataset.from_list(rows), tokenizer, RowOptions(**given))


def verdicts_on(raw: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, options: RowOptions) -> dict[str, Check]:
    prepared = [prepare_row(row, index, tokenizer, "rows", options) for index, row in enumerate(raw)]
    report = survey(datasets.Dataset.from_list(prepared, features=datasets.Features(COLUMNS)), options)
    checks = row_checks(draw_sample(raw, tokenizer, options, seed=0, problems=report.bad), report)
    return {check.name: check for check in checks}


@cache
def healthy_verdicts(family: str) -> dict[str, Check]:
    return checked(healthy_rows(family), family)


def edited(field: str, edit: Callable[[str], str], only: int | None = None) -> Callable[[Rows, str], Rows]:
    """One text column changed in every row, or in the row with one index."""

    def apply(rows: Rows, family: str) -> Rows:
        return [{**row, field: edit(row[field])} if only in (None, i) else row for i, row in enumerate(rows)]

    return apply


def both(*edits: Callable[[Rows, str], Rows]) -> Callable[[Rows, str], Rows]:
    def apply(rows: Rows, family: str) -> Rows:
        for edit in edits:
            rows = edit(rows, family)
        return rows

    return apply


def through_the_template(rows: Rows, family: str) -> Rows:
    """Completions as the chat template renders an assistant's turn: R1's cuts the trace."""
    tokenizer, think = tokenizer_of(family), FAMILIES[family][1]
    rendered = []
    for row in rows:
        row = dict(row)
        row["prompt"] = row["prompt"].removesuffix("<think>\n")
        for side in ("chosen", "rejected"):
            said = row[side].removesuffix(str(tokenizer.eos_token))
            turn = {"role": "assistant", "content": said if said.startswith(think.open) else f"{think.open}\n{said}"}
            text = tokenizer.apply_chat_template([*row["conversation"], turn], tokenize=False)
            row[side] = str(text).removeprefix(str(tokenizer.bos_token)).removeprefix(row["prompt"]).removesuffix("\n")
        rendered.append(row)
    return rendered


def candidate(**changes: Any) -> Callable[[Rows, str], Rows]:
    """The rejected side's candidate of the first row changed."""

    def apply(rows: Rows, family: str) -> Rows:
        own = [rows[0]["trace_candidates"][0], {**rows[0]["trace_candidates"][1], **changes}]
        return [{**rows[0], "trace_candidates": own}, *rows[1:]]

    return apply


def sampled_elsewhere(rows: Rows, family: str) -> Rows:
    return [{**row, "template_sha": "0" * 64} for row in rows]


def same_beginnings(rows: Rows, family: str) -> Rows:
    """Two long traces that differ at their ends only, before the same answer."""
    eos = str(tokenizer_of(family).eos_token)
    ends = {"chosen": "good", "rejected": "bad"}
    edits = {side: f"{'so ' * 60}{word}\n</think>\n\nIt is 3.{eos}" for side, word in ends.items()}
    return [{**rows[0], **edits, "trace_candidates": None}, *rows[1:]]


R1_BOS, R1_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CUT = f"I count from 2 and never{R1_EOS}"
PLANTED: dict[str, tuple[str, str, Callable[[Rows, str], Rows], dict[str, Any], str, str]] = {
    # what is planted → check, family, edit, options, verdict, what is said
    "completions through R1's template": (
        "trace kept",
        "r1",
        through_the_template,
        {},
        "fail",
        "holds no trace, and its candidate does",
    ),
    "the same without candidates": (
        "trace kept",
        "r1",
        both(through_the_template, lambda rows, _: [{**row, "trace_candidates": None} for row in rows]),
        {},
        "fail",
        "empty_prompt has an empty think block",
    ),
    "one blank trace": (
        "trace kept",
        "qwen3",
        both(edited("chosen", lambda t: "<think>\n\n" + t[t.index("</think>") :], 1), candidate()),
        {},
        "fail",
        "1 of the 4 rows",
    ),
    "R1's prompt without its open tag": (
        "think block opened",
        "r1",
        edited("prompt", lambda text: text.removesuffix("<think>\n")),
        {},
        "fail",
        "neither it nor the prompt opens a block",
    ),
    "a trace that was cut": ("trace finished", "r1", edited("chosen", lambda _: CUT, 0), {}, "fail", "row 1"),
    "a dropped trace that was cut": (
        "trace finished",
        "r1",
        edited("chosen", lambda _: CUT, 0),
        {"on_bad_row": "drop"},
        "warn",
        "1 of 4 rows dropped",
    ),
    "a candidate cut at its length": (
        "trace finished",
        "r1",
        candidate(finish_reason="length"),
        {},
        "fail",
        "finish_reason = length",
    ),
    "an EOS behind a cut trace": (
        "EOS not forced",
        "r1",
        edited("rejected", lambda _: CUT, 2),
        {},
        "fail",
        "a stop token right behind a trace without </think>: the first is row 3",
    ),
    "no EOS": ("EOS", "r1", edited("chosen", lambda t: t.removesuffix(R1_EOS), 1), {}, "warn", "in row 2, chosen ends"),
    "an EOS in the middle": (
        "EOS",
        "r1",
        edited("chosen", lambda t: t.replace("It is", f"It{R1_EOS} is"), 0),
        {},
        "fail",
        "comes before the end",
    ),
    "BOS in a completion": (
        "BOS once",
        "r1",
        edited("chosen", lambda t: R1_BOS + t),
        {},
        "fail",
        "chosen holds <｜beg",
    ),
    "BOS in the prompt's text": ("BOS once", "r1", edited("prompt", lambda t: R1_BOS + t), {}, "warn", "begins with"),
    "two BOS in the prompt's text": (
        "BOS once",
        "r1",
        edited("prompt", lambda t: R1_BOS * 2 + t, 0),
        {},
        "fail",
        "stands inside",
    ),
    "a token across the border": (
        "border of prompt and completion",
        "r1",
        edited("chosen", lambda t: "\n" + t, 0),
        {},
        "warn",
        r"the token '\n\n' lies across the border",
    ),
    "another prompt": (
        "prompt ids",
        "qwen3",
        edited("prompt", lambda t: t.replace("+", "plus"), 0),
        {},
        "fail",
        "prompt differs from token",
    ),
    "another empty block": (
        "prompt ids",
        "r1",
        edited("empty_prompt", lambda t: t.replace("\n\n</think>", "\nDone.\n</think>")),
        {},
        "fail",
        "empty_prompt differs from token",
    ),
    "another prompt by another template": (
        "prompt ids",
        "qwen3",
        both(edited("prompt", lambda t: t.replace("+", "plus")), sampled_elsewhere),
        {},
        "warn",
        "4 of the 4 rows",
    ),
    "chosen = rejected": (
        "chosen is not rejected",
        "qwen3",
        lambda rows, _: [{**rows[0], "chosen": rows[0]["rejected"]}, *rows[1:]],
        {},
        "fail",
        "chosen equals rejected",
    ),
    "cut until chosen = rejected": (
        "chosen is not rejected",
        "r1",
        same_beginnings,
        {"max_length": 50, "on_overlong": "truncate_trace"},
        "fail",
        "the same ids once cut",
    ),
    "a tie": ("scores", "r1", candidate(score=1.0), {}, "fail", "a tie is no pair"),
    "another template": ("chat template", "qwen3", sampled_elsewhere, {}, "warn", "sampled with the template 000000"),
    "tags of another model": (
        "think tags",
        "qwen3",
        lambda rows, _: rows,
        {"think": ThinkFormat("<reason>", "</reason>", "<reason></reason>")},
        "warn",
        "<reason> is",
    ),
    "a bad row": ("rows", "r1", edited("chosen", lambda _: "", 0), {}, "fail", "1 of 4 rows are no pairs and refused"),
    "a bad row to drop": (
        "rows",
        "r1",
        edited("chosen", lambda _: "", 0),
        {"on_bad_row": "drop"},
        "warn",
        "field chosen: expected text (row 1)",
    ),
    "a long row": (
        "length",
        "r1",
        edited("chosen", lambda t: "so " * 99 + t, 3),
        {"max_length": 99},
        "fail",
        "refused",
    ),
    "a long row to drop": (
        "length",
        "r1",
        edited("chosen", lambda t: "so " * 99 + t, 3),
        {"max_length": 99, "on_overlong": "drop"},
        "warn",
        "(trace chosen 1, trace rejected 0, empty chosen 0, empty rejected 0)",
    ),
    "long rows only": (
        "length",
        "r1",
        lambda rows, _: rows,
        {"max_length": 5, "on_overlong": "drop"},
        "fail",
        "4 of 4 rows longer",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_caught_and_its_healthy_twin_passes(case: str) -> None:
    name, family, edit, options, status, said = PLANTED[case]
    check = checked(edit(healthy_rows(family), family), family, **options)[name]
    assert (check.status, said in check.found) == (status, True), check
    assert check.advice
    assert healthy_verdicts(family)[name].status == "pass"


@pytest.mark.parametrize("family", FAMILIES)
def test_healthy_rows_pass_every_check(family: str) -> None:
    """But for R1's template, which cuts traces out of an assistant's turn: that is said to users of other trainers."""
    verdicts = {name: check.status for name, check in healthy_verdicts(family).items()}
    expected = "warn" if family == "r1" else "pass"
    assert verdicts.pop("template keeps traces") == expected
    assert set(verdicts.values()) == {"pass"}, verdicts


def test_a_dated_template_is_no_fault() -> None:
    """Llama 3 writes today's date into its prompt: rows sampled yesterday are not refused."""
    rows = healthy_rows("qwen3")
    raw = datasets.Dataset.from_list([{**row, "prompt": "Today. " + row["prompt"]} for row in rows])
    dated = deepseek(template("qwen3") + "{# strftime_now #}")
    check = verdicts_on(raw, dated, RowOptions(stops=(str(dated.eos_token),)))["prompt ids"]
    assert check.status == "warn" and "4 of the 4 rows" in check.found


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_padding_is_checked_on_a_batch(pad_is_eos: bool) -> None:
    tokenizer, rows = tokenizer_of("r1"), healthy_rows("r1")
    rows[0]["chosen"] = rows[0]["chosen"].replace("I count", "I count and count")  # sequences of several lengths
    options = RowOptions(think=R1_DISTILL, stops=(R1_EOS,))
    examples = draw_sample(datasets.Dataset.from_list(rows), tokenizer, options, seed=0).examples
    pad = tokenizer.eos_token_id if pad_is_eos else 7
    batch = collate([example.ids for example in examples], int(cast(int, pad)))
    assert check_padding(batch, examples, tokenizer).status == "pass"
    without_eos = batch._replace(trace=batch.trace._replace(lengths=batch.trace.lengths - 1))
    assert check_padding(without_eos, examples, tokenizer).status == "fail"
    by_pad = batch.trace.input_ids.ne(int(cast(int, tokenizer.eos_token_id))).sum(1)  # the mask of `!= pad`
    masked = batch._replace(trace=batch.trace._replace(lengths=by_pad))
    assert check_padding(masked, examples, tokenizer).status == "fail"


# --- The model --------------------------------------------------------------------------------------------------------

SHAPE = ModelShape(
    parameters=1000, largest=400, layers=2, hidden=8, intermediate=16, heads=2, attention_width=8, key_width=4,
    vocabulary=40, positions=64,
)  # fmt: skip


def test_vocabulary_and_positions() -> None:
    assert check_vocabulary(SHAPE, tokenizer_size=40, largest_id=39).status == "pass"
    assert check_vocabulary(SHAPE, tokenizer_size=41, largest_id=39).status == "warn"
    assert check_vocabulary(SHAPE, tokenizer_size=41, largest_id=40).status == "fail"
    assert check_positions(SHAPE, longest=64).status == "pass"
    assert check_positions(SHAPE, longest=65).status == "warn"
    assert check_positions(replace(SHAPE, rotary=False), longest=65).status == "fail"
    assert check_positions(replace(SHAPE, positions=None), longest=65).status == "pass"


class Shifted(nn.Module):
    """A model whose logits are one place late wherever it is given a mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        return SimpleNamespace(logits=logits if attention_mask is None else logits.roll(1, dims=1))


@torch.no_grad()
def test_a_shifted_label_mask_is_caught(llama_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = load_policy(str(llama_folder))
    rows = [tokenize_row(row, tokenizer) for row in make_rows(3)]
    batch = collate(rows, 0)
    assert check_labels(model, batch, rows).status == "pass"
    assert check_labels(Shifted(model), batch, rows).status == "fail"
    for shift in (-1, 1):
        shifted = batch.empty._replace(prompt_lengths=batch.empty.prompt_lengths + shift)
        assert check_labels(model, batch._replace(empty=shifted), rows).status == "fail"
    late = batch.trace._replace(input_ids=batch.trace.input_ids.roll(1, dims=1))
    assert check_labels(model, batch._replace(trace=late), rows).status == "fail"


def test_the_start_by_hand() -> None:
    """Two pairs. Margins of 0 give ln 2; a reference 1 nat lower on the chosen side gives −log σ(0.1)."""
    tokens = torch.tensor([4, 4])
    policy = PairLogps(torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -2.0]), tokens, tokens)
    lower = replace(policy, chosen=policy.chosen - 1)
    same = check_start(DPO(), policy, policy, same_start=True, dtype=torch.float32)
    assert same.status == "pass" and "loss 0.6931, at a margin of 0 0.6931 = ln 2" in same.found
    other = check_start(DPO(), policy, lower, same_start=True, dtype=torch.float32)
    assert other.status == "fail" and f"loss {-math.log(1 / (1 + math.exp(-0.1))):.4f}" in other.found
    assert check_start(DPO(), policy, lower, same_start=False, dtype=torch.float32).status == "skipped"
    assert check_start(SimPO(), policy, policy, same_start=True, dtype=torch.float32).status == "pass"
    broken = replace(policy, chosen=torch.tensor([math.nan, 0.0]))
    assert check_start(DPO(), broken, policy, same_start=False, dtype=torch.float32).status == "fail"


# --- What is shown ----------------------------------------------------------------------------------------------------


def shown(example_rows: Rows, family: str, colour: bool = False) -> str:
    tokenizer, think = tokenizer_of(family), FAMILIES[family][1]
    options = RowOptions(think=think, stops=(str(tokenizer.eos_token),))
    sample = draw_sample(datasets.Dataset.from_list(example_rows), tokenizer, options, seed=0, wanted=[0])
    console = Console(force_terminal=colour, width=100, color_system="standard" if colour else None)
    with console.capture() as capture:
        print_example(console, sample.examples[0], tokenizer, think)
    return capture.get()


def test_sequences_are_shown_from_their_ids() -> None:
    text = shown(healthy_rows("r1"), "r1")
    assert text.count("«<｜begin▁of▁sentence｜>»") == 4  # no row's text holds it: it comes from the ids
    assert text.count(f"«{R1_EOS}»") == 4
    assert "border of tokens: '\\n' ¦ 'I'" in text and "border of tokens: '\\n\\n' ¦ 'It'" in text
    assert "I count from 2 to 3.\n«</think>»" in text
    for part, count in (("prompt", 4), ("trace", 2), ("answer", 4)):
        assert text.count(f"⟦ {part}, ") == count
    assert "\x1b[" not in text and "\x1b[" in shown(healthy_rows("r1"), "r1", colour=True)


def test_text_that_looks_like_markup_survives() -> None:
    rows = healthy_rows("qwen3")
    odd = "[bold]x[/bold] [red] :smile: [link=a]b[/] \\[ \x1b[31m"
    rows[0]["chosen"] = rows[0]["chosen"].replace("I count", odd)
    text = shown(rows, "qwen3")
    assert odd.replace("\x1b", "␛") in text and "\x1b" not in text


def test_a_long_trace_is_shortened_in_its_middle() -> None:
    tokenizer = tokenizer_of("qwen3")
    completion = tokenizer("<think>\n" + "one two " * 200 + "\n</think>\n\nIt is 3.").input_ids
    text = sequence_text([1], completion, tokenizer, QWEN3, has_trace=True).plain
    trace = trace_tokens(completion, tokenizer, "</think>")
    assert f"trace, {trace} tokens" in text and f"… {trace - 120} tokens left out …" in text
    assert text.endswith("It is 3.\n") and "«<think>»" in text and "«</think>»" in text
    assert str(tokenizer.decode(completion[:trace])).endswith("</think>")


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(llama_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command on the random Llama, in an empty folder that must stay empty."""
    empty = tmp_path / "here"
    empty.mkdir()
    monkeypatch.chdir(empty)

    def call(*options: str) -> int:
        given = [f"--model.policy={llama_folder}", f"--data.train={pairs_file}", "--trainer.accelerator=cpu"]
        code = doctor.main([*given, *options])
        assert not list(empty.iterdir()), "the doctor has written something"
        return code

    return call


def test_the_json_document(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == {"source", "checks", "lengths", "rows", "memory", "ranks"}
    assert all(check.keys() == {"name", "status", "found", "advice"} for check in document["checks"])
    assert {check["status"] for check in document["checks"]} <= {"pass", "warn", "skipped"}
    assert document["lengths"].keys() == {f"{b} {s}" for b in ("trace", "empty") for s in ("chosen", "rejected")}
    assert all(own.keys() == {"rows", "median", "p95", "max", "overlong"} for own in document["lengths"].values())
    assert document["rows"]["total"] == document["rows"]["trained_on"] == 32
    assert document["memory"]["total"] > document["memory"]["parameters"] > 0
    labels = next(check for check in document["checks"] if check["name"] == "labels")
    assert labels["status"] == "pass"


def test_a_stdout_that_is_not_utf_8_takes_everything(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The document is whole there too: in ASCII, JSON writes characters as numbers."""
    options = ["--rows=1", "--model_checks=false", "--device_memory=80GiB"]  # what is free changes
    shown = []
    for more in ([], ["--json"]):
        written = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", written)
            assert run(*options, *more) == 0
        shown.append(cast(io.BytesIO, written.buffer).getvalue().decode("ascii"))
    assert "? prompt, " in shown[0]
    assert run(*options, "--json") == 0
    assert json.loads(shown[1]) == json.loads(capsys.readouterr().out)


def test_interrupted_it_says_so(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", interrupt)
    assert run() == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"


def test_exit_codes(
    run: Callable[..., int], llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(4)
    rows[2]["rejected"] = rows[2]["chosen"]
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    assert run(f"--data.train={bad}", "--row=3") == 1
    out = capsys.readouterr().out
    assert "row 3 is no pair: chosen equals rejected" in out
    assert "1 of 4 rows are no pairs and refused: 1 × chosen equals rejected" in out
    assert run(f"--data.train={bad}", "--data.on_bad_row=drop", "--rows=0") == 0
    assert run("--device_memory=1MiB", "--model_checks=false", "--rows=0") == 1
    capsys.readouterr()
    wrong = [
        "--data.train=none.jsonl",
        "--row=33",
        "--row=0",
        "--rows=-1",
        "--device_memory=much",
        "--data.batch_size=0",
    ]
    for option in wrong:
        assert run(option, "--json") == 2
        captured = capsys.readouterr()
        assert not captured.out and captured.err.splitlines()[-1].startswith("error: "), option


def test_rows_are_shown_by_number_and_at_random(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--rows=1", "--row=17", "--model_checks=false", "--seed_everything=3") == 0
    out = capsys.readouterr().out
    heads = [line.split(" · ")[0] for line in out.splitlines() if line.startswith("row ") and " · " in line]
    assert heads[:4] == ["row 17"] * 4 and len(heads) == 8 and len(set(heads)) == 2
    assert out.count("switched off by model_checks") == 2
    assert run("--rows=0", "--row=[2,5]", "--model_checks=false") == 0
    out = capsys.readouterr().out
    assert out.count("row 2 · ") == out.count("row 5 · ") == 4


def test_a_config_for_eight_gpus_is_checked_on_a_laptop(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Overlays compose, strategy, callbacks and loggers are not made, and each rank holds its share."""
    overlay = tmp_path / "eight.yaml"
    overlay.write_text(
        "trainer:\n  accelerator: gpu\n  devices: 8\n  precision: bf16-mixed\n"
        "  strategy:\n    class_path: lightning.pytorch.strategies.ModelParallelStrategy\n"
        "    init_args:\n      data_parallel_size: 8\n      tensor_parallel_size: 1\n"
        "  logger:\n    class_path: lightning.pytorch.loggers.CSVLogger\n    init_args:\n      save_dir: logs\n"
    )
    options = [f"--config={ALPACA}", f"--config={overlay}", "--trainer.accelerator=gpu", "--json"]
    given = [option for option in options if "accelerator" not in option]
    assert run(*given, "--trainer.accelerator=gpu", "--device_memory=80GiB") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ranks"] == 8
    assert run(*given, "--trainer.accelerator=gpu") == 0  # no GPU here, and none is needed
    memory = next(c for c in json.loads(capsys.readouterr().out)["checks"] if c["name"] == "memory")
    assert torch.cuda.is_available() or memory["status"] == "skipped"
    assert run(*given, "--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.strategy=auto") == 0
    alone = json.loads(capsys.readouterr().out)["memory"]
    assert alone["optimizer"] == 8 * document["memory"]["optimizer"]


def test_the_built_in_rows_and_model_pass_everything(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.policy=builtin:tiny_reasoner", "--data.train=builtin:tiny_reasoner", "--json"]
    assert run(*options) == 0
    assert {c["status"] for c in json.loads(capsys.readouterr().out)["checks"]} == {"pass"}


@contextmanager
def saved(model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Iterator[str]:
    cast(Any, model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    yield f"--model.policy={folder}"


def verdicts(out: str) -> dict[str, str]:
    return {check["name"]: check["status"] for check in json.loads(out)["checks"]}


def test_models_that_do_not_take_the_rows(
    run: Callable[..., int],
    tokenizer: PreTrainedTokenizerFast,
    llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": None, "eos_token_id": 1}
    for name, vocabulary, places, failing in (("few words", 20, 64, "vocabulary"), ("short", 64, 8, "positions")):
        config = GPT2Config(vocab_size=vocabulary, n_positions=places, **small)
        with saved(GPT2LMHeadModel(config), tokenizer, tmp_path / name) as option:
            assert run(option, "--json") == 1
            found = verdicts(capsys.readouterr().out)
            assert found[failing] == "fail" and found["labels"] == found["start"] == "skipped"
    model = load_policy(str(llama_folder))
    with torch.no_grad():
        cast(Any, model).lm_head.weight[3] = math.nan
    with saved(model, tokenizer, tmp_path / "broken") as option:
        assert run(option, "--json") == 1
        assert verdicts(capsys.readouterr().out)["start"] == "fail"
    torch.manual_seed(1)
    with saved(
        LlamaForCausalLM(cast(LlamaConfig, load_policy(str(llama_folder)).config)), tokenizer, tmp_path / "other"
    ) as option:
        assert run(option.replace("policy", "reference"), "--json") == 0
        assert verdicts(capsys.readouterr().out)["start"] == "skipped"


def test_dropout_is_seen_at_the_start(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package turns every dropout off; here one is left on."""
    from bvpo.module import BVPO

    configure = BVPO.configure_model

    def with_dropout(self: BVPO) -> None:
        configure(self)
        for layer in cast(Any, self.policy).model.layers:
            layer.self_attn.attention_dropout = 0.5

    monkeypatch.setattr(BVPO, "configure_model", with_dropout)
    assert run("--json") == 1
    assert verdicts(capsys.readouterr().out)["start"] == "fail"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_model_is_checked_in_the_precision_of_the_fit(
    precision: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--json", f"--trainer.precision={precision}") == 0
    found = verdicts(capsys.readouterr().out)
    assert found["labels"] == found["start"] == "pass" and torch.get_default_dtype() == torch.float32


def test_a_rare_row_is_found(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of 300 rows, of which a random sample holds 64, whatever the seed."""
    rows = make_rows(300)
    rows[123]["empty_chosen"] = rows[123]["empty_chosen"].removesuffix(EOS)
    many = write_rows(tmp_path / "many.jsonl", rows)
    for seed in (0, 1, 2):
        assert run(f"--data.train={many}", "--json", "--model_checks=false", f"--seed_everything={seed}") == 0
        check = next(c for c in json.loads(capsys.readouterr().out)["checks"] if c["name"] == "EOS")
        assert check["status"] == "warn" and "in row 124, empty_chosen ends in no stop token" in check["found"]


def test_validation_rows_are_looked_at_too(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(3)
    rows[1]["empty_chosen"] = " " + EOS
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    assert run(f"--data.validation={bad}", "--json", "--model_checks=false") == 1
    assert verdicts(capsys.readouterr().out)["validation rows"] == "fail"


def test_the_command_itself(tmp_path: Path, llama_folder: Path, pairs_file: Path) -> None:
    """In a pipe: no colour, nothing but the document on stdout, no folder left behind."""
    options = [f"--model.policy={llama_folder}", f"--data.train={pairs_file}", "--trainer.accelerator=cpu", "--json"]
    command = [sys.executable, "-m", "bvpo.doctor", *options]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ALPACA.parent.parent)}
    here = tmp_path / "here"
    here.mkdir()
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["total"] == 32
    assert not list(here.iterdir())


# --- At the start of a fit --------------------------------------------------------------------------------------------


def test_quick_checks_warn_and_refuse(llama_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    healthy = quick_checks(PairData(str(pairs_file), tokenizer=str(llama_folder)))
    assert healthy and {check.status for check in healthy} == {"pass"}
    require(healthy, "rows")
    lost = [{**row, "chosen": f"w1 w3{EOS}", "rejected": f"w2 w3{EOS}"} for row in make_rows(8)]
    source = write_rows(tmp_path / "lost.jsonl", lost)
    with pytest.raises(UserError, match=r"trace kept: 8 of the 8 rows looked at: .* \(python -m bvpo\.doctor"):
        require(quick_checks(PairData(str(source), tokenizer=str(llama_folder))), str(source))
    one = write_rows(tmp_path / "one.jsonl", [*make_rows(7), lost[7]])
    with pytest.warns(UserWarning, match="trace kept: 1 of the 8 rows looked at"):
        require(quick_checks(PairData(str(one), tokenizer=str(llama_folder))), str(one))


def test_quick_checks_leave_bad_rows_to_the_selection(llama_folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "rejected": row["chosen"]} for row in make_rows(3)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert quick_checks(PairData(str(source), tokenizer=str(llama_folder))) == []
