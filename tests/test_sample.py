"""Prompts to rows: what is written, and that nothing is lost or doubled however often a run is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from bvpo import sample
from bvpo.errors import UserError
from bvpo.generation import Completion
from bvpo.journal import Journal
from bvpo.pairs import load_rows, tokenize_rows
from bvpo.policy import load_tokenizer
from bvpo.sampled_rows import SampledRows
from bvpo.sampler import Sampler
from bvpo.sampling import Sampling
from bvpo.selection import RowOptions
from bvpo.tasks import draw_questions, is_correct
from bvpo.traces import split
from tests.conftest import write_rows

PROMPTS = 12
ARGUMENTS = {
    "--policy": "builtin:tiny_reasoner",
    "--prompts": "builtin:tasks",
    "--limit": str(PROMPTS),
    "--max_new_tokens": "160",
    "--samples": "4",
    "--anchor_traces": "2",
    "--backend.block": "2",
    "--progress": "false",
}


def command(output: Path, **options: str) -> list[str]:
    given = ARGUMENTS | {"--output": str(output)} | {f"--{name}": value for name, value in options.items()}
    return [f"{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of an uninterrupted run."""
    output = tmp_path_factory.mktemp("sampled") / "pairs.jsonl"
    assert sample.main(command(output)) == 0
    return output


def records(output: Path) -> list[dict[str, Any]]:
    return [record for path in sorted(Path(f"{output}.work").glob("responses*.jsonl")) for record in read(path)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_rows_are_what_was_sampled_and_scored(whole: Path) -> None:
    """Chosen answers are right and rejected ones wrong; completions are verbatim responses, in ids as in text."""
    questions = {f"task-{k:05d}": q for k, q in enumerate(draw_questions(PROMPTS, 1, "train"))}
    sampled = {record["text"]: record for record in records(whole)}
    rows = read(whole)
    assert 0 < len(rows) < PROMPTS
    for row in rows:
        question = questions[row["prompt_id"]]
        assert row["conversation"] == [{"role": "user", "content": question.instruction}]
        for side, right in (("chosen", True), ("rejected", False)):
            body = row[side].removesuffix("<|im_end|>")
            assert is_correct(question, split(body).answer) is right
            assert is_correct(question, row[f"empty_{side}"].removesuffix("<|im_end|>")) is right
            assert sampled[row[side]]["same_ids"] and sampled[row[f"empty_{side}"]]["same_ids"]
        assert len(row["trace_candidates"]) == len(row["empty_candidates"]) == 4
        assert all(len(c["answer"]) and c["logprob"] < 0 for c in row["trace_candidates"])
        assert len(row["anchor_traces"]) == 2
    tokenizer = load_tokenizer("builtin:tiny_reasoner")
    tokenized = tokenize_rows(load_rows(str(whole)), tokenizer, str(whole), RowOptions(anchors=True))
    assert len(tokenized) == len(rows)


def test_an_anchor_trace_has_the_probability_it_was_drawn_with(whole: Path) -> None:
    """log q up to the close tag, by a plain forward at the sampling temperature."""
    import torch

    from bvpo.pairs import encode_completion, encode_prompt
    from bvpo.policy import load_policy

    row = read(whole)[0]
    tokenizer, model = load_tokenizer("builtin:tiny_reasoner"), load_policy("builtin:tiny_reasoner")
    prompt = encode_prompt(tokenizer, row["prompt"])
    for anchor in row["anchor_traces"]:
        ids = encode_completion(tokenizer, f"<think>{anchor['trace']}</think>")
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logps = (logits.double() / 0.8).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        assert anchor["logprob"] == pytest.approx(float(logps.sum()), abs=1e-4)  # float32 logits, some 50 tokens


def test_jsonl_and_parquet_hold_the_same_rows(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs.parquet"
    Path(f"{whole}.work").rename(f"{output}.work")
    try:
        assert sample.main(command(output, stage="pairs")) == 0
    finally:
        Path(f"{output}.work").rename(f"{whole}.work")
    assert datasets.Dataset.from_parquet(str(output)).to_list() == read(whole)


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process and return its exit status: the models need not be loaded anew for each death."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))])
def test_a_run_killed_at_any_moment_goes_on(whole: Path, tmp_path: Path, seed: int) -> None:
    """SIGKILL in the middle of writing a response, anywhere in its line; three times, then to the end."""
    rng, output = random.Random(seed), tmp_path / "pairs.jsonl"
    for _ in range(3):
        left, append = rng.randrange(50), Journal.append

        def killed(journal: Journal, record: dict[str, Any], append: Any = append) -> None:
            nonlocal left
            if not left:
                line = json.dumps(record).encode()
                journal._file.write(line[: rng.randrange(len(line) + 1)])
                journal._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            append(journal, record)

        def work() -> None:
            Journal.append = killed  # type: ignore[method-assign]
            sample.main(command(output))

        in_child(work)
    assert sample.main(command(output)) == 0
    keys = [(r["prompt"], r["kind"], r["number"]) for r in records(output)]
    assert len(keys) == len(set(keys)) == PROMPTS * (4 + 4) + 2 * len(read(whole))
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_the_command_killed_at_ten_random_moments(whole: Path, tmp_path: Path) -> None:
    """Real processes, killed after random times from their start, until one comes to its end."""
    rng, output, kills = random.Random(0), tmp_path / "pairs.jsonl", 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "bvpo.sample", *command(output)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=rng.uniform(3, 20) if kills < 10 else None)
            if kills >= 10:
                break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        kills += 1
    assert process.returncode == 0 and output.read_bytes() == whole.read_bytes()


def test_shards_give_the_file_of_one_machine(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "pairs.jsonl"
    for shard in ("2/3", "1/3"):
        assert sample.main(command(output, shard=shard)) == 0
    assert not output.exists()
    assert sample.main(command(output, stage="pairs")) == 2
    assert "32 responses are missing (the first to prompt task-00008)" in capsys.readouterr().err
    assert sample.main(command(output, shard="3/3")) == 0
    assert sample.main(command(output, stage="pairs")) == 0
    assert output.read_bytes() == whole.read_bytes()
    names = sorted(path.name for path in Path(f"{output}.work").iterdir())
    assert "responses.2-of-3.jsonl" in names and "scores.3-of-3.jsonl" in names


def test_stages_run_apart(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    for stage in ("generate", "score", "anchors", "pairs"):
        assert not output.exists()
        assert sample.main(command(output, stage=stage)) == 0
    assert output.read_bytes() == whole.read_bytes()


def test_other_settings_are_refused_and_more_samples_are_not(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pairs.jsonl"
    assert sample.main(command(output, samples="2", limit="3", anchor_traces="0")) == 0
    assert sample.main(command(output, samples="2", limit="3", anchor_traces="0", temperature="0.7")) == 2
    assert "temperature was 0.8, is 0.7" in capsys.readouterr().err
    before = {record["text"] for record in records(output)}
    assert sample.main(command(output, samples="3", limit="3", anchor_traces="0")) == 0
    assert len(records(output)) == 18 and before <= {record["text"] for record in records(output)}


def test_what_cannot_enter_a_pair_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """30 tokens leave many traces unfinished; they are kept as candidates, without a score."""
    output = tmp_path / "pairs.jsonl"
    assert sample.main(command(output, max_new_tokens="30", one_sided="true", anchor_traces="4")) == 0
    shown = capsys.readouterr().out
    assert "responses: cut" in shown and "anchor traces were not finished" in shown
    rows = read(output)
    cut = [c for row in rows for c in row["trace_candidates"] if c["finish_reason"] == "length"]
    assert cut and all(c["score"] is None for c in cut)
    assert any(row["chosen"] is None for row in rows)  # one_sided
    for row in rows:
        assert all(text is None or text.endswith("<|im_end|>") for text in (row["chosen"], row["empty_rejected"]))
    counts = json.loads(Path(f"{output}.work/summary.json").read_text())
    assert counts["modes"]["thinking"]["problems"]["cut"] > 0 and counts["rows"] == len(rows)


def test_a_sample_without_a_row_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tokens are too few for any answer."""
    assert sample.main(command(tmp_path / "pairs.jsonl", max_new_tokens="2", limit="3", anchor_traces="0")) == 0
    shown = capsys.readouterr().out
    assert "nothing can be trained on this" in shown and "--max_new_tokens" in shown and "look first" not in shown


def test_pairs_of_corrupted_traces(tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    assert sample.main(command(output, pairs="bvpo.pairing.CorruptedDigits", limit="20", samples="3")) == 0
    rows = read(output)
    assert rows
    for row in rows:
        chosen, rejected = split(row["chosen"]), split(row["rejected"])
        assert chosen.answer == rejected.answer and chosen.trace != rejected.trace
        assert len(chosen.trace) == len(rejected.trace)


BAD: dict[str, tuple[dict[str, str], str]] = {
    "no prompts file": ({"prompts": "none.jsonl"}, "none.jsonl: there is no such file"),
    "no model": ({"policy": "./none"}, "there is no such folder"),
    "output": ({"output": "pairs.csv"}, "ends in .jsonl or .parquet"),
    "samples": ({"samples": "0"}, "samples must be ≥ 1"),
    "temperature": ({"temperature": "-1"}, "temperature must be ≥ 0"),
    "shard": ({"shard": "3/2"}, "expected i/n"),
    "shard and rows": ({"shard": "1/2", "stage": "pairs"}, "without a shard"),
    "reward": ({"reward": "builtin:none"}, "there is no built-in reward"),
    "think": ({"think": "none"}, "there is no think format 'none'"),
    "prompts too long": ({"max_prompt_tokens": "3"}, "all 12 prompts are too long"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_end_with_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, expected = BAD[case]
    assert sample.main([*command(tmp_path / "pairs.jsonl"), *(f"--{k}={v}" for k, v in given.items())]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and expected in error and "\n" not in error


def test_too_long_prompts_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = ["Count e: e a b.", "a " * 1000, "What is 3 plus 4?"]
    source = write_rows(tmp_path / "prompts.jsonl", [{"instruction": c, "answer": "7"} for c in contents])
    output = tmp_path / "pairs.jsonl"
    assert sample.main(command(output, prompts=str(source), limit="9", anchor_traces="0")) == 0
    assert "1 of 3 prompts are too long" in capsys.readouterr().out


def test_a_full_disk_is_said_and_nothing_is_lost(whole: Path, tmp_path: Path) -> None:
    """No file may grow beyond 8 kB in a child; the next start goes on from what is whole."""
    import resource

    output = tmp_path / "pairs.jsonl"

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        with (tmp_path / "error.txt").open("w") as sys.stderr:
            code = sample.main(command(output))
        os._exit(code)

    assert os.waitstatus_to_exitcode(in_child(work)) == 2
    assert "cannot be written: File too large" in (tmp_path / "error.txt").read_text()
    assert sample.main(command(output)) == 0
    assert output.read_bytes() == whole.read_bytes()


def test_an_engine_is_not_started_where_nothing_is_left(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Sampling(
        "builtin:tiny_reasoner",
        "builtin:tasks",
        str(whole),
        samples=4,
        anchor_traces=2,
        limit=PROMPTS,
        max_new_tokens=160,
    )
    monkeypatch.setattr(type(options.backend), "start", lambda *_: pytest.fail("started"))
    sampler = Sampler(options, progress=False)
    with sampler.journal() as journal:
        sampler.generate(journal)
        SampledRows(sampler, journal).draw_anchors()


def test_anchor_traces_need_a_close_tag_of_one_token(llama_folder: Path, tmp_path: Path) -> None:
    think = {"open": "<a>", "close": "w1 w2", "empty": "<a> w1 w2"}
    assert Completion([1], "stop").logprob is None
    with pytest.raises(UserError, match="no chat template"):
        from bvpo.traces import ThinkFormat

        source = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "w1"}])
        Sampler(Sampling(str(llama_folder), str(source), str(tmp_path / "a.jsonl"), think=ThinkFormat(**think)))
