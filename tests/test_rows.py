"""What files hold in the field: each malformed input is one paragraph that names file, row and remedy.

`pytest tests/test_rows.py -s -k counts` prints how many there are, by what happens to them.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from bvpo import fit, pairs
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.pairs import load_rows, tokenize_rows
from bvpo.policy import load_tokenizer, resolve_model, stop_tokens
from bvpo.row_faults import draw_sample, other_prompt
from bvpo.rows import completion_text, shared_prompt, to_text
from bvpo.selection import SEQUENCES, RowOptions
from bvpo.traces import QWEN3, Response, join, own_stops, split, turn_end
from tests.conftest import EOS, make_rows, write_rows
from tests.test_traces import deepseek, template

ROWS = make_rows(4)
CANDIDATES = [
    {"trace": split(ROWS[1][side]).trace, "answer": split(ROWS[1][side]).answer.removesuffix(EOS), "score": score}
    for side, score in (("chosen", 1.0), ("rejected", 0.5))
]


def with_field(name: str, value: Any, row: int = 1) -> bytes:
    """Four rows as JSONL, one field of the second changed."""
    rows = [dict(own) for own in ROWS]
    rows[row][name] = value
    return lines(*rows)


def without(*names: str) -> bytes:
    return lines(*({key: value for key, value in row.items() if key not in names} for row in ROWS))


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def scored(**changes: Any) -> bytes:
    return with_field("trace_candidates", [CANDIDATES[0], {**CANDIDATES[1], **changes}])


def parquet(rows: list[dict[str, Any]]) -> Callable[[Path], object]:
    return lambda path: datasets.Dataset.from_list(rows).to_parquet(path)


Q, A = [{"role": "user", "content": "w1"}], {"role": "assistant", "content": "<think> w2 </think> w3"}
B = {"role": "assistant", "content": "<think> w2 </think> w4"}
UNCLOSED = f"<think> w1 w2 w3{EOS}"

REFUSED: dict[
    str, tuple[str, bytes | Callable[[Path], object], str]
] = {  # name → file, content, what the message holds
    "empty file": ("a.jsonl", b"", "a.jsonl: the file is empty"),
    "blank lines only": ("a.jsonl", b"\n \n", "a.jsonl: no rows"),
    "empty list": ("a.json", b"[]", "a.json: no rows"),
    "a folder": ("a.jsonl", Path.mkdir, "a.jsonl: is a folder"),
    "another format": ("a.csv", b"prompt,chosen\na,b\n", "a.csv: not a data set"),
    "no such file": ("a.jsonl", lambda path: None, "a.jsonl: there is no such file"),
    "gzip": ("a.jsonl", gzip.compress(lines(*ROWS)), "a.jsonl: cannot be read as JSON: it is gzip-compressed"),
    "binary": ("a.jsonl", bytes(range(256)), "found UTF-16 or binary"),
    "UTF-16": ("a.jsonl", lines(*ROWS).decode().encode("utf-16"), "found UTF-16 or binary"),
    "UTF-16 without BOM": ("a.jsonl", lines(*ROWS).decode().encode("utf-16-le"), "found UTF-16 or binary"),
    "Latin-1": (
        "a.jsonl",
        lines(ROWS[0]) + '{"prompt": "é"}'.encode("latin-1"),
        "row 2: expected UTF-8, found the byte",
    ),
    "a cut line": ("a.jsonl", lines(*ROWS)[:-40], "row 4: expected one JSON object on the line"),
    "a line in the middle": ("a.jsonl", lines(ROWS[0]) + b"{'prompt': 1}\n" + lines(*ROWS), "row 2: expected one JSON"),
    "two objects on a line": ("a.jsonl", lines(ROWS[0]).strip() + lines(ROWS[1]), "row 1: expected one JSON object"),
    "an object over lines": ("a.json", json.dumps(ROWS[0], indent=1).encode(), "row 1: expected one JSON object"),
    "a cut list": ("a.json", json.dumps(ROWS).encode()[:-9], "row 1: expected one JSON object"),
    "endless nesting": ("a.jsonl", b'{"a":' * 100_000, "row 1: expected one JSON object"),
    "lists for objects": ("a.jsonl", lines(ROWS[0], ["w1", "w2"]), "row 2: expected an object with named fields"),
    "text for an object": ("a.jsonl", lines(ROWS[0], "w1"), "row 2: expected an object with named fields"),
    "JSON renamed": ("a.parquet", lines(*ROWS), "a.parquet: cannot be read as Parquet"),
    "CSV renamed": ("a.parquet", b"prompt,chosen\na,b\n", "a.parquet: cannot be read as Parquet"),
    "a column missing": ("a.jsonl", without("rejected"), "a.jsonl: no column rejected"),
    "no known column": ("a.jsonl", lines({"question": "a"}), "no column prompt, chosen"),
    "a field missing in a row": (
        "a.jsonl",
        lines(ROWS[0], {"prompt": "w1 "}),
        "row 2: field chosen: expected text, found nothing",
    ),
    "null": ("a.jsonl", with_field("chosen", None), "row 2: field chosen: expected text, found nothing"),
    "null in Parquet": ("a.parquet", parquet([ROWS[0], {**ROWS[1], "chosen": None}]), "row 2: field chosen"),
    "numbers in Parquet": ("a.parquet", parquet([{**ROWS[0], "chosen": 3}]), "row 1: field chosen: expected text"),
    "empty text": ("a.jsonl", with_field("prompt", ""), "row 2: field prompt: expected text, found nothing"),
    "a number": ("a.jsonl", with_field("rejected", 7), "row 2: field rejected: expected text, found int '7'"),
    "NaN": ("a.jsonl", with_field("chosen", float("nan")), "row 2: field chosen: expected text, found float 'nan'"),
    "true": ("a.jsonl", with_field("empty_prompt", True), "row 2: field empty_prompt: expected text, found bool"),
    "an object for text": (
        "a.jsonl",
        with_field("chosen", {"text": "w1"}),
        "row 2: field chosen: expected text, found",
    ),
    "an empty list for text": (
        "a.jsonl",
        with_field("chosen", []),
        "row 2: field chosen: expected text, found nothing",
    ),
    "half a surrogate pair": ("a.jsonl", with_field("prompt", "\ud800"), "row 2: field prompt: expected text, found"),
    "the same completion twice": (
        "a.jsonl",
        with_field("rejected", ROWS[1]["chosen"]),
        "row 2: chosen equals rejected",
    ),
    "EOS in the middle": (
        "a.jsonl",
        with_field("empty_chosen", f"w1{EOS}w2{EOS}"),
        "row 2: field empty_chosen: the EOS",
    ),
    "EOS alone": (
        "a.jsonl",
        with_field("empty_chosen", EOS),
        "row 2: field empty_chosen: expected text before the EOS",
    ),
    "whitespace alone": ("a.jsonl", with_field("chosen", f" \n{EOS}"), "row 2: field chosen: expected text before"),
    "an unfinished trace": ("a.jsonl", with_field("chosen", UNCLOSED), "row 2: field chosen: expected </think>"),
    "unfinished, opened by the prompt": (
        "a.jsonl",
        with_field("prompt", "w1 <think>\n"),
        "row 2: field chosen: opens a",
    ),
    "a trace without an answer": (
        "a.jsonl",
        with_field("chosen", f"<think> w1 </think>{EOS}"),
        "row 2: field chosen: expected an answer",
    ),
    "a trace in an empty-trace pair": (
        "a.jsonl",
        with_field("empty_chosen", ROWS[1]["chosen"]),
        "row 2: field empty_chosen: expected an answer without a trace",
    ),
    "a candidate cut off": (
        "a.jsonl",
        scored(finish_reason="length"),
        "row 2: field rejected: its candidate was cut off",
    ),
    "a tie": ("a.jsonl", scored(score=1.0), "row 2: chosen does not score above rejected (1.0 and 1.0"),
    "the wrong way round": ("a.jsonl", scored(score=2.0), "row 2: chosen does not score above rejected"),
    "a score of NaN": ("a.jsonl", scored(score=float("nan")), "row 2: chosen does not score above rejected"),
    "a score in words": ("a.jsonl", scored(score="good"), "row 2: field trace_candidates: expected objects with trace"),
    "candidates as text": ("a.jsonl", with_field("trace_candidates", "w1"), "row 2: field trace_candidates: expected"),
    "candidates in Parquet": (
        "a.parquet",
        parquet([{**ROWS[0], "trace_candidates": ["w1"]}]),
        "row 1: field trace_can",
    ),
    "null among candidates": (
        "a.jsonl",
        with_field("trace_candidates", [None, *CANDIDATES]),
        "row 2: field trace_candidates: expected objects with trace, answer, score and finish_reason, found null in",
    ),
    "null among anchor traces": (
        "a.jsonl",
        with_field("anchor_traces", [None]),
        "row 2: field anchor_traces: expected objects with trace and logprob, found null in the list",
    ),
    "null among messages": (
        "a.jsonl",
        with_field("conversation", [None]),
        "row 2: field conversation: expected a list of messages, found null in the list",
    ),
    "null among messages in Parquet": (
        "a.parquet",
        parquet([{**ROWS[0], "conversation": [None, Q[0]]}]),
        "row 1: field conversation: expected a list of messages, found null in the list",
    ),
    "a conversation as text in Parquet": (
        "a.parquet",
        parquet([{**ROWS[0], "conversation": json.dumps(Q)}]),
        "row 1: field conversation: expected a list of messages, found str",
    ),
    "a conversation of texts in Parquet": (
        "a.parquet",
        parquet([{**ROWS[0], "conversation": ["w1"]}]),
        "row 1: field conversation: expected a list of messages, found str 'w1'",
    ),
    "a conversation as a number in Parquet": (
        "a.parquet",
        parquet([{**ROWS[0], "conversation": 3}]),
        "row 1: field conversation: expected a list of messages, found int '3'",
    ),
    "a score that no float holds": (
        "a.jsonl",
        scored(score=10**400),
        "row 2: field trace_candidates: expected objects with trace, answer, score and finish_reason, found an integer",
    ),
    "a fraction as prompt_id": (
        "a.jsonl",
        with_field("prompt_id", 1.5),
        "row 2: field prompt_id: expected text, found float '1.5'",
    ),
    "an infinite log q": (
        "a.jsonl",
        with_field("anchor_traces", [{"trace": "w1", "logprob": float("-inf")}]),
        "row 2: field anchor_traces: expected a trace and a finite logprob",
    ),
    "TRL, standard": (
        "a.jsonl",
        without("empty_prompt", "empty_chosen", "empty_rejected"),
        "These are standard preference rows (TRL)",
    ),
    "TRL, implicit prompt": (
        "a.jsonl",
        lines({"chosen": "w1 w2", "rejected": "w1 w3"}),
        "set on_one_sided to keep",
    ),
    "an implicit prompt beside an explicit one": (
        "a.jsonl",
        without("empty_prompt"),
        "no column empty_prompt",
    ),
    "nothing in common": (
        "a.jsonl",
        lines(dict.fromkeys(("chosen", "empty_chosen"), "w1 w2") | dict.fromkeys(("rejected", "empty_rejected"), "w3")),
        "row 1: no field prompt, and chosen and rejected do not start with a prompt",
    ),
    "TRL, conversational": (
        "a.jsonl",
        lines({"prompt": Q, "chosen": [A], "rejected": [B]}),
        "These are conversational preference rows (TRL) with one pair",
    ),
    "SimPO": (
        "a.jsonl",
        lines(
            {
                "prompt": "w1",
                "all_generated_responses": ["w3", "w4"],
                "all_rm_scores": [1.0, 0.0],
                "chosen": [*Q, A],
                "rejected": [*Q, B],
            }
        ),
        "no column empty_chosen, empty_rejected",
    ),
    "messages without an answer": (
        "a.jsonl",
        lines({"chosen": Q, "rejected": [*Q, B], "empty_chosen": [A], "empty_rejected": [B]}),
        "row 1: field chosen: expected messages that end in the assistant's",
    ),
    "two conversations": (
        "a.jsonl",
        lines({"chosen": [*Q, A], "rejected": [*Q, *Q, B], "empty_chosen": [A], "empty_rejected": [B]}),
        "row 1: the completions answer different conversations",
    ),
    "no chat template": (
        "a.jsonl",
        lines({"prompt": Q, "chosen": [A], "rejected": [B], "empty_chosen": [A], "empty_rejected": [B]}),
        "row 1: the tokenizer",
    ),
}
ACCEPTED: dict[str, tuple[str, bytes]] = {  # name → file, content: four rows each
    "BOM": ("a.jsonl", b"\xef\xbb\xbf" + lines(*ROWS)),
    "no line break at the end": ("a.jsonl", lines(*ROWS).rstrip()),
    "blank lines": ("a.jsonl", b"\n" + lines(*ROWS).replace(b"\n", b"\n\n")),
    "Windows line ends": ("a.jsonl", lines(*ROWS).replace(b"\n", b"\r\n")),
    "one JSON list": ("a.json", json.dumps(ROWS, indent=1).encode()),
    "a list behind blank lines": ("a.json", b" \n\n" + json.dumps(ROWS).encode()),
    "a list behind BOM and space": ("a.json", b"\xef\xbb\xbf\t" + json.dumps(ROWS).encode()),
    "extra columns of any type": ("a.jsonl", with_field("problem", [{"x": [1, "2"]}])),
    "a prompt met twice": ("a.jsonl", with_field("prompt_id", "p0")),
    "a number as prompt_id": ("a.jsonl", with_field("prompt_id", 1)),
    "a whole float as prompt_id": ("a.jsonl", with_field("prompt_id", 1.0)),
    "no prompt_id": ("a.jsonl", without("prompt_id")),
    "one token and the EOS": ("a.jsonl", with_field("empty_chosen", f"w9{EOS}")),
    "no think tags": ("a.jsonl", with_field("chosen", f"w1 w9{EOS}")),
    "white space before the think tag": ("a.jsonl", with_field("chosen", "\n" + ROWS[1]["chosen"])),
    "scored candidates": ("a.jsonl", scored()),
    "a candidate without fields": ("a.jsonl", with_field("trace_candidates", [{}, {"answer": None, "trace": None}])),
}


def write(path: Path, content: bytes | Callable[[Path], object]) -> str:
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return str(path)


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_input_is_refused_by_name(case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    name, content, expected = REFUSED[case]
    source = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        tokenize_rows(load_rows(source), tokenizer, source)
    message = str(caught.value)
    assert message.startswith(source) and expected in message
    assert "\n" not in message and len(message) < 700 + len(source)


@pytest.mark.parametrize("case", ACCEPTED)
@pytest.mark.filterwarnings("ignore:.*repeat another row's prompt")
def test_unusual_input_is_accepted(case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    name, content = ACCEPTED[case]
    source = write(tmp_path / name, content)
    tokenized = tokenize_rows(load_rows(source), tokenizer, source)
    assert len(tokenized) == 4 and tokenized[3]["chosen"] == tokenizer(ROWS[3]["chosen"]).input_ids


def test_counts() -> None:
    row = sum(bool(re.search(r"row \d", expected)) for _, _, expected in REFUSED.values())
    print(f"\n{len(REFUSED)} refused: {row} by file and row, {len(REFUSED) - row} by file; {len(ACCEPTED)} accepted")
    assert len(REFUSED) >= 40


@pytest.mark.parametrize("case", ["gzip", "a cut line", "EOS alone", "an unfinished trace", "TRL, conversational"])
def test_the_command_refuses_with_exit_code_2(
    case: str, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, expected = REFUSED[case]
    source = write(tmp_path / name, content)
    options = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}", f"--model.policy={llama_folder}"]
    assert fit.main([*options, f"--data.train={source}"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.splitlines()[-1].startswith(f"error: {source}") and expected in error


def test_a_conversation_of_other_fields_is_a_fault_and_no_traceback(tmp_path: Path) -> None:
    """ShareGPT's form, `{from, value}`, in Parquet, where a struct has the fields of its file alone."""
    tokenizer = load_tokenizer("builtin:tiny_reasoner")
    row = load_rows("builtin:tiny_reasoner")[0]
    write(tmp_path / "a.parquet", parquet([{**row, "conversation": [{"from": "human", "value": "1 + 1 ?"}]}]))
    rows = load_rows(str(tmp_path / "a.parquet"))
    sample = draw_sample(rows, tokenizer, RowOptions(stops=own_stops(tokenizer)), seed=0)
    fault = other_prompt(sample.examples[0], sample)
    assert fault and fault.status == "fail" and "message 1: expected {role, content} as text, found no role" in fault[1]


@pytest.mark.parametrize("absent", ["trace", "answer"])
def test_candidates_without_a_trace_or_an_answer_are_no_anchors(
    absent: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Null in one of them, or a Parquet file whose structs lack the field."""
    other = {"trace": " w7 ", "answer": CANDIDATES[0]["answer"]}
    row = {**ROWS[1], "trace_candidates": [*CANDIDATES, other, other | {absent: None}]}
    sparse = [{k: v for k, v in candidate.items() if k != absent} for candidate in (*CANDIDATES, other)]
    found = []
    for number, candidates in enumerate((row["trace_candidates"], [*CANDIDATES, other], sparse)):
        source = write(tmp_path / f"{number}.parquet", parquet([{**row, "trace_candidates": candidates}]))
        found.append(tokenize_rows(load_rows(source), tokenizer, source, RowOptions(anchors=True))["anchor_chosen"][0])
    assert found[0] == found[1] and len(found[0]) == 2
    assert found[2] == [tokenizer(row["chosen"]).input_ids]  # its own trace alone


def test_a_prompt_id_is_one_however_it_is_written(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """0 is an id as any other."""
    keys = []
    for number, kind in enumerate((str, int, float)):
        rows = [row | {"prompt_id": kind(index)} for index, row in enumerate(ROWS)]
        for source in (
            str(write_rows(tmp_path / f"{number}.jsonl", rows)),
            write(tmp_path / f"{number}.parquet", parquet(rows)),
        ):
            keys.append(tokenize_rows(load_rows(source), tokenizer, source)["prompt_key"][:])
    assert keys == [[pairs.prompt_key(str(index)) for index in range(4)]] * 6


def test_a_prompt_id_that_is_no_number_is_absent(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """pandas writes NaN where there is none: the rows do not share a prompt."""
    rows = [row | {"prompt_id": float("nan")} for row in ROWS]
    for source in (str(write_rows(tmp_path / "r.jsonl", rows)), write(tmp_path / "r.parquet", parquet(rows))):
        keys = tokenize_rows(load_rows(source), tokenizer, source)["prompt_key"][:]
        assert keys == [pairs.prompt_key(row["prompt"]) for row in ROWS]


def test_a_parquet_column_of_any_type_may_stand_beside_those_of_a_row(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """`datasets` has no type for a map."""
    table = pa.Table.from_pylist(ROWS)
    counts = pa.array([[("a", 1)]] * len(ROWS), pa.map_(pa.string(), pa.int64()))
    source = str(tmp_path / "rows.parquet")
    pq.write_table(table.append_column("counts", counts), source)
    tokenized = tokenize_rows(load_rows(source), tokenizer, source)
    assert tokenized["chosen"][:] == [tokenizer(row["chosen"]).input_ids for row in ROWS]


# ---------------------------------------------------------------------- bad and long rows, by option


def test_bad_rows_are_dropped_on_request_and_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = make_rows(8)
    for index in (1, 4, 5):
        rows[index]["chosen"] = UNCLOSED
    rows[6]["empty_rejected"] = 3
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match=r"row 2: field chosen: .* \(4 of 8 rows are no pairs: 3 × .*row 2, 5, 6"):
        tokenize_rows(load_rows(source), tokenizer, source)
    with pytest.warns(UserWarning, match=r"dropped 4 of 8 rows that are no pairs: 3 × field chosen.*; 1 × .*\(row 7\)"):
        kept = tokenize_rows(load_rows(source), tokenizer, source, options=RowOptions(on_bad_row="drop"))
    assert kept["prompt_key"][:] == [pairs.prompt_key(f"p{index}") for index in (0, 2, 3, 7)]
    write_rows(tmp_path / "rows.jsonl", [rows[1], rows[4]])
    with pytest.raises(UserError, match="2 of 2 rows are no pairs"):
        tokenize_rows(load_rows(source), tokenizer, source, options=RowOptions(on_bad_row="drop"))


def long_rows() -> list[dict[str, Any]]:
    """Row 1 has a long chosen trace, row 2 a long prompt, row 3 a long answer; row 4 is short."""
    rows = make_rows(4)
    rows[0]["chosen"] = f"<think> {'w3 ' * 60}</think> w1{EOS}"
    rows[1]["prompt"] = rows[1]["empty_prompt"] = "w4 " * 60
    rows[2]["empty_rejected"] = "w5 " * 60 + EOS
    return rows


def test_prompts_are_cut_from_the_left(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = str(write_rows(tmp_path / "rows.jsonl", long_rows()))
    options = RowOptions(max_length=80, on_overlong="truncate_prompt", on_bad_row="drop")
    with pytest.warns(UserWarning) as caught:
        cut = tokenize_rows(load_rows(source), tokenizer, source, options=options)
    shown = [str(warning.message) for warning in caught]
    assert any("dropped 2 of 4 rows" in text and "truncate_prompt cannot bring" in text for text in shown)
    counts = (
        r"cut by truncate_prompt 1 of 4 rows .*\(trace chosen 1, trace rejected 1, empty chosen 1, empty rejected 1\)"
    )
    assert any(re.search(counts, text) for text in shown)
    row, whole = cut[0], pairs.tokenize_row(long_rows()[1], tokenizer)
    assert row["chosen"] == whole["chosen"] and row["length"] == 80
    assert whole["prompt"][-len(row["prompt"]) :] == row["prompt"] and whole["rejected"] == row["rejected"]


def test_traces_are_cut_at_their_end(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = str(write_rows(tmp_path / "rows.jsonl", long_rows()))
    options = RowOptions(max_length=80, on_overlong="truncate_trace", on_bad_row="drop")
    with pytest.warns(UserWarning, match=r"cut by truncate_trace 1 of 4 .*trace chosen 1, trace rejected 0"):
        cut = tokenize_rows(load_rows(source), tokenizer, source, options=options)[0]
    text = tokenizer.decode(cut["chosen"], clean_up_tokenization_spaces=False)
    assert text.startswith("<think> w3 w3") and text.endswith(f"</think> w1{EOS}") and cut["length"] == 80
    with pytest.raises(UserError, match=r"row 2: field chosen: truncate_trace cannot bring trace chosen to 80 tokens"):
        tokenize_rows(load_rows(source), tokenizer, source, RowOptions(max_length=80, on_overlong="truncate_trace"))


def test_bos_stays_when_a_prompt_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w0", eos_token=EOS)
    bos = adding.bos_token_id
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="w0 $A", special_tokens=[("w0", bos)])
    row = {**make_rows(1)[0], "prompt": "w1 w2 w3 w4 ", "chosen": f"w5{EOS}", "rejected": f"w6{EOS}"}
    options = RowOptions(stops=(EOS,))
    cut = replace(options, max_length=7, on_overlong="truncate_prompt")
    done = pairs.prepare_row(row, 0, adding, "a", cut)
    assert done["problem"] is not None  # the empty-trace pair is longer by its prompt's fixed block
    row |= {"empty_prompt": "w1 ", "empty_chosen": f"w5{EOS}", "empty_rejected": f"w6{EOS}"}
    done = pairs.prepare_row(row, 0, adding, "a", cut)
    assert done["problem"] is None and adding.decode(done["prompt"]) == "w0w3 w4 "
    doubled = pairs.prepare_row({**row, "prompt": "w1 w0"}, 0, adding, "a", options)
    assert "field prompt: w0 stands inside (token 4 of 4)" in doubled["problem"]


# ---------------------------------------------------------------------- one pair a row, implicit prompts, stop tokens


def test_rows_with_one_pair_are_refused_or_kept_and_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = make_rows(4)
    rows[1] = {k: v for k, v in rows[1].items() if not k.startswith("empty_")}
    rows[2] = {**rows[2], "chosen": None, "rejected": None}
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match=r"row 2: field empty_prompt: expected text, found nothing \(2 of 4 rows"):
        tokenize_rows(load_rows(source), tokenizer, source)
    with pytest.warns(UserWarning, match="1 of 4 rows .the first is row") as shown:
        kept = tokenize_rows(load_rows(source), tokenizer, source, RowOptions(on_one_sided="keep"))
    assert "(the first is row 3) have no trace pair" in str(shown[0].message)
    assert "(the first is row 2) have no empty-trace pair" in str(shown[1].message)
    assert [bool(row["chosen"]) for row in kept] == [True, True, False, True]
    assert [bool(row["empty_chosen"]) for row in kept] == [True, False, True, True]
    rows[3] = {"prompt_id": "p3", "prompt": "w1 "}
    rows[0] = {**rows[0], "rejected": ""}
    source = str(write_rows(tmp_path / "worse.jsonl", rows))
    with pytest.warns(UserWarning, match="dropped 2 of 4 rows") as shown:
        tokenize_rows(load_rows(source), tokenizer, source, RowOptions(on_one_sided="keep", on_bad_row="drop"))
    reasons = str(shown[0].message)
    assert "field rejected: expected text (row 1)" in reasons and "expected a trace pair or an" in reasons


def test_a_file_with_one_branch_trains_by_option(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if not k.startswith("empty_")} for row in make_rows(3)]
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match="set on_one_sided to keep"):
        load_rows(source)
    kept = tokenize_rows(load_rows(source, one_sided=True), tokenizer, source, RowOptions(on_one_sided="keep"))
    assert len(kept) == 3 and kept["empty_prompt"][0] == []


OPENS = replace(QWEN3, prompt_opens=True)
IMPLICIT = {
    "the model opens the block": (QWEN3, "w1 w2 ", "<think> w3 w4 </think> w5", "<think> w3 w5 </think> w5"),
    "the prompt opens the block": (OPENS, "w1 <think>\n", "w3 w4 </think> w5", "w3 w5 </think> w5"),
    "no block": (QWEN3, "w1 w2 ", "w3 w4", "w11 w4"),
    "one continues the other": (QWEN3, "w1 w2 ", "w3", "w3 w4"),
}


@pytest.mark.parametrize("case", IMPLICIT)
def test_an_implicit_prompt_ends_where_the_think_block_begins(case: str, tmp_path: Path) -> None:
    think, prompt, chosen, rejected = IMPLICIT[case]
    assert shared_prompt(prompt + chosen, prompt + rejected, think, closed=False) == prompt


def test_rows_with_implicit_prompts_are_the_explicit_ones(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """As TRL reads them; an empty-trace pair's prompt ends behind the closed block."""
    explicit = [{**row, "empty_prompt": row["prompt"] + QWEN3.empty} for row in make_rows(5)]
    implicit = [
        {"prompt_id": row["prompt_id"]} | {side: row[prompt] + row[side] for prompt, side in SEQUENCES.values()}
        for row in explicit
    ]
    one, two = (str(write_rows(tmp_path / f"{k}.jsonl", rows)) for k, rows in enumerate((explicit, implicit)))
    expected = tokenize_rows(load_rows(one), tokenizer, one)
    with pytest.warns(UserWarning, match="5 of 5 rows .the first is row 1. have no prompt of their own"):
        found = tokenize_rows(load_rows(two), tokenizer, two)
    assert found[:] == expected[:]


def test_a_completion_may_end_in_any_stop_token(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A generation config may name several: `w39` stands for the second one here."""
    row = make_rows(1)[0]
    row = {**row, "chosen": row["chosen"].removesuffix(EOS).replace("w39", "w0") + " w39"}
    source = str(write_rows(tmp_path / "rows.jsonl", [row]))
    with pytest.warns(UserWarning, match="without the tokenizer's EOS at its end"):
        tokenize_rows(load_rows(source), tokenizer, source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = tokenize_rows(load_rows(source), tokenizer, source, RowOptions(stops=(EOS, "w39")))
    assert tokenizer.decode(rows[0]["chosen"]).endswith("w39")
    row = {**row, "rejected": f"w1 w39 w2{EOS}"}
    source = str(write_rows(tmp_path / "inside.jsonl", [row]))
    with pytest.raises(UserError, match="the EOS w39 comes before the end"):
        tokenize_rows(load_rows(source), tokenizer, source, RowOptions(stops=(EOS, "w39")))


def test_an_id_that_no_token_has_ends_nothing(llama_folder: Path, tmp_path: Path) -> None:
    """Some generation configs name −1 where they mean none."""
    shutil.copytree(llama_folder, folder := tmp_path / "model")
    tokenizer = load_tokenizer(str(folder))
    for named, expected in ((-1, (EOS,)), ([1, -1, 46], (EOS, "w39")), (99_999, (EOS,)), (None, (EOS,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert stop_tokens(str(folder), tokenizer) == expected


def test_anchor_sequences_count_as_sequences(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    anchor = {"trace": " " + "w1 " * 50, "logprob": -3.0}
    rows = [{**make_rows(1)[0], "anchor_traces": [anchor, {**anchor, "trace": " w2 "}]}]
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    options = RowOptions(anchors=True, max_length=80)
    with pytest.raises(UserError, match=r"longest sequence has 1\d\d tokens, max_length is 80 .*anchor 1\)"):
        tokenize_rows(load_rows(source), tokenizer, source, options)
    with pytest.raises(UserError, match="field anchor_traces: one has"):
        tokenize_rows(load_rows(source), tokenizer, source, replace(options, on_overlong="truncate_trace"))
    rows.append({**make_rows(2)[1], "anchor_traces": None})
    source = str(write_rows(tmp_path / "mixed.jsonl", rows))
    with pytest.raises(UserError, match="row 2: field anchor_traces: expected traces, as in other rows"):
        tokenize_rows(load_rows(source), tokenizer, source, RowOptions(anchors=True))


# ---------------------------------------------------------------------- conversations


def test_conversations_become_text_without_a_template_around_completions(tmp_path: Path) -> None:
    """TRL's explicit and implicit prompts and SimPO's plain one give the same row."""
    tokenizer = load_tokenizer("builtin:tiny_reasoner")
    user, eos = [{"role": "user", "content": "Count."}], str(tokenizer.eos_token)
    chosen = {"role": "assistant", "content": "So 2.", "reasoning_content": "e a no 0"}
    rejected = {"role": "assistant", "content": "<think>\ne a yes 1\n</think>\n\nSo 3."}
    empty = {"empty_chosen": [{"role": "assistant", "content": "2"}], "empty_rejected": f"3{eos}"}
    shapes: list[dict[str, Any]] = [
        {"prompt": user, "chosen": [chosen], "rejected": [rejected]},
        {"chosen": [*user, chosen], "rejected": [*user, rejected]},
        {"prompt": "Count.", "chosen": [chosen], "rejected": [rejected]},
    ]
    texts = []
    for number, shape in enumerate(shapes):
        source = str(write_rows(tmp_path / f"{number}.jsonl", [shape | empty]))
        texts.append(to_text(load_rows(source)[0], "row 1", tokenizer))
        tokenize_rows(load_rows(source), tokenizer, source)
    names = ("prompt", "chosen", "rejected", "empty_prompt", "empty_chosen", "empty_rejected")
    rows = [{name: text[name] for name in names} for text in texts]
    prompt = "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n"
    assert rows[0] == rows[1] == rows[2]
    assert rows[0] == {
        "prompt": prompt,
        "chosen": f"<think>\ne a no 0\n</think>\n\nSo 2.{eos}",
        "rejected": f"<think>\ne a yes 1\n</think>\n\nSo 3.{eos}",
        "empty_prompt": f"{prompt}<think>\n\n</think>\n\n",
        "empty_chosen": f"2{eos}",
        "empty_rejected": f"3{eos}",
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_trace_under_the_name_of_gpt_oss_is_one(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("builtin:tiny_reasoner")
    texts = []
    for name in ("reasoning_content", "thinking"):
        sides = {side: [{"role": "assistant", "content": side, name: "e a"}] for side in ("chosen", "rejected")}
        empty = {f"empty_{side}": [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        path, row = tmp_path / f"{name}.{kind}", {"prompt": [{"role": "user", "content": "Count."}], **sides, **empty}
        source = str(write_rows(path, [row])) if kind == "jsonl" else write(path, parquet([row]))
        texts.append(to_text(load_rows(source)[0], "row 1", tokenizer))
        tokenize_rows(load_rows(source), tokenizer, source)
    assert texts[0] == texts[1]
    assert texts[0]["chosen"] == f"<think>\ne a\n</think>\n\nchosen{tokenizer.eos_token}"


TURNS_END = {  # the stop tokens of a model, the first one the tokenizer's EOS; and that of an assistant's turn
    "gemma3": (("<end_of_turn>",), "<end_of_turn>"),
    "phi3": (("<|end|>",), "<|end|>"),
    "glm4moe": (("<|user|>",), None),  # the template writes nothing behind a turn
    "deepseek_r1_distill": (("<|end|>",), None),
    "{% for": (("<|end|>",), None),
}


@pytest.mark.parametrize("name", TURNS_END)
def test_a_message_ends_in_the_stop_token_of_the_template(name: str) -> None:
    others, expected = TURNS_END[name]
    tokenizer = deepseek(template(name) if name.replace("_", "").isalnum() else name)
    stops = (str(tokenizer.eos_token), *others)
    assert turn_end(tokenizer, stops) == (expected or tokenizer.eos_token)
    assert turn_end(tokenizer, stops[:1]) == tokenizer.eos_token and turn_end(tokenizer, ()) == ""
    if expected is None:
        return
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"prompt": Q} | answers | {f"empty_{side}": messages for side, messages in answers.items()}
    text = to_text(row, "row 1", tokenizer, stops=stops)
    assert text["chosen"] == f"chosen{expected}" and text["empty_rejected"] == f"rejected{expected}"
    rendered = tokenizer.apply_chat_template([*Q, *answers["chosen"]], tokenize=False)
    assert (text["prompt"] + text["chosen"]) in rendered  # TRL's text


def test_the_first_row_does_not_decide_what_others_hold(tmp_path: Path) -> None:
    """A column holds text or messages as its first value has it, in whichever row that is."""
    tokenizer = load_tokenizer("builtin:tiny_reasoner")
    trace = {"prompt": Q, "chosen": [A], "rejected": [B]}
    empty = {side: [{"role": "assistant", "content": side[-8:]}] for side in ("empty_chosen", "empty_rejected")}
    orders = [[trace | empty, trace, {"prompt": Q} | empty], [trace, {"prompt": Q} | empty, trace | empty]]
    orders.append([dict.fromkeys([*trace, *empty]), {"prompt": Q} | empty, trace | empty, trace])
    found = []
    for number, rows in enumerate(orders):
        source = str(write_rows(tmp_path / f"{number}.jsonl", rows))
        options = RowOptions(on_one_sided="keep", on_bad_row="drop" if number == 2 else "error")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenized = tokenize_rows(load_rows(source, one_sided=True), tokenizer, source, options)
        found.append(sorted(json.dumps(row, sort_keys=True) for row in tokenized))
    assert len(found[0]) == 3 and found[0] == found[1] == found[2]


def test_a_think_block_is_opened_once() -> None:
    """R1's prompts end in the open tag and a line break; the completion then starts inside of the trace."""
    message = {"content": "\n\nSo 2.", "reasoning_content": "\ne a\n"}
    whole = join(Response("\ne a\n", "\n\nSo 2.", opened=True, closed=True), QWEN3)
    assert completion_text(message, "Count.\n", "<eos>") == f"{whole}<eos>"
    assert completion_text(message, "Count.\n<think>\n", "<eos>") == "e a\n</think>\n\nSo 2.<eos>"
    assert completion_text({"content": whole}, "Count.\n<think>\n", "<eos>") == "e a\n</think>\n\nSo 2.<eos>"
    assert completion_text({"content": whole}, "Count.\n<think>", "<eos>") == "\ne a\n</think>\n\nSo 2.<eos>"
    with pytest.raises(ValueError, match="expected one of them"):
        completion_text({"content": whole, "reasoning_content": "e"}, "Count.\n", "<eos>")


# ---------------------------------------------------------------------- the cache


def test_a_second_start_reads_the_cache(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tokenizer, changed rows or another cut tokenize anew; what is done with long rows afterwards does not."""
    calls: list[str] = []
    real = pairs.tokenize_row
    monkeypatch.setattr(pairs, "tokenize_row", lambda row, tok: (calls.append(row["prompt"]), real(row, tok))[1])
    source = tmp_path / "rows.jsonl"
    write_rows(source, make_rows(6))

    def start(**options: Any) -> int:
        calls.clear()
        PairData(str(source), tokenizer=str(llama_folder), **options).setup()
        return len(calls)

    assert [start(), start(), start(max_length=500), start(batch_size=2, seed=3)] == [6, 0, 0, 0]
    assert [start(max_length=500, on_overlong="truncate_trace"), start(max_length=500, on_overlong="drop")] == [6, 0]
    write_rows(source, make_rows(7, seed=1))
    assert [start(), start()] == [7, 0]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_are_cached_by_content_and_not_by_date(
    suffix: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path, found = tmp_path / f"rows.{suffix}", []
    exchanged = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    for rows in (ROWS, exchanged):
        write(path, parquet(rows) if suffix == "parquet" else lines(*rows))
        os.utime(path, (1e9, 1e9))
        tokenized = tokenize_rows(load_rows(str(path)), tokenizer, str(path))
        found.append([tokenized[name][:] for name in ("chosen", "rejected")])
    assert found[0] == found[1][::-1] != found[1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_cache_that_cannot_be_written_is_not_the_file_s_fault(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stands where the folder should be: that stops root as well."""
    source = write(tmp_path / f"rows.{suffix}", parquet(ROWS) if suffix == "parquet" else lines(*ROWS))
    (tmp_path / "no folder").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "no folder" / "cache")
    with pytest.raises(
        UserError, match=r"its rows cannot be cached in .*cache: Not a directory; set HF_DATASETS_CACHE"
    ):
        load_rows(source)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_damaged_cache_is_not_the_file_s_fault(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` made of a Parquet file is made anew; of another one, it is said what to delete."""
    source = write(tmp_path / f"rows.{suffix}", parquet(ROWS) if suffix == "parquet" else lines(*ROWS))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    whole = load_rows(source)["chosen"][:]
    for path in (tmp_path / "cache").rglob("*.arrow"):
        path.unlink()  # a copy in memory may still be mapped
        path.write_bytes(b"ARROW1")
    if suffix == "parquet":
        assert load_rows(source)["chosen"][:] == whole
    else:
        with pytest.raises(UserError, match=r"rows.jsonl: its rows in the cache are damaged \(.*\): delete .*cache"):
            load_rows(source)


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    """Nor does it stand for the file that it would match."""
    write(tmp_path / "p1.parquet", parquet(ROWS[:1]))
    assert len(load_rows(write(tmp_path / "p[1].parquet", parquet(ROWS)))) == len(ROWS)
    path = (tmp_path / "p1.parquet").rename(tmp_path / "a::b.parquet")
    with pytest.raises(UserError, match="with '::' in its path; rename it"):
        load_rows(str(path))


def test_names_that_are_too_long_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        load_rows(str(tmp_path / f"{'a' * 300}.jsonl"))
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        resolve_model(str(tmp_path / ("a" * 300)))


def test_a_full_disk_while_tokenizing_is_said(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "rows.jsonl", lines(*ROWS))
    rows = load_rows(source)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(datasets.Dataset, "map", full)
    with pytest.raises(UserError, match=r"cannot be cached in .*: No space left on device; set HF_DATASETS_CACHE"):
        tokenize_rows(rows, tokenizer, source)


def test_processes_share_a_large_data_set(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "LARGE", 8)
    source = str(write_rows(tmp_path / "rows.jsonl", make_rows(8)))
    one = tokenize_rows(load_rows(source), tokenizer, source)
    two = tokenize_rows(load_rows(source), tokenizer, source, options=RowOptions(workers=2))
    assert one.to_list() == two.to_list()


def test_a_completion_without_eos_is_counted_and_left_as_it_is(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", with_field("empty_chosen", "w1 w2"))
    with pytest.warns(UserWarning, match=r"1 of 4 rows \(the first is row 2\) have a completion without"):
        tokenized = tokenize_rows(load_rows(source), tokenizer, source)
    assert tokenized[1]["empty_chosen"] == tokenizer("w1 w2").input_ids
