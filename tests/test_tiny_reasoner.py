"""The shipped tiny reasoner and its pairs: what the build script asserts, checked on the committed files."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bvpo
from bvpo.generation import Decoding, generate
from bvpo.tasks import TASKS, Question, answer_sentence, draw_questions, is_correct, split_of, work_on
from bvpo.traces import MODES, Mode, answer_of, render_prompt, template_fingerprint

ASSETS = Path(bvpo.__file__).parent / "assets"
FOLDER, PAIRS = ASSETS / "tiny_reasoner", ASSETS / "tiny_reasoner_pairs.parquet"
EOS = "<|im_end|>"
COMPLETIONS: dict[Mode, tuple[str, str, str]] = {
    "thinking": ("prompt", "chosen", "rejected"),
    "no_thinking": ("empty_prompt", "empty_chosen", "empty_rejected"),
}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER)


@cache
def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(PAIRS).to_pylist()
    return found


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


# --- Tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "instruction", "answer"),
    [
        ("sum", "Work out 4 + 7 + 5 + 9.", "25"),
        ("story", "A purse holds 12 coins. It gains 5, loses 9, gains 4. How many coins does it hold now?", "12"),
        ("largest", "Find the maximum of 35 12 61 44.", "61"),
        ("smallest", "Find the minimum of 35 12 61 44.", "12"),
        ("ascending", "Sort in ascending order: 35 12 61 44.", "12 35 44 61"),
        ("descending", "Sort in descending order: 35 12 61 44.", "61 44 35 12"),
        ("reverse", "Write k a r t backwards.", "t r a k"),
        ("count", "How often is n found in b a n a n a n?", "3"),
        ("letter", "Name letter 3 of k a r t e n.", "r"),
    ],
)
def test_flawless_work_is_right(task: str, instruction: str, answer: str) -> None:
    question = Question(task, instruction, answer)
    assert work_on(question, 0.0, random.Random(0)).result == answer
    assert is_correct(question, f"So {answer_sentence(question, answer)}")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("So the numbers 35 12 61 in ascending order are 12 35 61.", True),
        ("\n\nPerhaps the order is 12 35 61.\n", True),
        ("So the numbers 35 12 61 in ascending order are 12 35 61", False),  # unfinished
        ("So the numbers 35 12 61 in ascending order are 12 61 35.", False),
        ("So the numbers 35 12 61 in ascending order are 12 35.", False),
        ("So the numbers 35 12 61 in ascending order are 2 12 35 61.", False),
        ("So the numbers are 12 35 61. So they are 35 12 61.", False),  # the last statement counts
        ("12 35 61.", False),
        ("", False),
    ],
)
def test_checker(answer: str, right: bool) -> None:
    assert is_correct(Question("ascending", "Arrange 35 12 61 from small to large.", "12 35 61"), answer) is right


def test_every_phrasing_is_drawn_and_worked() -> None:
    questions = draw_questions(1000, 0, "train")
    assert {question.task for question in questions} == set(TASKS)
    for question in questions:
        assert work_on(question, 0.0, random.Random(0)).result == question.answer
        assert is_correct(question, answer_sentence(question, question.answer))
        assert not is_correct(question, answer_sentence(question, question.answer + " 1"))


def test_slips_make_wrong_work() -> None:
    for question in draw_questions(200, 1, "train"):
        rng = random.Random(0)
        assert any(work_on(question, 0.5, rng).result != question.answer for _ in range(50))


def test_questions_are_deterministic_distinct_and_split() -> None:
    train, held_out = draw_questions(2000, 3, "train"), draw_questions(500, 3, "held_out")
    assert train == draw_questions(2000, 3, "train")
    assert len({question.instruction for question in train}) == 2000
    assert {split_of(question.instruction) for question in train} == {"train"}
    assert {split_of(question.instruction) for question in held_out} == {"held_out"}


def test_split_ignores_phrasing_and_order() -> None:
    for number in range(10, 100):
        same = (f"Work out {number} + 7 + 5.", f"Find the sum 5 + {number} + 7.", f"Put 7 5 {number} in rising order.")
        assert len({split_of(instruction) for instruction in same}) == 1


# --- Model and tokenizer ----------------------------------------------------------------------------------------------


def test_sizes() -> None:
    assert model().num_parameters() <= 1_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    assert PAIRS.stat().st_size <= 3_000_000
    assert {p.dtype for p in model().parameters()} == {torch.float32}


def test_special_tokens_are_single() -> None:
    for text in ("<think>", "</think>", "<|im_start|>", EOS, "\n\n", "\n", " 57", " k"):
        assert len(encode(text)) == 1, text
    assert tokenizer().eos_token == EOS
    assert tokenizer().pad_token != EOS
    assert tokenizer().bos_token is None


def test_prompts_end_where_generation_begins() -> None:
    conversation = [{"role": "user", "content": "Work out 4 + 7."}]
    user = f"<|im_start|>user\nWork out 4 + 7.{EOS}\n<|im_start|>assistant\n"
    assert render_prompt(tokenizer(), conversation, "thinking") == user
    assert render_prompt(tokenizer(), conversation, "no_thinking") == user + "<think>\n\n</think>\n\n"


def test_accuracy_on_held_out_questions() -> None:
    """200 questions have a standard error of 3.5 points; the bounds are 3 of them around the build log's accuracies."""
    questions = draw_questions(200, 11, "held_out")
    accuracy = {}
    for mode in MODES:
        prompts = [
            encode(render_prompt(tokenizer(), [{"role": "user", "content": q.instruction}], mode)) for q in questions
        ]
        seeds, decoding = list(range(len(questions))), Decoding(temperature=0.8, max_new_tokens=160)
        eos = [tokenizer().eos_token_id]
        completions = generate(model(), prompts, seeds, decoding, eos_token_ids=eos, batch_size=200)
        answers = [answer_of(tokenizer().decode(c.token_ids).removesuffix(EOS), mode) for c in completions]
        accuracy[mode] = sum(is_correct(q, a or "") for q, a in zip(questions, answers, strict=True)) / len(questions)
    assert 0.66 < accuracy["thinking"] < 0.88
    assert 0.36 < accuracy["no_thinking"] < 0.58
    assert accuracy["thinking"] > accuracy["no_thinking"] + 0.1


# --- Pairs ------------------------------------------------------------------------------------------------------------


def test_rows_are_many_and_distinct() -> None:
    assert len(rows()) >= 1000
    for key in ("prompt_id", "prompt", "empty_prompt"):
        assert len({row[key] for row in rows()}) == len(rows())


def test_no_held_out_question_is_in_the_pairs() -> None:
    assert {split_of(row["conversation"][0]["content"]) for row in rows()} == {"train"}


def test_prompts_are_the_rendered_conversations() -> None:
    for row in rows():
        assert row["prompt"] == render_prompt(tokenizer(), row["conversation"], "thinking")
        assert row["empty_prompt"] == render_prompt(tokenizer(), row["conversation"], "no_thinking")
        assert row["template_sha"] == template_fingerprint(tokenizer())


@pytest.mark.parametrize("mode", MODES)
def test_texts_and_ids_round_trip(mode: Mode) -> None:
    for row in rows():
        prompt, *completions = (row[key] for key in COMPLETIONS[mode])
        for completion in completions:
            ids = encode(prompt) + encode(completion)
            assert tokenizer().unk_token_id not in ids
            assert tokenizer().decode(ids) == prompt + completion
            assert encode(prompt + completion) == ids
            assert completion.endswith(EOS)
            assert completion.startswith("<think>\n") == (mode == "thinking")


@pytest.mark.parametrize("mode", MODES)
def test_chosen_is_right_and_rejected_is_wrong(mode: Mode) -> None:
    instructions = {q.instruction: q for q in draw_questions(4000, 1, "train")}  # a prefix of them was asked
    _, chosen, rejected = COMPLETIONS[mode]
    for row in rows():
        question = instructions[row["conversation"][0]["content"]]
        for key, right in ((chosen, True), (rejected, False)):
            assert is_correct(question, answer_of(row[key].removesuffix(EOS), mode) or "") is right


@pytest.mark.parametrize("key", ["trace_candidates", "empty_candidates"])
def test_candidates(key: str) -> None:
    for row in rows():
        candidates = row[key]
        assert len(candidates) == 5
        assert {candidate["score"] for candidate in candidates} == {0.0, 1.0}
        assert len({candidate["seed"] for candidate in candidates}) == 5
        assert all(candidate["answer"] == candidate["answer"].strip() for candidate in candidates)
