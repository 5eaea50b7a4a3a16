"""Think formats and prompts: how a reasoning model marks its trace, with thinking on and off.

A *trace* is the text between the open and the close tag; the *answer* is what follows. The tags are data
(`ThinkFormat`), not branches. Nothing here strips, trims or re-renders a completion: chat templates of the R1 family
cut `<think>…</think>` out of assistant turns, so a completion must never pass through one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

Mode = Literal["thinking", "no_thinking"]
MODES: tuple[Mode, ...] = ("thinking", "no_thinking")
Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class ThinkFormat:
    """The tags of one model family.

    Args:
        open: The tag that starts a trace.
        close: The tag that ends it.
        empty: The closed, empty block that a `no_thinking` prompt ends in, verbatim: in most tokenizers a blank line is
            one token, so `<think>\\n\\n</think>` is not `<think>\\n` + `\\n</think>`.
    """

    open: str = "<think>"
    close: str = "</think>"
    empty: str = "<think>\n\n</think>\n\n"


QWEN3 = ThinkFormat()


@dataclass(frozen=True)
class Response:
    """A completion cut at its tags, every character kept: `join(split(text)) == text`.

    `opened` tells whether the completion holds the open tag itself (Qwen3) or the prompt did (R1-Distill); `closed`
    whether the trace was finished. An unfinished trace has an empty answer.
    """

    trace: str
    answer: str
    opened: bool
    closed: bool


def split(completion: str, think: ThinkFormat = QWEN3) -> Response:
    """Cut a `thinking` completion into trace and answer at the first close tag."""
    opened = completion.startswith(think.open)
    body = completion[len(think.open) :] if opened else completion
    trace, tag, answer = body.partition(think.close)
    return Response(trace, answer, opened, closed=bool(tag))


def join(response: Response, think: ThinkFormat = QWEN3) -> str:
    """The inverse of `split`."""
    head = think.open if response.opened else ""
    tail = think.close + response.answer if response.closed else ""
    return head + response.trace + tail


def answer_of(completion: str, mode: Mode, think: ThinkFormat = QWEN3) -> str | None:
    """The answer alone, or None where a trace was left unfinished. Whitespace around it is not part of the answer."""
    if mode == "no_thinking":
        return completion.strip()
    response = split(completion, think)
    return response.answer.strip() if response.closed else None


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, mode: Mode, think: ThinkFormat = QWEN3
) -> str:
    """The text that generation starts from, up to and including the generation prompt, without BOS.

    `no_thinking` ends after the empty block. Templates that know `enable_thinking` (Qwen3) write it themselves; for
    those that open the block or ignore the switch (R1-Distill, R1-0528) it is written here.

    Raises:
        ValueError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so prompts cannot be rendered: "
            "use an instruction-tuned model, or add a chat_template.jinja to its folder"
        )
    text = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True, enable_thinking=mode == "thinking"
    )
    assert isinstance(text, str)
    if tokenizer.bos_token:
        text = text.removeprefix(str(tokenizer.bos_token))
    if mode == "thinking" or text.endswith(think.empty):
        return text
    opened = think.open + "\n"
    return text.removesuffix(opened) + think.empty


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template's source, which rows carry as `template_sha`."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
