"""Think formats: split and join lose nothing, and prompts end where generation begins."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from bvpo.policy import load_tokenizer
from bvpo.traces import Response, answer_of, join, render_prompt, split, template_fingerprint

COMPLETIONS = [
    "<think>\n1 + 1 = 2\n</think>\n\nThe answer is 2.",
    "1 + 1\n</think>\n\n2",  # R1-Distill: the prompt opened the block
    "<think>never closed",
    "no tags at all",
    "",
    "<think></think>",
    "<think>a</think>b</think>c",
    "a<think>b</think>c",
]


@pytest.mark.parametrize("text", COMPLETIONS)
def test_join_is_the_inverse_of_split(text: str) -> None:
    assert join(split(text)) == text


def test_split_by_hand() -> None:
    assert split(COMPLETIONS[0]) == Response("\n1 + 1 = 2\n", "\n\nThe answer is 2.", opened=True, closed=True)
    assert split(COMPLETIONS[1]) == Response("1 + 1\n", "\n\n2", opened=False, closed=True)
    assert split(COMPLETIONS[2]) == Response("never closed", "", opened=True, closed=False)


def test_an_unfinished_trace_has_no_answer() -> None:
    assert answer_of(COMPLETIONS[2], "thinking") is None
    assert answer_of(COMPLETIONS[0], "thinking") == "The answer is 2."
    assert answer_of(" 2\n", "no_thinking") == "2"


def with_template(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a real chat template of the `trl` package."""
    template = Path(cast(str, trl.__file__)).parent / "chat_templates" / f"{name}.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", chat_template=template.read_text()
    )


def test_prompts_of_the_real_templates(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = [{"role": "user", "content": "hello"}]
    qwen3, r1 = with_template("qwen3", tokenizer), with_template("deepseek_r1_distill", tokenizer)
    assert render_prompt(qwen3, conversation, "thinking").endswith("<|im_start|>assistant\n")
    assert render_prompt(qwen3, conversation, "no_thinking").endswith("assistant\n<think>\n\n</think>\n\n")
    assert render_prompt(r1, conversation, "thinking").endswith("<｜Assistant｜><think>\n")
    assert render_prompt(r1, conversation, "no_thinking").endswith("<｜Assistant｜><think>\n\n</think>\n\n")
    assert template_fingerprint(qwen3) != template_fingerprint(r1)


def test_the_built_in_template_has_both_modes() -> None:
    tokenizer = load_tokenizer("builtin:tiny_reasoner")
    conversation = [{"role": "user", "content": "hello"}]
    thinking = render_prompt(tokenizer, conversation, "thinking")
    assert render_prompt(tokenizer, conversation, "no_thinking") == thinking + "<think>\n\n</think>\n\n"


def test_a_tokenizer_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        render_prompt(tokenizer, [], "thinking")
