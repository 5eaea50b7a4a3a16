"""What a start of the sampler refuses, and what goes on: shards, other settings, other models, another day.

The responses are scripted, on the built-in model's tokenizer: no model is loaded.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
import transformers.utils.chat_template_utils as templates
from transformers import AutoTokenizer

from bvpo import sample
from bvpo.decoding import Decoding
from bvpo.engines import Engine, ServerEngine, TransformersEngine
from bvpo.errors import UserError
from bvpo.generation import Backend, Completion, Request
from bvpo.pairing import BestWorst, CorruptedDigits, PairSource
from bvpo.pairs import encode_completion, load_rows, tokenize_rows
from bvpo.policy import BUILTIN, load_tokenizer
from bvpo.prompts import dated
from bvpo.rewards import Item, Reward
from bvpo.sampling import Sampling
from bvpo.sampling_settings import PIECE, PIECES, differences, model_files, read_settings
from bvpo.selection import RowOptions
from bvpo.traces import split
from tests.conftest import write_rows
from tests.test_pairs import ADDING
from tests.test_pairs import wrapped as sentence_piece

TINY = BUILTIN["builtin:tiny_reasoner"]
EOS = "<|im_end|>"


@dataclass(frozen=True)
class Scripted(Engine):
    """Answers by seed: a trace that opens its block or, as `openings` has it, does not, and an answer.

    Attributes:
        lead: What every response begins with.
        asked: Prompts of the requests, by all instances.
    """

    policy: str = "builtin:tiny_reasoner"
    openings: tuple[str, ...] = ("<think>",)
    lead: str = ""
    end: str = EOS
    dtype: str = "float32"
    logprob: float | None = -1.0
    asked: ClassVar[list[Sequence[int]]] = []

    def start(self, policy: str) -> Backend:
        return self

    def complete(
        self, requests: Sequence[Request], decoding: Decoding, stops: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        tokenizer = load_tokenizer(self.policy)
        for index, request in enumerate(requests):
            self.asked.append(request.prompt)
            rng = random.Random(request.seed)
            closed = "</think>" in tokenizer.decode(list(request.prompt))
            trace = "" if closed else rng.choice(self.openings) + f"step {rng.randint(0, 9)}</think>"
            ids = encode_completion(tokenizer, f"{self.lead}{trace}the sum is {rng.randint(8, 99)}.{self.end}")
            end = next(place for place, token in enumerate(ids) if token in stops)
            yield index, Completion(ids[: end + 1], "stop", self.logprob)


@dataclass(frozen=True)
class Checksum(Reward):
    """Hardly ever a tie."""

    name = "checksum"
    fingerprint = "1"

    def scores(self, items: Sequence[Item], progress: str | None = None) -> list[float | None]:
        return [float(zlib.crc32(item.answer.encode())) for item in items]


def options(folder: Path, **given: Any) -> Sampling:
    """12 prompts, 2 responses in each mode."""
    own: dict[str, Any] = {"policy": "builtin:tiny_reasoner", "prompts": "builtin:tasks", "limit": 12, "samples": 2}
    own |= {"output": str(folder / "pairs.jsonl"), "max_new_tokens": 64, "backend": Scripted(), "reward": Checksum()}
    return Sampling(**own | given)


def rows_of(sampling: Sampling) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(sampling.output).read_text().splitlines()]


def copied(folder: Path, template: str | None = None, bos: str | None = None) -> Path:
    """The built-in model in a folder of its own, with another chat template or a BOS."""
    shutil.copytree(TINY, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


# --- Shards -----------------------------------------------------------------------------------------------------------


def test_shards_divide_the_prompts_of_a_back_end_without_blocks(tmp_path: Path) -> None:
    """12 prompts over 5 shards, 4 responses to each; together they give the file of one machine, byte for byte."""
    whole, shared = options(tmp_path / "whole"), options(tmp_path / "shared")
    sample.run(whole, progress=False)
    asked = []
    for index in range(1, 6):
        before = len(Scripted.asked)
        sample.run(replace(shared, shard=f"{index}/5"), progress=False)
        asked.append(len(Scripted.asked) - before)
    assert asked == [8, 8, 12, 8, 12]
    sample.run(replace(shared, stage="pairs"), progress=False)
    assert Path(shared.output).read_bytes() == Path(whole.output).read_bytes()


def test_a_shard_without_a_prompt_says_so(tmp_path: Path) -> None:
    """Blocks stay whole: 12 prompts are 2 blocks of 8, and the first of three shards has none."""

    @dataclass(frozen=True)
    class Blocks(Scripted):
        block: int = 8

    asked = len(Scripted.asked)
    with pytest.warns(UserWarning, match="shard 1/3 has no prompt: the 12 prompts are fewer blocks of 8"):
        sample.run(options(tmp_path, backend=Blocks(), shard="1/3"), progress=False)
    assert len(Scripted.asked) == asked


@pytest.mark.parametrize("shard", ["²/3", "1/³", "01/3", "0/2", "1/1/1", "3/2", "x"])
def test_what_is_no_shard_is_refused(tmp_path: Path, shard: str) -> None:
    with pytest.raises(UserError, match="expected i/n with 1 ≤ i ≤ n"):
        options(tmp_path, shard=shard)


# --- Think blocks -----------------------------------------------------------------------------------------------------

OPENED = (
    (TINY / "chat_template.jinja")
    .read_text()
    .replace("</think>\\n\\n' }}", "</think>\\n\\n' }}\n    {%- else %}\n        {{- '<think>\\n' }}")
)


def test_rows_of_a_template_that_opens_the_block_are_read(tmp_path: Path) -> None:
    """With the default format, which leaves the opening to the template: a second block is no pair's."""
    policy = str(copied(tmp_path / "m", OPENED))
    sampling = options(tmp_path, policy=policy, backend=Scripted(openings=("", "<think>", "\n<think>")), samples=8)
    summary = sample.run(sampling, progress=False)
    assert summary is not None and summary.modes["thinking"].problems["think block"] > 20 and summary.rows > 6
    assert all(row["prompt"].endswith("<think>\n") for row in rows_of(sampling))
    rows = tokenize_rows(load_rows(sampling.output), load_tokenizer(policy), sampling.output, RowOptions())
    assert len(rows) == summary.rows


@pytest.mark.parametrize("opens", [False, True])
def test_anchor_traces_begin_as_the_prompt_wants_it(tmp_path: Path, opens: bool) -> None:
    """A row keeps no tags, so those that begin otherwise would be trained on as other sequences than were drawn."""
    policy = str(copied(tmp_path / "m", OPENED if opens else None))
    engine = Scripted(openings=("", "<think>"))
    sampling = options(tmp_path, policy=policy, backend=engine, samples=8, anchor_traces=10)
    summary = sample.run(sampling, progress=False)
    rows, drawn = rows_of(sampling), {}
    for line in (sampling.work / "responses.jsonl").read_text().splitlines():
        if (record := json.loads(line))["kind"] == "anchor":
            drawn.setdefault(record["prompt"], []).append(record["text"])
    kept = 0
    for row in rows:
        begins = {split(row[side]).opened for side in ("chosen", "rejected")}
        wanted = [text for text in drawn[row["prompt_id"]] if text.startswith("<think>") is not opens]
        wanted = wanted if begins == {not opens} else []
        assert [anchor["trace"] for anchor in row["anchor_traces"]] == [split(text).trace for text in wanted]
        kept += len(wanted)
    assert summary is not None and kept > 0 and summary.lost_anchors == 10 * len(rows) - kept > 0


@pytest.mark.parametrize("logprob", [None, float("nan"), float("-inf")])
def test_an_anchor_trace_without_log_probability_is_lost(tmp_path: Path, logprob: float | None) -> None:
    """And no file holds a number that JSON does not have."""
    sampling = options(tmp_path, backend=Scripted(logprob=logprob), anchor_traces=3)
    summary = sample.run(sampling, progress=False)
    assert summary is not None and summary.rows > 0 and summary.lost_anchors == 3 * summary.rows
    texts = [Path(sampling.output).read_text(), (sampling.work / "responses.jsonl").read_text()]
    assert not any(name in text for text in texts for name in ("NaN", "Infinity"))


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_holds_bos_gives_no_row_and_is_counted(tmp_path: Path) -> None:
    """`<s>` is an HTML tag, too; the tokenizer makes BOS of it."""
    policy = str(copied(tmp_path / "m", bos="<s>"))
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": text} for text in ("a ?", "what does <s>b</s> do", "c ?")])
    sampling = options(tmp_path, policy=policy, prompts=str(prompts), backend=Scripted(policy), samples=6)
    summary = sample.run(sampling, progress=False)
    assert summary is not None and summary.rows == 2
    assert summary.modes["thinking"].without_pair == {"the prompt holds BOS as text": 1}
    rows = tokenize_rows(load_rows(sampling.output), load_tokenizer(policy), sampling.output, RowOptions())
    assert len(rows) == 2


@pytest.mark.parametrize("name", [name for name in ADDING if name != "Llama 2"])  # it adds one behind each tag, too
def test_a_response_that_begins_with_a_space_is_kept(tmp_path: Path, name: str) -> None:
    """As those of Llama 2, Mistral and Phi-3 do behind `[/INST]`: the decoder takes off the first space of a text."""
    tokenizer = sentence_piece(ADDING[name]())
    folder = copied(tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [/INST]"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    end = str(tokenizer.eos_token)
    own = options(tmp_path, policy=str(folder), backend=Scripted(policy=str(folder), lead=" ", end=end))
    summary = sample.run(own, progress=False)
    assert summary is not None and summary.rows > 0
    responses = [json.loads(line) for line in (own.work / "responses.jsonl").read_text().splitlines()]
    assert all(response["same_ids"] for response in responses)
    assert all(row[side].startswith(" <think>") for row in rows_of(own) for side in ("chosen", "rejected"))
    assert all(row["empty_chosen"].startswith(" the sum is") for row in rows_of(own))


def test_a_prompt_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    policy = str(copied(tmp_path / "m", template + (TINY / "chat_template.jinja").read_text()))
    user = {"role": "user", "content": "a"}
    rows = [{"messages": [user]}, {"messages": [{"role": "system", "content": "s"}, user], "prompt_id": "second"}]
    prompts = str(write_rows(tmp_path / "p.jsonl", rows))
    with pytest.raises(UserError, match=r"p\.jsonl, prompt second: the chat template of .* refuses .*no system"):
        sample.run(options(tmp_path, policy=policy, prompts=prompts), progress=False)


def test_on_the_next_day_prompts_have_the_first_days_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.2's template writes today's date; responses that were sampled yesterday answer yesterday's prompt."""

    class Today(datetime):
        date = datetime(2026, 11, 21)

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.date

    monkeypatch.setattr(templates, "datetime", Today)
    monkeypatch.setattr("bvpo.sampler.datetime", Today)
    template = "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n"
    policy = str(copied(tmp_path / "m", template + (TINY / "chat_template.jinja").read_text()))
    sampling = options(tmp_path, policy=policy, samples=4)
    before = len(Scripted.asked)
    sample.run(replace(sampling, stage="generate"), progress=False)
    answered = {tuple(ids) for ids in Scripted.asked[before:]}
    Today.date = datetime(2026, 11, 22)
    sample.run(sampling, progress=False)
    tokenizer, rows = load_tokenizer(policy), rows_of(sampling)
    assert rows and all("21 Nov 2026" in row["prompt"] for row in rows)
    assert all(tuple(tokenizer(row["prompt"], add_special_tokens=False).input_ids) in answered for row in rows)
    assert dated('{{ strftime_now("%Y") + strftime_now(x) }}', Today.date) == "{{ '2026' + strftime_now(x) }}"


# --- Other settings ---------------------------------------------------------------------------------------------------


def test_a_raised_limit_goes_on(tmp_path: Path) -> None:
    """The rows are those of one start, nothing is answered again, and the folder is the longer list's from then on."""
    at_once, in_two = options(tmp_path / "a", limit=20), options(tmp_path / "b", limit=12)
    sample.run(at_once, progress=False)
    sample.run(in_two, progress=False)
    answered = (in_two.work / "responses.jsonl").read_bytes()
    sample.run(replace(in_two, limit=20), progress=False)
    assert (in_two.work / "responses.jsonl").read_bytes().startswith(answered)
    assert Path(in_two.output).read_bytes() == Path(at_once.output).read_bytes()
    assert read_settings(in_two.work).keys() == read_settings(at_once.work).keys()
    assert read_settings(in_two.work)["prompt_count"] == 20
    with pytest.raises(UserError, match=r"settings: prompts was a list of 20, is another one of 12 \(file, lim") as it:
        sample.run(in_two, progress=False)
    assert len(str(it.value)) < 250 + len(str(tmp_path))  # no hashes


def test_prompts_that_come_first_are_refused(tmp_path: Path) -> None:
    """More prompts are those of before and others behind them; not as many others."""
    asked = [{"prompt_id": f"p{n}", "prompt": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(2, 8)]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in asked[1:]))
    sampling = options(tmp_path, prompts=str(source), limit=None)
    sample.run(sampling, progress=False)
    source.write_text("".join(json.dumps(row) + "\n" for row in asked))
    with pytest.raises(UserError, match="prompts was a list of 5, is another one of 6"):
        sample.run(sampling, progress=False)
    source.write_text("".join(json.dumps(row) + "\n" for row in [*asked[1:], asked[0]]))
    sample.run(sampling, progress=False)
    assert read_settings(sampling.work)["prompt_count"] == 6


def test_one_folder_has_one_name(tmp_path: Path) -> None:
    policy = str(copied(tmp_path / "m"))
    sample.run(options(tmp_path, policy=policy), progress=False)
    before = Path(options(tmp_path).output).read_bytes()
    sample.run(options(tmp_path, policy=f"{policy}/"), progress=False)
    assert Path(options(tmp_path).output).read_bytes() == before


def test_other_weights_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    """Times play no role: a shard's machine has a copy."""
    policy = copied(tmp_path / "m")
    sampling = options(tmp_path, policy=str(policy))
    sample.run(sampling, progress=False)
    weights = policy / "model.safetensors"
    os.utime(weights, (0, 0))
    sample.run(sampling, progress=False)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        UserError, match=r"the policy's folder holds other files than it did: model\.safetensors\. Give"
    ):
        sample.run(sampling, progress=False)


def test_a_large_file_is_looked_at_in_pieces(tmp_path: Path) -> None:
    """Its two ends are among them, and of what lies between one byte in 16 here: not the last one before the end."""
    policy, size = copied(tmp_path / "m"), 16 * PIECES * PIECE
    weights = policy / "model.safetensors"
    weights.write_bytes(b"")
    os.truncate(weights, size)
    before, seen = model_files(str(policy)), []
    for place in (0, size - 1, (size - PIECE) * 100 // (PIECES - 1), size - PIECE - 1):
        with weights.open("rb+") as file:
            file.seek(place)
            file.write(b"x")
        seen.append(model_files(str(policy)) != before)
        with weights.open("rb+") as file:
            file.seek(place)
            file.write(b"\0")
    assert seen == [True, True, True, False]


def test_another_back_end_or_dtype_does_not_go_on(tmp_path: Path) -> None:
    """What is there may be read with any; nothing is added to it."""
    sample.run(options(tmp_path), progress=False)
    sample.run(options(tmp_path, backend=TransformersEngine()), progress=False)
    for engine in (Scripted(dtype="bfloat16"), TransformersEngine()):
        with pytest.raises(UserError, match=r"backend was \{.*Scripted', 'dtype': 'float32'\}, is \{.*'dtype': '"):
            sample.run(options(tmp_path, backend=engine, samples=3), progress=False)


def test_a_folder_of_an_older_version_is_gone_on_with(tmp_path: Path) -> None:
    sampling = options(tmp_path)
    sample.run(sampling, progress=False)
    path, before = sampling.work / "settings.json", Path(sampling.output).read_bytes()
    settings = json.loads(path.read_text())
    new = {"weights", "prompt_ids", "backend"}
    path.write_text(json.dumps({name: settings[name] for name in settings.keys() - new}))
    with pytest.warns(UserWarning, match="older version .* did not note prompt_ids, weights"):
        sample.run(sampling, progress=False)
    assert Path(sampling.output).read_bytes() == before
    assert json.loads(path.read_text()) == {name: settings[name] for name in settings.keys() - {"backend"}}


def test_differences_in_words() -> None:
    same = {"prompts": "a", "prompt_count": 2, "prompt_ids": "b", "template_sha": "c", "weights": {}, "date": "1"}
    assert differences({}, same) == differences(same, same) == differences(same, same | {"date": "2"}) == []
    assert differences(same, same | {"prompt_ids": "x"})[0].startswith("the same prompts have other token ids")
    other = {"template_sha": "x", "prompt_ids": "x", "weights": {"config.json": "1"}}
    files = "the policy's folder holds other files than it did: config.json"
    assert differences(same, same | other) == ["the policy's chat template is another", files]


# --- What is bound to fail --------------------------------------------------------------------------------------------

PAIRS: list[tuple[PairSource, bool]] = [(BestWorst(), False), (BestWorst(), True), (CorruptedDigits(), False)]
BOUND: dict[str, tuple[dict[str, Any], str]] = {
    "a reward that is not there": ({"reward": "./nowhere"}, "there is no such folder"),
    "a reward that is no model": ({"reward": "FOLDER"}, "no config.json in this folder"),
    "a server without log-probabilities": (
        {"backend": ServerEngine("http://localhost:9/v1"), "anchor_traces": 2},
        "anchor_traces: each needs its log-probability .*backend.processed_logprobs: true",
    ),
    **{f"one response, {k}": ({"samples": 1, "pairs": p, "one_sided": o}, "samples 1: a pair is of two responses")
       for k, (p, o) in enumerate(PAIRS)},
    **{f"greedy, {k}": ({"temperature": 0, "pairs": p, "one_sided": o}, "temperature 0: the 2 responses .* the same")
       for k, (p, o) in enumerate(PAIRS)},
}  # fmt: skip


@pytest.mark.parametrize("case", BOUND)
def test_what_is_bound_to_fail_is_refused_before_anything_is_generated(tmp_path: Path, case: str) -> None:
    given, message = BOUND[case]
    asked = len(Scripted.asked)
    (tmp_path / "empty").mkdir()
    given = {k: str(tmp_path / "empty") if v == "FOLDER" else v for k, v in given.items()}
    with pytest.raises(UserError, match=message):
        sample.run(options(tmp_path, **given), progress=False)
    assert len(Scripted.asked) == asked and not options(tmp_path).work.exists()


@pytest.mark.parametrize("name", ["builtin:tasks", "math"])
def test_a_checker_needs_a_right_answer(tmp_path: Path, name: str) -> None:
    if name == "math":
        pytest.importorskip("math_verify")
    prompts = str(write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "gold": "1"}]))
    with pytest.raises(
        UserError, match=rf"p\.jsonl: the reward {name} compares with a right answer, and no prompt has"
    ):
        sample.run(options(tmp_path, prompts=prompts, reward=name), progress=False)


def test_what_needs_no_pairs_is_not_refused(tmp_path: Path) -> None:
    """Generating alone, a server at temperature 1, and pairs that one response gives."""
    assert sample.run(options(tmp_path / "a", samples=1, stage="generate", reward="./nowhere"), progress=False) is None
    one = options(tmp_path / "b", samples=1, temperature=0, pairs=CorruptedDigits(), one_sided=True)
    summary = sample.run(one, progress=False)
    assert summary is not None and summary.rows == 12


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "[]", '{"policy": '])
def test_damaged_settings_are_said(tmp_path: Path, content: str) -> None:
    sampling = options(tmp_path)
    sampling.work.mkdir()
    (sampling.work / "settings.json").write_text(content)
    with pytest.raises(UserError, match=r"settings\.json: expected the settings .* the file is damaged; delete it if"):
        sample.run(sampling, progress=False)


def test_where_nothing_can_be_written_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"settings\.json: cannot be written: Not a directory"):
        sample.run(options(tmp_path, output=str(tmp_path / "file" / "p.jsonl")), progress=False)
    (tmp_path / "p.jsonl.work").write_text("")
    with pytest.raises(UserError, match=r"settings\.json: cannot be written: File exists"):
        sample.run(options(tmp_path, output=str(tmp_path / "p.jsonl")), progress=False)
    with pytest.raises(UserError, match="is a folder; give a file"):
        (tmp_path / "folder.jsonl").mkdir()
        options(tmp_path, output=str(tmp_path / "folder.jsonl"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"settings\.json: cannot be written: No space left on device"):
        sample.run(options(tmp_path), progress=False)
    assert not any(options(tmp_path).work.iterdir())


def test_a_summary_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "pairs.jsonl"
    (Path(f"{output}.work") / "summary.json").mkdir(parents=True)
    arguments = ["--policy=builtin:tiny_reasoner", "--prompts=builtin:tasks", f"--output={output}", "--limit=2"]
    arguments += ["--samples=2", "--max_new_tokens=8", "--progress=false"]
    assert sample.main(arguments) == 2
    error = capsys.readouterr().err
    assert "summary.json: cannot be written: Is a directory. The rows are whole, in" in error and output.exists()


DAMAGED = ['{"date": "yesterday"}', '{"date": 3}', '{"weights": [1]}', '{"weights": {"a": [1]}}']


@pytest.mark.parametrize("content", DAMAGED)
def test_settings_of_another_type_are_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match=r"settings\.json: expected the settings .* the file is damaged; delete it if"):
        read_settings(tmp_path)
    for sound in ('{"date": null}', '{"date": "2026-01-02T03:04:05", "weights": {"a": "b"}}'):
        (tmp_path / "settings.json").write_text(sound)
        assert read_settings(tmp_path) == json.loads(sound)


def test_rows_do_not_take_the_place_of_their_prompts(tmp_path: Path) -> None:
    """Whatever the file is called: one name, another path to it, a second name of it."""
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "What is 1 + 1?"}])
    (tmp_path / "hard.jsonl").hardlink_to(prompts)
    (tmp_path / "soft.jsonl").symlink_to(prompts)
    for output in ("p.jsonl", "hard.jsonl", "soft.jsonl", f"../{tmp_path.name}/p.jsonl"):
        with pytest.raises(UserError, match="would overwrite the prompts"):
            options(tmp_path, prompts=str(prompts), output=str(tmp_path / output))
    options(tmp_path, prompts=str(prompts), output=str(tmp_path / "other.jsonl"))
