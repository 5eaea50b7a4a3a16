"""Think formats and prompts: how a reasoning model marks its trace, with thinking on and off.

A *trace* is the text between the open and the close tag; the *answer* is what follows. The tags are data
(`ThinkFormat`), not branches. Nothing here strips, trims or re-renders a completion: chat templates of the R1 family
cut `<think>…</think>` out of assistant turns, so a completion must never pass through one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from bvpo.errors import UserError

Mode = Literal["thinking", "no_thinking"]
MODES: tuple[Mode, ...] = ("thinking", "no_thinking")
Conversation = list[dict[str, str]]


def check_text(text: str, what: str) -> None:
    """Raises UserError where a text holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"{what}: character {error.start + 1} is a lone surrogate, {found}: mend the file's encoding"
        ) from error


@dataclass(frozen=True)
class ThinkFormat:
    """The tags of one model family.

    Args:
        open: The tag that starts a trace.
        close: The tag that ends it.
        empty: The closed block that a `no_thinking` prompt ends in, verbatim: in most tokenizers a blank line is one
            token, so `<think>\\n\\n</think>` is not `<think>\\n` + `\\n</think>`. Blank, it must be the template's own
            where the template writes one, also where that is a close tag alone (DeepSeek-V3.1); with words in it
            (`NO_THINKING_PREFILL`), it replaces that.
        prompt_opens: Whether the generation prompt of `thinking` holds the open tag. null takes either.

    Raises:
        UserError: A tag is blank or holds the other, or the block is not open tag, text, close tag, white space, nor
            the latter two alone.
    """

    open: str = "<think>"
    close: str = "</think>"
    empty: str = "<think>\n\n</think>\n\n"
    prompt_opens: bool | None = None

    def __post_init__(self) -> None:
        for name in ("open", "close", "empty"):
            value = getattr(self, name)
            if not value.strip():
                raise UserError(f"think format: {name} is {value!r}; give the text that the model writes")
            check_text(value, f"think format: {name}")
        if self.open in self.close or self.close in self.open:
            raise UserError(f"think format: one of the tags {self.open!r} and {self.close!r} holds the other")
        if self.empty.rstrip() == self.close:
            return
        before, opened, block = self.empty.partition(self.open)
        inside, closed, after = block.partition(self.close)
        if not (opened and closed) or before or after.strip() or self.open in inside:
            raise UserError(
                f"think format: empty is {self.empty!r}; expected {self.open!r}, text without tags, {self.close!r}, "
                "and nothing but white space behind"
            )


NO_THINKING_PREFILL = "<think>\nOkay, I think I have finished thinking.\n</think>\n\n"  # arXiv 2504.09858
QWEN3 = ThinkFormat()  # Qwen3 leaves the block to the model, Qwen3.5 opens it
R1_DISTILL = ThinkFormat(prompt_opens=True)
R1_0528 = ThinkFormat(prompt_opens=False)
FORMATS = {"qwen3": QWEN3, "r1_distill": R1_DISTILL, "r1_0528": R1_0528}
FORMATS |= {f"{name}_prefilled": replace(think, empty=NO_THINKING_PREFILL) for name, think in FORMATS.items()}


def think_format(choice: str | ThinkFormat) -> ThinkFormat:
    """A format given by name or by its fields, as YAML gives it."""
    if isinstance(choice, ThinkFormat):
        return choice
    if choice not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"there is no think format {choice!r}; give {known}, or open, close, empty and prompt_opens")
    return FORMATS[choice]


@dataclass(frozen=True)
class Response:
    """A completion cut at its tags, every character kept: `join(split(text)) == text`.

    `opened` tells whether the completion holds the open tag itself (Qwen3) or the prompt did (R1-Distill); `closed`
    whether the trace was finished; `before` is the white space in front of the open tag (GLM-4.5 writes a line break).
    An unfinished trace has an empty answer.
    """

    trace: str
    answer: str
    opened: bool
    closed: bool
    before: str = ""


def split(completion: str, think: ThinkFormat = QWEN3) -> Response:
    """Cut a `thinking` completion into trace and answer at the first close tag."""
    before, tag, body = completion.partition(think.open)
    opened = bool(tag) and not before.strip()
    trace, end, answer = (body if opened else completion).partition(think.close)
    return Response(trace, answer, opened, closed=bool(end), before=before if opened else "")


def join(response: Response, think: ThinkFormat = QWEN3) -> str:
    """The inverse of `split`.

    Raises:
        UserError: The response is not what `split` gives: its trace holds a tag, or an unfinished trace has an answer.
    """
    head = response.before + think.open if response.opened else ""
    tail = think.close + response.answer if response.closed else ""
    text = head + response.trace + tail
    if split(text, think) != response:
        raise UserError(
            f"trace {response.trace[:40]!r} and answer {response.answer[:40]!r} cannot be joined: the trace holds "
            f"{think.open!r} or {think.close!r}, or it is unfinished and has an answer"
        )
    return text


def answer_of(completion: str, mode: Mode, think: ThinkFormat = QWEN3) -> str | None:
    """The answer alone, or None where a trace was left unfinished. Whitespace around it is not part of the answer."""
    if mode == "no_thinking":
        return completion.strip()
    response = split(completion, think)
    return response.answer.strip() if response.closed else None


def check_conversation(conversation: Any) -> None:
    """Raises UserError, naming the message, unless this is a list of {role, content} that ends in a user turn."""
    if not isinstance(conversation, list) or not conversation:
        found = "an empty list" if conversation == [] else type(conversation).__name__
        raise UserError(f"conversation: expected a list of {{role, content}}, found {found}")
    for number, message in enumerate(conversation, 1):
        for field in ("role", "content"):
            value = message.get(field) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise UserError(f"conversation, message {number}: expected {{role, content}} as text, found no {field}")
            check_text(value, f"conversation, message {number}, {field}")
    if conversation[-1]["role"] != "user":
        raise UserError(f"conversation: expected a user turn at its end, found {conversation[-1]['role']!r}")


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, mode: Mode, think: ThinkFormat = QWEN3
) -> str:
    """The text that generation starts from, up to and including the generation prompt, without BOS.

    `no_thinking` ends after the empty block. Templates that know the switch, `enable_thinking` (Qwen3) or `thinking`
    (DeepSeek-V3.1), write it themselves; for those that open the block or ignore the switch (R1-Distill, R1-0528) it is
    written here.

    Raises:
        UserError: There is no chat template; it refuses the conversation or leaves a message out; it is of another
            think format.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {name!r} has no chat template, so prompts cannot be rendered: "
            "use an instruction-tuned model, or add a chat_template.jinja to its folder"
        )
    check_conversation(conversation)
    text = _render(tokenizer, conversation, mode).removeprefix(str(tokenizer.bos_token or ""))
    for number, message in enumerate(conversation, 1):
        if message["content"].rpartition(think.close)[2].strip() not in text:
            role = message["role"]
            raise UserError(f"the chat template of {name!r} leaves message {number} ({role}) out; take it out yourself")
    head, block = _cut_block(text, think)
    closed = think.close in block
    if mode == "thinking":
        if closed:
            raise UserError(
                f"the chat template of {name!r} ends in {text[-40:]!r}, and the think format expects that it "
                "does not close it with thinking: give this model's `close` or, where the template's switch is neither "
                "`enable_thinking` nor `thinking`, set that inside the template"
            )
        if think.prompt_opens not in (None, bool(block)):
            expected = "opens the block" if think.prompt_opens else "leaves the block to the model"
            raise UserError(
                f"the chat template of {name!r} ends in {text[-40:]!r}, and the think format expects that it "
                f"{expected}: give the format of this model"
            )
        return text
    if text.endswith(think.empty):
        return text
    if closed and not think.empty.replace(think.open, "").replace(think.close, "").strip():
        raise UserError(
            f"the chat template of {name!r} writes the empty block {block!r}, and the think format's is "
            f"{think.empty!r}: give the template's as `empty`"
        )
    return head + think.empty


def turn_end(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> str:
    """The stop token that ends an assistant's turn: that which the chat template writes behind one (Gemma's
    `<end_of_turn>`); where it writes none, the first of `stops`; "" where there is none."""
    return _turn_end(tokenizer, str(tokenizer.chat_template), tuple(stops))


@lru_cache(maxsize=8)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str, stops: tuple[str, ...]) -> str:
    """`template` is the tokenizer's: another one may be set."""
    behind, answer = "", "the-end-of-this-turn"
    with suppress(UserError):
        turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": answer}]
        behind = _render(tokenizer, turns, "thinking", generation_prompt=False).rpartition(answer)[2].lstrip()
    return next((stop for stop in stops if behind.startswith(stop)), next(iter(stops), ""))


def _render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, mode: Mode, generation_prompt: bool = True
) -> str:
    on = mode == "thinking"
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            enable_thinking=on,  # Qwen3, GLM-4.5
            thinking=on,  # DeepSeek-V3.1, Granite 3.2
        )
    except (TemplateError, TypeError, ValueError) as error:  # the latter are what templates run into, and transformers
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"the chat template of {tokenizer.name_or_path!r} refuses the conversation: {cause}") from error
    assert isinstance(text, str)
    return text


def _cut_block(prompt: str, think: ThinkFormat) -> tuple[str, str]:
    """A prompt without the blank block that it ends in, open or closed, and that block ("" where there is none).

    A close tag alone is one: DeepSeek-V3.1's template writes no open tag with thinking disabled.
    """
    head, tag, tail = prompt.rpartition(think.open)
    if tag and not tail.replace(think.close, "", 1).strip():
        return head, tag + tail
    head, tag, tail = prompt.rpartition(think.close)
    return (head, tag + tail) if tag and not tail.strip() else (prompt, "")


def own_stops(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The text that ends a completion as far as the tokenizer knows: its EOS, or () where it has none."""
    return (str(tokenizer.eos_token),) if tokenizer.eos_token else ()


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether generation starts from BOS: as the chat template has it or, where there is none for text (those of
    vision models take parts), as the tokenizer does."""
    if tokenizer.bos_token is None:
        return False
    if tokenizer.chat_template:
        with suppress(UserError):
            text = _render(tokenizer, [{"role": "user", "content": ""}], "thinking")
            return text.startswith(str(tokenizer.bos_token))
    return list(tokenizer("").input_ids)[:1] == [tokenizer.bos_token_id]


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template's source, which rows carry as `template_sha`."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()


def check_template(fingerprints: Iterable[str | None], tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Raises UserError at the first row whose `template_sha` is not this tokenizer's. Rows without one pass."""
    own = template_fingerprint(tokenizer)
    for number, found in enumerate(fingerprints, 1):
        if found is not None and found != own:
            raise UserError(
                f"{source}, row {number}: its prompts were written with another chat template (template_sha "
                f"{str(found)[:12]}…) than that of {tokenizer.name_or_path!r} ({own[:12]}…): train with the tokenizer "
                "that the rows were sampled with, or sample them anew"
            )
