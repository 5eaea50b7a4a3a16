"""What holds for every text: nothing is lost, or it is said clearly what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from bvpo.errors import UserError
from bvpo.pairs import check_row, encode_completion, encode_prompt
from bvpo.traces import (
    FORMATS,
    MODES,
    Conversation,
    Mode,
    Response,
    ThinkFormat,
    answer_of,
    check_text,
    join,
    render_prompt,
    split,
)
from tests.test_traces import deepseek, generation_ids, template

every = settings(derandomize=True, max_examples=200, deadline=None, database=None)
TAGS = ["<think>", "</think>", "<think>\n\n</think>\n\n", "<", "</thi", "nk>", "<｜end▁of▁sentence｜>", "<｜User｜>"]
SPACES = ["\n", "\r\n", "\n\n", "\r", " ", "\t", "\u2028", "\x00", "\ufeff"]
spaces = st.sampled_from(["", *(space for space in SPACES if space.isspace())])
SURROGATES = ["\ud83d", "\ude00"]
unicode_texts = st.text(st.characters(exclude_categories=["Cs"]))
texts = st.lists(st.sampled_from(TAGS + SPACES) | unicode_texts, max_size=12).map("".join)
broken_texts = st.lists(texts | st.sampled_from(SURROGATES), max_size=6).map("".join)
formats = st.sampled_from(list(FORMATS.values()))
LONG = 100_000


def is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


@pytest.fixture(scope="module")
def r1_distill() -> PreTrainedTokenizerFast:
    return deepseek(template("deepseek_r1_distill"), adds_bos=True)


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedTokenizerFast:
    return deepseek(template("qwen3"))


@pytest.fixture(scope="module")
def bare() -> PreTrainedTokenizerFast:
    return deepseek("")


@every
@given(broken_texts, formats)
@example("x" * LONG, FORMATS["qwen3"])
@example("<think>" * LONG + "</think>" * LONG, FORMATS["r1_0528"])
@example("</thi" * LONG, FORMATS["r1_distill"])
@example("<think>" + "\r\n" * LONG + "</think>", FORMATS["qwen3"])
def test_split_loses_nothing(text: str, think: ThinkFormat) -> None:
    response = split(text, think)
    assert join(response, think) == text
    assert think.close not in response.trace
    assert response.closed == (think.close in text)
    assert response.closed or response.answer == ""
    assert response.opened == text.lstrip().startswith(think.open) and not response.before.strip()
    assert answer_of(text, "thinking", think) == (response.answer.strip() if response.closed else None)


@every
@given(st.builds(Response, broken_texts, broken_texts, st.booleans(), st.booleans(), spaces), formats)
def test_join_gives_what_split_takes_apart_or_refuses(response: Response, think: ThinkFormat) -> None:
    try:
        text = join(response, think)
    except UserError:
        whole = response.trace + response.answer
        unwritten = (response.answer and not response.closed) or (response.before and not response.opened)
        assert think.open in whole or think.close in whole or unwritten
    else:
        assert split(text, think) == response


@every
@given(broken_texts)
@example("a" * LONG)
@example(" " * LONG)
@example("<think>" + "1 + 1 = 2\n" * (LONG // 10) + "</think>\n\n2")
def test_completions_decode_to_what_was_encoded(r1_distill: PreTrainedTokenizerFast, text: str) -> None:
    """Through ids and back, cut and joined on either side; a lone surrogate has no ids, and is named."""
    try:
        check_text(text, "chosen")
    except UserError as error:
        assert not is_unicode(text) and "lone surrogate" in str(error)
        return
    assert is_unicode(text)
    completion = text + str(r1_distill.eos_token)
    ids = encode_completion(r1_distill, join(split(completion)))
    assert ids and r1_distill.decode(ids) == completion
    assert ids.count(r1_distill.eos_token_id) == completion.count(str(r1_distill.eos_token))


def test_no_completion_is_silently_empty() -> None:
    row = dict.fromkeys(("prompt", "chosen", "rejected", "empty_prompt", "empty_chosen", "empty_rejected"), "text")
    with pytest.raises(UserError, match="field chosen: expected text, found nothing"):
        check_row(row | {"chosen": join(split(""))}, "row 1")


@every
@given(st.lists(texts, max_size=2), texts, st.none() | texts, st.sampled_from(MODES))
def test_prompts_are_the_ids_of_generation_for_every_text(
    r1_distill: PreTrainedTokenizerFast,
    qwen3: PreTrainedTokenizerFast,
    earlier: list[str],
    last: str,
    system: str | None,
    mode: Mode,
) -> None:
    conversation: Conversation = [] if system is None else [{"role": "system", "content": system}]
    for text in earlier:
        conversation += [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    conversation += [{"role": "user", "content": last}]
    for tokenizer in (r1_distill, qwen3):
        generated = generation_ids(tokenizer, conversation, mode)
        if tokenizer is r1_distill and mode == "no_thinking":  # the template has no such mode
            generated = generated[:-2] + encode_completion(tokenizer, FORMATS["r1_distill"].empty)
        assert encode_prompt(tokenizer, render_prompt(tokenizer, conversation, mode)) == generated


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | broken_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=8,
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "human", ""])
messages = st.fixed_dictionaries({"role": roles, "content": broken_texts})


@every
@given(st.lists(messages, max_size=4) | json_values, formats, st.sampled_from(MODES))
def test_every_conversation_is_rendered_whole_or_refused(
    qwen3: PreTrainedTokenizerFast, conversation: Any, think: ThinkFormat, mode: Mode
) -> None:
    try:
        prompt = render_prompt(qwen3, conversation, mode, think)
    except UserError as error:
        assert str(error)
    else:
        assert conversation[-1]["role"] == "user"
        assert all(m["content"].rpartition(think.close)[2].strip() in prompt for m in conversation)
        assert is_unicode(prompt) and prompt.endswith(think.empty if mode == "no_thinking" else "assistant\n")


tag_texts = st.text("<>/ab \n", max_size=4) | st.sampled_from(["<think>", "</think>", "[THINK]", "\ud800"])


@every
@given(tag_texts, tag_texts, st.text(" \nab", max_size=3), st.sampled_from(["", "\n", "\n\n", " x"]), texts)
def test_every_custom_format_works_or_is_refused(
    bare: PreTrainedTokenizerFast, open: str, close: str, inside: str, behind: str, text: str
) -> None:
    """A template that opens the block with the format's tag: both prompts, and split and join, follow the tags."""
    try:
        think = ThinkFormat(open, close, open + inside + close + behind, prompt_opens=True)
    except UserError as error:
        assert str(error).startswith("think format: ")
        return
    assert join(split(text, think), think) == text
    bare.chat_template = "{{ messages[-1].content }}<｜Assistant｜>{{ " + repr(open) + " }}"
    conversation = [{"role": "user", "content": "hello"}]
    assert render_prompt(bare, conversation, "thinking", think) == "hello<｜Assistant｜>" + think.open
    assert render_prompt(bare, conversation, "no_thinking", think) == "hello<｜Assistant｜>" + think.empty
    with pytest.raises(UserError, match="leaves the block to the model"):
        render_prompt(bare, conversation, "thinking", replace(think, prompt_opens=False))


@pytest.mark.parametrize("mode", MODES)
def test_long_prompts(r1_distill: PreTrainedTokenizerFast, mode: Mode) -> None:
    content = "<think>\r\n" * (LONG // 9)
    prompt = render_prompt(r1_distill, [{"role": "user", "content": content}], mode)
    assert content in prompt and encode_prompt(r1_distill, prompt)[0] == r1_distill.bos_token_id
