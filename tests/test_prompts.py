"""Prompts of every recognised form, through real files; what is no prompt is refused by file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bvpo.errors import UserError
from bvpo.prompts import Prompt, load_prompts

USER = {"role": "user", "content": "1 + 1 ?"}
SYSTEM = {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": "<think>\n1 + 1\n</think>\n\n2"}
OTHER = {"role": "assistant", "content": "3"}
ONE = [USER]
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "conversation": ({"conversation": [SYSTEM, USER]}, [SYSTEM, USER]),
    "messages": ({"messages": ONE}, ONE),
    "messages with an answer": ({"messages": [SYSTEM, USER, REPLY]}, [SYSTEM, USER]),
    "several turns": ({"messages": [USER, REPLY, USER, OTHER]}, [USER, REPLY, USER]),
    "TRL's prompt": ({"prompt": ONE, "chosen": [REPLY], "rejected": [OTHER]}, ONE),
    "UltraFeedback": ({"prompt": "1 + 1 ?", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, ONE),
    "UltraFeedback with messages": (
        {"prompt": "?", "chosen": [USER, OTHER], "messages": [SYSTEM, USER, REPLY]},
        [SYSTEM, USER],
    ),
    "prompt and bare answers": ({"prompt": "1 + 1 ?", "chosen": [REPLY], "rejected": [OTHER]}, ONE),
    "Alpaca": ({"instruction": "1 + 1 ?", "input": "", "output": "2"}, ONE),
    "Alpaca with input": ({"instruction": "Add", "input": "1 1"}, [{"role": "user", "content": "Add\n\n1 1"}]),
    "prompt": ({"prompt": "1 + 1 ?"}, ONE),
    "question": ({"question": "1 + 1 ?", "answer": "2"}, ONE),
    "problem": ({"problem": "1 + 1 ?", "solution": "2"}, ONE),
    "blank prompt beside a question": ({"prompt": " ", "question": "1 + 1 ?"}, ONE),
    "text as it stands": ({"prompt": " 1\u2028+ 1 \n"}, [{"role": "user", "content": " 1\u2028+ 1 \n"}]),
    "more fields in a message": ({"messages": [USER | {"name": "x", "weight": 1}]}, ONE),
}


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("row", "conversation"), FORMS.values(), ids=list(FORMS))
def test_a_form_is_recognised(tmp_path: Path, kind: str, row: dict[str, Any], conversation: Any) -> None:
    write = jsonl if kind == "jsonl" else parquet
    (prompt,) = load_prompts(write(tmp_path / f"prompts.{kind}", [row]))
    assert prompt.conversation == conversation


def test_forms_may_be_mixed_and_keep_their_order(tmp_path: Path) -> None:
    """The id of a row without one is its conversation's: the same in JSONL, in Parquet and under any form."""
    rows = [row for row, _ in FORMS.values()]
    prompts = load_prompts(jsonl(tmp_path / "a.jsonl", [{"prompt": "first"}, rows[0], {"question": "last"}]))
    assert [prompt.conversation[-1]["content"] for prompt in prompts] == ["first", "1 + 1 ?", "last"]
    ids = {
        load_prompts(jsonl(tmp_path / "b.jsonl", [row]))[0].id
        for row, conversation in FORMS.values()
        if conversation == ONE
    }
    assert ids == {load_prompts(parquet(tmp_path / "c.parquet", [{"messages": ONE}]))[0].id}


# --- Ids and references -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prompt_id": "p7"}, "p7"),
        ({"id": "x", "prompt_id": "p7"}, "p7"),
        ({"id": "x", "prompt_id": None}, "x"),
        ({"id": 12}, "12"),
        ({"id": 7.0}, "7"),
        ({"id": 12, "prompt_id": float("nan")}, "12"),  # as pandas writes an absent one
        ({"prompt_id": 0}, "0"),
        ({"id": 5, "prompt_id": 0}, "0"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ids(tmp_path: Path, kind: str, fields: dict[str, Any], name: str) -> None:
    write = jsonl if kind == "jsonl" else parquet
    assert load_prompts(write(tmp_path / f"p.{kind}", [fields | {"prompt": "a"}]))[0].id == name


@pytest.mark.parametrize(
    ("fields", "reference"),
    [
        ({}, None),
        ({"answer": "2"}, "2"),
        ({"solution": "so 2", "answer": "2"}, "2"),
        ({"answer": "2", "reference": "two"}, "two"),
        ({"answer": None, "solution": "2"}, "2"),
        ({"answer": 2}, "2"),
        ({"answer": float("nan"), "solution": "2"}, "2"),
    ],
)
def test_references(tmp_path: Path, fields: dict[str, Any], reference: str | None) -> None:
    assert load_prompts(jsonl(tmp_path / "p.jsonl", [fields | {"prompt": "a"}]))[0].reference == reference


def test_a_reference_of_another_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "gold": 4, "answer": "no"}, {"prompt": "b", "answer": "no"}])
    assert load_prompts(path, limit=1, reference="gold")[0].reference == "4"
    with pytest.raises(UserError, match=r"p\.jsonl, row 2: no column gold; it has prompt, answer"):
        load_prompts(path, reference="gold")


def test_equal_prompts_are_taken_once_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"question": "a"}, {"prompt": "b"}, {"messages": [{"role": "user", "content": "a"}]}]
    with pytest.warns(UserWarning, match=r"p\.jsonl: 2 rows repeat an earlier prompt; they are left out"):
        prompts = load_prompts(jsonl(tmp_path / "p.jsonl", rows))
    assert [prompt.conversation[0]["content"] for prompt in prompts] == ["a", "b"]


def test_one_id_for_two_prompts_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "a"}, {"id": 1, "prompt": "b"}])
    assert len(load_prompts(path, limit=2)) == 2  # one prompt under two ids is answered twice
    with pytest.raises(UserError, match=r"p\.jsonl, row 3: the prompt_id '1' is another row's, with another prompt"):
        load_prompts(path)


def test_one_prompt_with_two_references_is_refused(tmp_path: Path) -> None:
    """Which of them is right is not ours to choose; the id is a hash, so the message must not speak of it."""
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}])
    with pytest.raises(UserError, match=r"p\.jsonl, row 2: .*another reference, '2' instead of '1'"):
        load_prompts(path)


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_a_limit_counts_prompts_and_not_rows(tmp_path: Path, limit: int) -> None:
    """Rows behind the limit are not looked at."""
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])
    assert [p.conversation[0]["content"] for p in load_prompts(path, limit)] == ["a", "b", "c"][:limit]
    path = jsonl(tmp_path / "q.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"nothing": 1}])
    if limit <= 2:
        assert len(load_prompts(path, limit)) == limit


def test_the_built_in_tasks() -> None:
    few, more = load_prompts("builtin:tasks", 3, seed=5), load_prompts("builtin:tasks", 6, seed=5)
    assert more[:3] == few and few[0].id == "task-00000" and all(prompt.reference for prompt in few)
    assert load_prompts("builtin:tasks", 3, seed=6) != few
    assert few[0] == Prompt(few[0].id, few[0].conversation, few[0].reference)


# --- What is refused --------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, str]] = {
    "no known field": (
        {"text": "a", "label": 1},
        "expected one of the fields .*question or problem, found text, label",
    ),
    "no field": ({}, "found no field"),
    "only blank text": ({"prompt": " \n"}, "expected one of the fields"),
    "text that is a number": ({"prompt": 3}, "expected one of the fields"),
    "no object": ("1 + 1 ?", "expected an object with named fields"),
    "only an answer": ({"messages": [REPLY]}, "expected one of the fields|found an empty list"),
    "no user turn at the end": ({"messages": [USER, SYSTEM]}, "expected a user turn at its end, found 'system'"),
    "a message of text": ({"messages": ["1 + 1 ?"]}, "message 1: expected {role, content} as text, found no role"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1: .* found no content"),
    "content in parts": (
        {"messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        "message 2: .* found no content",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=list(BAD))
def test_what_is_no_prompt_is_refused_by_file_and_row(tmp_path: Path, row: Any, message: str) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(UserError, match=rf"p\.jsonl, row 2: .*({message})") as refused:
        load_prompts(path)
    assert "\n" not in str(refused.value)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b\ud800"}) + "\n")
    with pytest.raises(UserError, match=r"p\.jsonl, row 2: .*character 2 is a lone surrogate, U\+D800"):
        load_prompts(str(path))
    path.write_text(json.dumps({"prompt": "a", "prompt_id": "b\ud800"}) + "\n")
    with pytest.raises(UserError, match=r"p\.jsonl, row 1, prompt_id: character 2 is a lone surrogate, U\+D800"):
        load_prompts(str(path))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"p\.jsonl: (the file is empty|no rows)"):
        load_prompts(str(path))


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(UserError, match=r"p\.parquet: no rows"):
        load_prompts(str(path))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "p.parquet").write_bytes(b"no parquet")
    (tmp_path / "p.csv").write_text("prompt\na\n")
    for name, message in (("p.jsonl", "row 2"), ("p.parquet", "cannot be read"), ("p.csv", "not a data set")):
        with pytest.raises(UserError, match=rf"{name}: .*{message}"):
            load_prompts(str(tmp_path / name))
    with pytest.raises(UserError, match="there is no such file"):
        load_prompts(str(tmp_path / "none.jsonl"))


def test_parquet_rows_of_mixed_forms_have_nulls_and_are_still_recognised(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "messages": None},
        {"prompt": None, "messages": ONE},
        {"prompt": "b", "messages": []},
    ]
    prompts = load_prompts(parquet(tmp_path / "p.parquet", rows))
    assert [prompt.conversation[0]["content"] for prompt in prompts] == ["a", "1 + 1 ?", "b"]
