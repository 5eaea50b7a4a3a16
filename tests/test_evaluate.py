"""Models to figures: both modes on the tiny reasoner, from all that `--policy` takes, killed and gone on with."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from bvpo import evaluate, export, fit
from bvpo.alpaca_eval import AlpacaEval
from bvpo.benchmark import final_answer
from bvpo.engines import TransformersEngine
from bvpo.errors import UserError
from bvpo.evaluated_policy import find_policy
from bvpo.evaluation import Evaluation, run
from bvpo.evaluation_report import print_figures
from bvpo.journal import Journal
from bvpo.policy import BUILTIN
from bvpo.tasks import Question, is_correct
from bvpo.traces import FORMATS, MODES, Mode
from tests.conftest import write_rows
from tests.test_sample import in_child

ROOT = Path(__file__).parent.parent
ARGUMENTS = {
    "--policy": "builtin:tiny_reasoner",
    "--tasks": "builtin",
    "--limit": "8",
    "--samples": "3",
    "--temperature": "0.8",
    "--top_p": "1",
    "--max_new_tokens": "160",
    "--backend.block": "2",
    "--progress": "false",
}


def command(output: Path, **options: str) -> list[str]:
    given = ARGUMENTS | {"--output": str(output)} | {f"--{name}": value for name, value in options.items()}
    return [f"{name}={value}" for name, value in given.items()]


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text(), parse_constant=pytest.fail)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_class(path: str, **options: Any) -> str:
    return json.dumps([{"class_path": path, "init_args": options}])


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small files of every form. The tiny reasoner knows sums."""
    folder = tmp_path_factory.mktemp("questions")
    sums = [(f"What is {a} + {b}?", str(a + b)) for a, b in [(2, 3), (4, 3), (6, 1)]]
    return {
        "maths": write_rows(folder / "maths.jsonl", [{"problem": q, "answer": a} for q, a in sums]),
        "alpaca_eval": write_rows(folder / "alpaca.jsonl", [{"instruction": q} for q, _ in sums]),
        "arena_hard": write_rows(folder / "arena.jsonl", [{"uid": q, "prompt": q} for q, _ in sums]),
    }


@pytest.fixture(scope="module")
def tasks(questions: dict[str, Path]) -> str:
    """One benchmark of every kind."""
    names = {"alpaca_eval": "bvpo.alpaca_eval.AlpacaEval", "arena_hard": "bvpo.arena_hard.ArenaHard"}
    own: list[Any] = ["builtin"]
    maths = {"name": "sums", "source": str(questions["maths"]), "workers": 1}
    own.append({"class_path": "bvpo.maths.Maths", "init_args": maths})
    own += [{"class_path": path, "init_args": {"source": str(questions[name])}} for name, path in names.items()]
    return json.dumps(own)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tasks: str) -> Path:
    """The output of an uninterrupted evaluation."""
    output = tmp_path_factory.mktemp("evaluated") / "whole"
    assert evaluate.main(command(output, tasks=tasks)) == 0
    return output


def files(output: Path) -> dict[str, bytes]:
    """What a user reads, with the folder's own name taken out of the judges' commands."""
    found = [path for path in output.rglob("*") if path.is_file() and "responses.jsonl.work" not in path.parts]
    return {str(path.relative_to(output)): path.read_bytes().replace(str(output).encode(), b"") for path in found}


# ---------------------------------------------------------------------- what is found


def test_figures_are_those_of_the_responses(whole: Path) -> None:
    """Recounted from the responses, in both modes."""
    found = results(whole)
    assert found["tasks"].keys() == {"builtin", "sums", "alpaca_eval", "arena_hard"}
    for mode in MODES:
        own = [line for line in lines(whole / "builtin" / "responses.jsonl") if line["mode"] == mode]
        assert len(own) == 8 * 3
        for line in own:
            right = line["answer"] is not None and is_correct(Question("", "", line["gold"]), line["answer"])
            assert line["correct"] is right and "<think>" not in (line["answer"] or "")
        figures = found["tasks"]["builtin"][mode]
        assert figures["average"]["mean"] == pytest.approx(sum(line["correct"] for line in own) / 24)
        assert figures["pass_at"].keys() == {"1", "2", "3"}
        passed = {line["question"] for line in own if line["correct"]}
        assert figures["pass_at"]["3"]["mean"] == pytest.approx(len(passed) / 8)
        assert figures["tokens"]["mean"] == pytest.approx(sum(line["n_tokens"] for line in own) / 24)
        assert 0 < figures["average"]["mean"] < 1 and figures["truncated"] == 0
    thinking = found["tasks"]["builtin"]["thinking"]
    assert thinking["tokens"]["mean"] > 2 * thinking["answer_tokens"]["mean"]


def test_judged_benchmarks_have_one_answer_to_each_question_in_each_mode(whole: Path) -> None:
    for mode in MODES:
        outputs = json.loads((whole / "alpaca_eval" / f"{mode}.json").read_text())
        answers = lines(whole / "arena_hard" / "model_answer" / f"tiny_reasoner-{mode}.jsonl")
        assert len(outputs) == len(answers) == 3
        assert {row["generator"] for row in outputs} == {row["model"] for row in answers} == {f"tiny_reasoner-{mode}"}
        texts = [row["output"] for row in outputs] + [row["messages"][-1]["content"]["answer"] for row in answers]
        assert all(texts) and not any(tag in text for text in texts for tag in ("<think>", "</think>", "<|im_end|>"))
        figures = results(whole)["tasks"]["arena_hard"][mode]
        assert figures["average"] is None and "gen_judgment.py" in figures["judge"]


def test_the_table_tells_what_was_truncated(tmp_path: Path, tasks: str, capsys: pytest.CaptureFixture[str]) -> None:
    """30 tokens cut most traces: such responses are wrong, are no answers, and are counted everywhere."""
    assert evaluate.main(command(tmp_path / "cut", tasks=tasks, max_new_tokens="30", modes="thinking")) == 0
    shown, found = capsys.readouterr().out, results(tmp_path / "cut")["tasks"]
    assert "truncated" in shown and "by a judge" in shown and "alpaca_eval --model_outputs" in shown
    for name in found:
        own = lines(tmp_path / "cut" / name / "responses.jsonl")
        cut = [line for line in own if line["finish_reason"] == "length"]
        assert found[name]["thinking"]["truncated"] == pytest.approx(len(cut) / len(own)) and len(cut) > len(own) / 2
        assert f"{100 * len(cut) / len(own):.1f}" in shown
        assert all(line["answer"] is None and not line.get("correct") for line in cut)
        assert "no_thinking" not in found[name]
    outputs = json.loads((tmp_path / "cut" / "alpaca_eval" / "thinking.json").read_text())
    assert [row["output"] for row in outputs if row["unfinished"]] == [""] * sum(row["unfinished"] for row in outputs)


@pytest.mark.parametrize(
    ("completion", "mode", "reason", "expected"),
    [
        ("<think>\n\\boxed{5}\n</think>\n\nIt is 4.", "thinking", "stop", "It is 4."),
        ("\\boxed{5}\n</think>\n\nIt is 4.", "thinking", "stop", "It is 4."),  # the prompt opened the block
        ("<think>\nIt is \\boxed{5}", "thinking", "stop", None),
        ("<think>\n5\n</think>\n\nIt is", "thinking", "length", None),
        ("<think>\nIt is \\boxed{5}", "thinking", "length", None),
        (" It is 4.\n", "no_thinking", "stop", "It is 4."),
        ("It is", "no_thinking", "length", None),
        ("\n<think>\n5\n</think>\n\nIt is 4.", "no_thinking", "stop", "It is 4."),  # thought all the same
        ("<think>\n5", "no_thinking", "stop", None),
        ("5 it is.\n</think>\n\nIt is 4.", "no_thinking", "stop", "It is 4."),  # closed what it had not opened
        ("So <think>\n5\n</think>\n\nIt is 4.", "no_thinking", "stop", "It is 4."),
        ("5 it is.\n</think>", "no_thinking", "stop", ""),
        ("The tag <think> opens.", "no_thinking", "stop", "The tag <think> opens."),
    ],
)
def test_only_finished_responses_have_answers(completion: str, mode: Mode, reason: str, expected: str | None) -> None:
    for think in FORMATS.values():
        assert final_answer(completion, mode, reason, think) == expected


def test_a_model_is_loaded_once_for_all_benchmarks(
    tmp_path: Path, questions: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start = TransformersEngine.start

    def counted(self: TransformersEngine, policy: str) -> Any:
        started.append(policy)
        return start(self, policy)

    monkeypatch.setattr(TransformersEngine, "start", counted)
    own: list[Any] = ["builtin", AlpacaEval(str(questions["alpaca_eval"]))]
    options = Evaluation("builtin:tiny_reasoner", own, str(tmp_path / "out"), limit=2, max_new_tokens=160)
    run(options, progress=False)
    assert started == ["builtin:tiny_reasoner"]
    run(options, progress=False)  # nothing is left to generate
    assert len(started) == 1
    settings = json.loads((tmp_path / "out" / "builtin" / "responses.jsonl.work" / "settings.json").read_text())
    assert settings["backend"] == options.backend.identity  # not what shares it


def test_a_raised_limit_goes_on(tmp_path: Path) -> None:
    def at(name: str, limit: int) -> dict[str, bytes]:
        output = tmp_path / name
        options = Evaluation("builtin:tiny_reasoner", ["builtin"], str(output), limit=limit, max_new_tokens=160)
        run(options, progress=False)
        return {path: (output / path).read_bytes() for path in ("results.json", "builtin/responses.jsonl")}

    at("raised", 2)
    assert at("raised", 3) == at("at once", 3)


# ---------------------------------------------------------------------- from all that --policy takes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one step of the default fit."""
    root = tmp_path_factory.mktemp("runs")
    (root / "short.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [], "max_steps": 1}}))
    options = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={root}"]
    assert fit.main([f"--config={ROOT / 'experiments/alpaca.yaml'}", f"--config={root / 'short.yaml'}", *options]) == 0
    return root / "version_0"


def test_a_run_folder_is_its_last_checkpoint(trained: Path, tmp_path: Path) -> None:
    """The same answers as from the folder that bvpo.export makes, and others than the untrained policy's."""
    assert evaluate.main(command(tmp_path / "run", policy=str(trained))) == 0
    assert export.main([str(trained), str(tmp_path / "exported")]) == 0
    assert evaluate.main(command(tmp_path / "folder", policy=str(tmp_path / "exported"))) == 0
    assert evaluate.main(command(tmp_path / "start", policy=str(BUILTIN["builtin:tiny_reasoner"]))) == 0
    texts = {
        name: [line["text"] for line in lines(tmp_path / name / "builtin" / "responses.jsonl")]
        for name in ("run", "folder", "start")
    }
    assert texts["run"] == texts["folder"] != texts["start"]
    found = results(tmp_path / "run")["settings"]
    assert found["name"] == "version_0-step_1" and found["checkpoint"]["step"] == 1


def test_another_checkpoint_of_the_run_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run has gone on since: answers of two checkpoints do not mix."""
    copy = tmp_path / "version_0"
    shutil.copytree(trained, copy)
    assert evaluate.main(command(tmp_path / "out", policy=str(copy), limit="2")) == 0
    more = ["--ckpt_path=last", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]
    configs = [f"--config={ROOT / 'experiments/alpaca.yaml'}", f"--config={trained.parent / 'short.yaml'}"]
    assert fit.main([*configs, *more, f"--trainer.default_root_dir={tmp_path}"]) == 0
    capsys.readouterr()
    assert evaluate.main(command(tmp_path / "out", policy=str(copy), limit="2")) == 2
    error = capsys.readouterr().err
    assert "holds answers of" in error and "at step 1" in error and "give another output" in error
    checkpoint = copy / "checkpoints" / "last.ckpt"
    assert evaluate.main(command(tmp_path / "new", policy=str(checkpoint), limit="2")) == 0
    assert results(tmp_path / "new")["settings"]["name"] == "version_0-step_2"


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a run is that was killed before its first one."""
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "config.yaml").write_text("{}")
    error = one_error(command(tmp_path / "out", policy=str(tmp_path / "version_0")), capsys)
    assert "checkpoints/last.ckpt: there is no such checkpoint; give a run folder or a checkpoint file" in error


# ---------------------------------------------------------------------- killed and started again


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_evaluation_goes_on_and_finds_the_same(whole: Path, tmp_path: Path, tasks: str, seed: int) -> None:
    """SIGKILL in the middle of writing a record, anywhere in its line; three times, then to the end."""
    rng, output = random.Random(seed), tmp_path / "out"
    for _ in range(3):
        left, append = rng.randrange(30), Journal.append

        def killed(journal: Journal, record: dict[str, Any], append: Any = append) -> None:
            nonlocal left
            if not left:
                line = json.dumps(record).encode()
                journal._file.write(line[: rng.randrange(len(line) + 1)])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            append(journal, record)

        def work() -> None:
            Journal.append = killed  # type: ignore[method-assign]
            evaluate.main(command(output, tasks=tasks))

        assert os.WIFSIGNALED(in_child(work))
    assert evaluate.main(command(output, tasks=tasks)) == 0
    found, expected = files(output), files(whole)
    assert found.keys() == expected.keys()
    for name in found:
        if name.startswith("arena_hard/model_answer/"):  # they tell when sampling began
            assert _without_time(found[name]) == _without_time(expected[name])
        else:
            assert found[name] == expected[name], name


def _without_time(content: bytes) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k != "tstamp"} for line in content.splitlines()]


def test_started_again_it_writes_the_same_bytes(tmp_path: Path, tasks: str) -> None:
    output = tmp_path / "out"
    assert evaluate.main(command(output, tasks=tasks, limit="2")) == 0
    before = files(output)
    assert evaluate.main(command(output, tasks=tasks, limit="2")) == 0
    assert files(output) == before


@pytest.mark.slow
def test_the_command_killed_at_random_moments(whole: Path, tmp_path: Path, tasks: str) -> None:
    """Real processes, killed after random times from their start, until one comes to its end."""
    rng, output = random.Random(0), tmp_path / "out"
    for kills in range(7):
        process = subprocess.Popen(
            [sys.executable, "-m", "bvpo.evaluate", *command(output, tasks=tasks)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=rng.uniform(4, 20) if kills < 6 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert process.returncode == 0
    assert (output / "builtin/responses.jsonl").read_bytes() == (whole / "builtin/responses.jsonl").read_bytes()
    assert results(output)["tasks"]["sums"] == results(whole)["tasks"]["sums"]


def test_other_settings_are_refused_and_more_samples_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert evaluate.main(command(output, samples="1", limit="2", modes="[no_thinking]")) == 0
    assert evaluate.main(command(output, samples="1", limit="2", temperature="0.7")) == 2
    assert "temperature was 0.8, is 0.7" in capsys.readouterr().err
    before = {line["text"] for line in lines(output / "builtin" / "responses.jsonl")}
    assert evaluate.main(command(output, samples="2", limit="2")) == 0
    after = lines(output / "builtin" / "responses.jsonl")
    assert len(after) == 8 and before <= {line["text"] for line in after}


def test_another_start_keeps_what_the_first_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other tasks and modes of the same settings are joined; what other settings replace is said."""
    own, output = "[{class_path: bvpo.held_out.HeldOut, init_args: {name: own, seed: 1}}]", tmp_path / "out"
    both = f"[builtin, {own[1:]}"
    assert evaluate.main(command(tmp_path / "at once", limit="2", tasks=both)) == 0
    assert evaluate.main(command(output, limit="2", modes="no_thinking")) == 0
    capsys.readouterr()
    assert evaluate.main(command(output, limit="2", modes="thinking", tasks=own)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "results.json keeps what earlier starts with these settings found: builtin" in shown
    assert {name: list(modes) for name, modes in results(output)["tasks"].items()} == {
        "builtin": ["no_thinking"],
        "own": ["thinking"],
    }
    assert evaluate.main(command(output, limit="2", modes="thinking")) == 0
    assert evaluate.main(command(output, limit="2", modes="no_thinking", tasks=own)) == 0
    found, expected = files(output), files(tmp_path / "at once")
    assert found == expected
    capsys.readouterr()
    assert evaluate.main(command(output, limit="2", samples="4", modes="thinking")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no longer has what an earlier start found: own, builtin (no_thinking). samples was 3, is 4" in shown
    assert results(output)["tasks"].keys() == {"builtin"} and len(lines(output / "own" / "responses.jsonl")) == 12


def test_damaged_results_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "results.json").write_text('{"settings"')
    error = one_error(command(output, limit="1", samples="1"), capsys)
    assert "results.json: expected the figures of an earlier start: the file is damaged; move it away" in error
    assert (output / "results.json").read_text() == '{"settings"'


@pytest.mark.parametrize(
    "content",
    [
        '{"settings": 1, "tasks": 2, "versions": 3}',
        '{"settings": {}, "tasks": {"builtin": [1]}, "versions": {}}',
        '{"settings": {"tasks": [{}]}, "tasks": {"builtin": [1]}, "versions": {}}',
        '{"settings": {"tasks": []}, "tasks": {"builtin": {}}, "versions": {}}',
    ],
)
def test_results_of_another_form_are_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "results.json").write_text(content)
    error = one_error(command(tmp_path, limit="1", samples="1"), capsys)
    assert "results.json: expected the figures of an earlier start" in error
    assert (tmp_path / "results.json").read_text() == content


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"path": "x"}', '{"path": "x", "step": [], "content": ""}']
)
def test_a_damaged_note_of_the_checkpoint_is_named(trained: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "policy.json").write_text(content)
    with pytest.raises(UserError, match=r"policy\.json: expected which checkpoint .* the file is damaged; delete both"):
        find_policy(str(trained), str(tmp_path))


def test_a_note_is_made_again(trained: Path, tmp_path: Path) -> None:
    found = find_policy(str(trained), str(tmp_path))
    (tmp_path / "policy.json").unlink()
    shutil.rmtree(tmp_path / "policy")
    assert find_policy(str(trained), str(tmp_path)) == found


# ---------------------------------------------------------------------- the command line

BAD: dict[str, tuple[dict[str, str], str]] = {
    "no task": ({"tasks": "[aime26]"}, "there is no task 'aime26'; give builtin, aime24, aime25, amc23, minerva,"),
    "a task twice": ({"tasks": "[builtin, builtin]"}, "each with a name of its own"),
    "no tasks": ({"tasks": "[]"}, "expected one or more"),
    "no model": ({"policy": "./none"}, "there is no such folder"),
    "no checkpoint": ({"policy": "none.ckpt"}, "none.ckpt: there is no such checkpoint"),
    "samples": ({"samples": "0"}, "samples must be ≥ 1"),
    "limit": ({"limit": "0"}, "limit must be ≥ 1"),
    "modes": ({"modes": "[thinking, thinking]"}, "modes must be one or both of thinking, no_thinking"),
    "temperature": ({"temperature": "-1"}, "temperature must be ≥ 0"),
    "name": ({"name": "a/b"}, "give one without a slash"),
    "think": ({"think": "none"}, "there is no think format 'none'"),
    "max_new_tokens": ({"max_new_tokens": "100000"}, "positions for question and response together: give fewer"),
    "no file": ({"tasks": of_class("bvpo.maths.Maths", name="a", source="none.jsonl")}, "there is no such file"),
    "the Hub": ({"tasks": "[math500]"}, "HuggingFaceH4/MATH-500:test: the Hub cannot be reached"),
}


def one_error(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and "Traceback" not in error
    return error


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_end_with_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, expected = BAD[case]
    assert expected in one_error(command(tmp_path / "out", **given), capsys)


MALFORMED = {
    "bvpo.maths.Maths": ('{"problem": "Q"}\n', "row 1: field answer: expected the right answer"),
    "bvpo.alpaca_eval.AlpacaEval": (
        '{"instruction": "Q"}\n{"output": "A"}\n',
        "row 2: field instruction: expected text",
    ),
    "bvpo.arena_hard.ArenaHard": ('{"uid": "a", "prompt": "Q"}\n{"uid"', "row 2: expected one JSON object on the line"),
}


@pytest.mark.parametrize("path", MALFORMED)
def test_malformed_files_end_with_one_line(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = MALFORMED[path]
    source = tmp_path / "own.jsonl"
    source.write_text(content)
    own = {"source": str(source)} | ({"name": "own"} if path.endswith("Maths") else {})
    error = one_error(command(tmp_path / "out", tasks=of_class(path, **own)), capsys)
    assert f"error: {source}" in error and expected in error


def test_questions_are_all_read_before_the_first_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = json.dumps(["builtin", *json.loads(of_class("bvpo.maths.Maths", name="a", source="none.jsonl"))])
    one_error(command(tmp_path / "out", tasks=own), capsys)
    assert not (tmp_path / "out").exists()


def test_a_question_that_is_too_long_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "own.jsonl", [{"instruction": "a"}, {"instruction": "a " * 1000}])
    tasks = of_class("bvpo.alpaca_eval.AlpacaEval", source=str(source))
    error = one_error(command(tmp_path / "out", tasks=tasks), capsys)
    assert "alpaca_eval: 1 of 2 questions leave fewer than max_new_tokens 160" in error


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "file/builtin/prompts.jsonl: cannot be written" in one_error(command(tmp_path / "file"), capsys)


def test_interrupted_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupt)
    assert evaluate.main(command(tmp_path / "out", limit="2")) == 130
    assert "goes on from there" in capsys.readouterr().err


def test_a_long_name_is_folded_and_no_figure_cut(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from bvpo.benchmark_scores import Estimate, Figures

    half, name = Estimate(0.5, 0.123), "my_own_[b]benchmark[/b]_of_questions_from_the_last_examination"
    own = Figures(1000, 64, 1.0, 0.1, Estimate(32768.0, 1.0), half, half, {64: half}, {})
    print_figures({name: {"no_thinking": own}}, {}, Console(width=80))
    *lines, note = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    table = "\n".join(lines)
    for text in ("no_thinking", "1000 × 64", "50.0 ± 12.3", " 50.0 ", "100.0", "32768", "…"):
        assert (text in table) is (text != "…")
    folded = "".join(line.split("no_thinking")[0].strip() for line in lines)
    assert name in folded and note.startswith(f"{name}, no_thinking: 10.0%")


def test_the_table_is_narrow(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """80 columns hold it, for the longest names and figures there are."""
    from rich.console import Console

    from bvpo.benchmark_scores import Estimate, Figures

    half = Estimate(0.5, 0.123)
    own = Figures(1000, 64, 1.0, 0.1, Estimate(32768.0, 1.0), half, half, {64: half}, {"time was up": 3})
    print_figures({"olympiadbench": {"no_thinking": own}}, {}, Console(width=80))
    shown = capsys.readouterr().out
    for text in ("olympiadbench", "no_thinking", "1000 × 64", "50.0 ± 12.3", "100.0", "32768", "…"):
        assert (text in shown) is (text != "…")
    assert "10.0% of the responses ended inside their trace" in shown and "3 answers count as wrong" in shown
