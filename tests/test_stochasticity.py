"""How responses vary: figures by hand, intervals that cover, log π against a plain loop, responses that are shared."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from bvpo import stochasticity
from bvpo.engines import TransformersEngine
from bvpo.errors import UserError
from bvpo.pairs import encode_completion
from bvpo.policy import load_policy
from bvpo.response_variance import QUANTITIES, Bootstrap, Draw, compare, prompt_moments, ratio_of_means
from bvpo.sampler import Sampler
from bvpo.sampling import Sampling
from bvpo.stochasticity import Study, main, read_draws, run
from bvpo.traces import MODES, Mode

ROOT = Path(__file__).parent.parent
FEW = Bootstrap(resamples=500)
KEYS = ("logprob_variance", "length_variance", "length", "nll_per_token", "nll_per_token_of_responses")


def both(thinking: Sequence[Draw], no_thinking: Sequence[Draw]) -> Mapping[Mode, Sequence[Draw]]:
    return {"thinking": thinking, "no_thinking": no_thinking}


# --- Figures ----------------------------------------------------------------------------------------------------------


def test_two_prompts_by_hand() -> None:
    """s² of two numbers is half their squared difference."""
    draws = {
        # s²(L) 8 and 2, s²(N) 32 and 2, mean N 6 and 3, mean −L 6 and 3
        "a": both([Draw(-4, -2, 2), Draw(-8, -4, 10)], [Draw(-2, -1, 2), Draw(-4, -1, 4)]),
        # s²(L) 2 and 8, s²(N) 2 and 8, mean N 5 and 4, mean −L 5 and 3
        "b": both([Draw(-4, -4, 4), Draw(-6, -4, 6)], [Draw(-1, 0, 2), Draw(-5, -2, 6)]),
    }
    found = compare(draws, FEW).comparisons
    assert (found["logprob_variance"].thinking, found["logprob_variance"].no_thinking) == (5, 5)
    assert found["logprob_variance"].ratio == 1  # and the mean of the prompts' ratios, 4 and 1/4, is not
    assert found["logprob_variance"].median == (4 + 1 / 4) / 2
    assert found["drawn_logprob_variance"].ratio == (2 + 0) / (0 + 2)
    assert found["length_variance"].ratio == (32 + 2) / (2 + 8)
    assert found["length"].ratio == (6 + 5) / (3 + 4)
    assert found["nll_per_token"].thinking == (6 + 5) / (6 + 5)
    assert found["nll_per_token"].no_thinking == (3 + 3) / (3 + 4)
    of_responses = [(4 / 2 + 8 / 10) / 2, (4 / 4 + 6 / 6) / 2]
    assert found["nll_per_token_of_responses"].thinking == pytest.approx(sum(of_responses) / 2, rel=1e-15)


def test_moments_are_those_of_the_standard_library() -> None:
    rng = np.random.default_rng(0)
    draws = [
        Draw(float(x), float(x) / 2, int(n)) for x, n in zip(rng.normal(-50, 9, 7), rng.integers(1, 99, 7), strict=True)
    ]
    own = prompt_moments(draws)
    assert own["logprob_variance"] == pytest.approx(statistics.variance(d.logprob for d in draws))
    assert own["drawn_logprob_variance"] == pytest.approx(own["logprob_variance"] / 4)
    assert own["length_variance"] == pytest.approx(statistics.variance(d.tokens for d in draws))
    assert own["nll"] == pytest.approx(-statistics.mean(d.logprob for d in draws))


def test_what_has_no_ratio_has_none() -> None:
    """All answers alike: no variance to divide by. 0/0 leaves the median; x/0 stays in it, as infinity."""
    alike = [Draw(-1, None, 3)] * 3
    varied = [Draw(-1, None, 3), Draw(-3, None, 5)]
    found = compare({"a": both(varied, alike), "b": both(alike, alike)}, FEW).comparisons
    assert found["length_variance"].thinking == 1 and found["length_variance"].no_thinking == 0
    assert found["length_variance"].ratio is None and found["length_variance"].interval is None
    assert found["length_variance"].median is None and found["length_variance"].undefined == 1
    assert found["drawn_logprob_variance"].thinking is None  # a back end that tells no log-probability
    assert found["length"].ratio == 3.5 / 3


def test_an_empty_response_has_no_figure_a_token() -> None:
    """And leaves the others as they are."""
    some = [Draw(-1, -1, 2), Draw(-2, -2, 3)]
    with np.errstate(all="raise"):
        own = prompt_moments([Draw(0, 0, 0), *some])
    assert math.isnan(own["nll_per_token"]) and own["length"] == 5 / 3 and own["nll"] == 1
    found = compare({"a": both([Draw(0, 0, 0), *some], some), "b": both([Draw(0, 0, 0)] * 2, some)}, FEW).comparisons
    assert found["nll_per_token_of_responses"].thinking is None
    assert found["length"].ratio == (5 / 3 + 0) / (2.5 + 2.5)


def test_prompts_need_two_responses_in_both_modes() -> None:
    two, one = [Draw(-1, -1, 2), Draw(-2, -2, 3)], [Draw(-1, -1, 2)]
    figures = compare({"a": both(two, two), "b": both(two, one), "c": both([], two)}, FEW)
    assert (figures.prompts, figures.left_out) == (["a"], 2)
    assert figures.comparisons["length"].ratio == 1 and figures.comparisons["length"].interval is None
    with pytest.raises(UserError, match="none of 1 prompts has two responses in both modes"):
        compare({"b": both(two, one)}, FEW)


def test_intervals_are_seeded_and_grow_with_their_level() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.gamma(2, size=50), np.ones(50)]

    def ratio(a: Any, b: Any, axis: int = -1) -> Any:
        return a.mean(axis) / b.mean(axis)

    first, again = Bootstrap(seed=1).interval(ratio, parts), Bootstrap(seed=1).interval(ratio, parts)
    wide = Bootstrap(seed=1, level=0.99).interval(ratio, parts)
    assert first is not None and wide is not None
    assert first == again and wide[0] < first[0] < parts[0].mean() < first[1] < wide[1]
    assert first != Bootstrap(seed=2).interval(ratio, parts)


def test_intervals_cover_the_truth() -> None:
    """Prompts of very different variance, 5 draws each; the population's ratio of mean variances is 4.

    The percentile interval of a skewed ratio covers a little less than its nominal 95%: 93.0% of 600 other runs. Of 300
    runs the fraction has a standard error of 1.5%.
    """
    rng, inside, runs = np.random.default_rng(0), 0, 300
    for number in range(runs):
        scale = rng.gamma(2.0, size=(100, 1))  # of a prompt, in both modes
        a, c = ((sd * np.sqrt(scale) * rng.normal(size=(100, 5))).var(1, ddof=1) for sd in (2, 1))
        ones = np.ones(100)
        interval = Bootstrap(resamples=400, seed=number).interval(ratio_of_means, [a, ones, c, ones])
        assert interval is not None
        inside += interval[0] <= 4 <= interval[1]
    assert 0.89 <= inside / runs <= 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"level": 1.0}, r"level must be in \(0, 1\), got 1.0"), ({"resamples": 10}, "resamples must be ≥ 100, got 10")],
)
def test_an_interval_that_is_none_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Bootstrap(**arguments)


# --- Responses → log π ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Sampling:
    """Responses of the tiny reasoner at temperature 1."""
    options = Sampling(
        policy="builtin:tiny_reasoner",
        prompts="builtin:tasks",
        output=str(tmp_path_factory.mktemp("stochasticity") / "pairs.parquet"),
        samples=3,
        temperature=1.0,
        max_new_tokens=120,
        limit=8,
    )
    sampler = Sampler(options, progress=False)
    with sampler.journal() as journal:
        sampler.generate(journal)
    return options


@pytest.fixture
def copied(sampled: Sampling, tmp_path: Path) -> Sampling:
    """The same in a folder of its own."""
    options = replace(sampled, output=str(tmp_path / "pairs.parquet"))
    shutil.copytree(sampled.work, options.work)
    return options


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_log_pi_is_what_a_plain_loop_gives(copied: Sampling) -> None:
    """One response at a time, unpadded, log-softmax over all logits. fp32 sums of up to 120 terms: 1e-3 is loose."""
    sampler = Sampler(copied, progress=False)
    with sampler.journal() as journal:
        draws, _ = read_draws(sampler, journal, TransformersEngine(batch_size=5))
    model = load_policy(copied.policy).eval()
    records = {(r["prompt"], r["kind"], r["number"]): r for r in lines(copied.work / "responses.jsonl")}
    for prompt in sampler.prompts[:4]:
        for mode in MODES:
            for number, draw in enumerate(draws[prompt.id][mode]):
                start = sampler.prompt_ids(prompt, mode)
                completion = encode_completion(sampler.tokenizer, records[prompt.id, mode, number]["text"])
                with torch.no_grad():
                    logprobs = cast(Any, model)(torch.tensor([start + completion])).logits[0].log_softmax(-1)
                plain = sum(float(logprobs[len(start) - 1 + k, token]) for k, token in enumerate(completion))
                assert draw.logprob == pytest.approx(plain, abs=1e-3)
                assert draw.tokens == len(completion)


def test_at_temperature_1_log_pi_is_what_was_drawn_from(copied: Sampling) -> None:
    """Two ways to one number: summed while sampling, and in one forward pass over the whole response."""
    report = run(copied, Study(intervals=FEW), progress=False)
    for draw_moments in report.figures.moments.values():
        np.testing.assert_allclose(
            draw_moments["logprob_variance"], draw_moments["drawn_logprob_variance"], rtol=1e-3, atol=1e-3
        )
    found = report.figures.comparisons
    assert found["logprob_variance"].ratio == pytest.approx(found["drawn_logprob_variance"].ratio, rel=1e-3)


def test_below_temperature_1_it_is_not(sampled: Sampling, tmp_path: Path) -> None:
    """log q ≥ log π on average: the colder distribution puts more on what is drawn from it."""
    options = replace(sampled, temperature=0.5, output=str(tmp_path / "cold.parquet"), limit=4)
    sampler = Sampler(options, progress=False)
    with sampler.journal() as journal:
        sampler.generate(journal)
        draws, _ = read_draws(sampler, journal, TransformersEngine())
    flat = [draw for own in draws.values() for mode in MODES for draw in own[mode]]
    assert all(draw.drawn_logprob is not None for draw in flat)
    assert np.mean([cast(float, draw.drawn_logprob) - draw.logprob for draw in flat]) > 0.1


def test_what_is_there_is_not_made_again(copied: Sampling) -> None:
    """The second start only reads; more samples are added to those of before."""
    report = run(copied, Study(intervals=FEW), progress=False)
    stamps = {path.name: path.read_bytes() for path in copied.work.glob("*.jsonl")}
    assert set(stamps) == {"responses.jsonl", "logprobs_float32.jsonl"}
    again = run(copied, Study(intervals=FEW), generate=False, progress=False)
    assert again.figures.comparisons == report.figures.comparisons
    assert stamps == {path.name: path.read_bytes() for path in copied.work.glob("*.jsonl")}
    more = run(replace(copied, samples=4), Study(intervals=FEW), progress=False)
    assert more.responses == {"thinking": 32, "no_thinking": 32}
    for name, before in stamps.items():
        assert (copied.work / name).read_bytes().startswith(before)


def test_log_pi_that_was_lost_half_way_is_computed_again(copied: Sampling) -> None:
    report = run(copied, Study(intervals=FEW), progress=False)
    path = copied.work / "logprobs_float32.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = run(copied, Study(intervals=FEW), progress=False)
    for mode in MODES:  # in other batches: padded otherwise, so rounded otherwise
        for name, values in report.figures.moments[mode].items():
            np.testing.assert_allclose(again.figures.moments[mode][name], values, rtol=1e-3, atol=1e-3)


def test_responses_whose_ids_are_not_known_are_counted(copied: Sampling) -> None:
    path = copied.work / "responses.jsonl"
    records = lines(path)
    lost = next(r for r in records if r["kind"] == "thinking")
    lost["same_ids"] = False
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = run(copied, Study(intervals=FEW), progress=False)
    assert report.other_ids == {"thinking": 1, "no_thinking": 0}
    at = report.figures.prompts.index(lost["prompt"])
    assert report.figures.moments["thinking"]["responses"][at] == 2


def test_cut_responses_are_in_or_out(sampled: Sampling, tmp_path: Path) -> None:
    options = replace(sampled, max_new_tokens=55, output=str(tmp_path / "cut.parquet"))
    report = run(options, Study(intervals=FEW), progress=False)
    records = lines(options.work / "responses.jsonl")
    cut = {mode: sum(r["kind"] == mode and r["finish_reason"] == "length" for r in records) for mode in MODES}
    assert report.cut == cut and cut["thinking"] > 3
    assert report.figures.moments["thinking"]["responses"].sum() == 24
    short = run(options, Study(cut="exclude", intervals=FEW), progress=False)
    assert short.cut == cut
    whole = [r["prompt"] for r in records if r["kind"] == "thinking" and r["finish_reason"] == "stop"]
    assert short.figures.prompts == sorted({prompt for prompt in whole if whole.count(prompt) >= 2})
    assert short.figures.moments["thinking"]["length"].max() < 55


def test_where_all_are_cut_the_limit_is_to_blame(sampled: Sampling, tmp_path: Path) -> None:
    options = replace(sampled, max_new_tokens=1, samples=2, limit=2, output=str(tmp_path / "cut.parquet"))
    with pytest.raises(UserError, match=r"not cut at max_new_tokens 1: raise it, .* or give --study.cut include"):
        run(options, Study(cut="exclude", intervals=FEW), progress=False)
    assert run(options, Study(intervals=FEW), progress=False).cut == {"thinking": 4, "no_thinking": 4}


def test_a_response_without_a_token_is_looked_at(copied: Sampling) -> None:
    path = copied.work / "responses.jsonl"
    records = lines(path)
    records[0] |= {"text": "", "n_tokens": 0, "logprob": 0.0}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = run(copied, Study(scorer=TransformersEngine(batch_size=1), intervals=FEW), progress=False)
    at, mode = report.figures.prompts.index(records[0]["prompt"]), cast(Mode, records[0]["kind"])
    assert report.figures.moments[mode]["responses"][at] == 3
    assert report.figures.comparisons["nll_per_token_of_responses"].ratio is None
    assert report.figures.comparisons["nll_per_token"].ratio is not None


def test_a_shard_or_a_single_sample_is_refused(sampled: Sampling) -> None:
    with pytest.raises(UserError, match="shard: sample the shards by"):
        run(replace(sampled, shard="1/2"))
    with pytest.raises(UserError, match="samples must be ≥ 2 to give a variance, got 1"):
        run(replace(sampled, samples=1))


# --- Command line -----------------------------------------------------------------------------------------------------


def arguments(options: Sampling, *more: str) -> list[str]:
    return [
        "--responses",
        str(options.work),
        *("--prompts", options.prompts, "--limit", str(options.limit), "--samples", str(options.samples)),
        *("--progress", "false", "--study.intervals.resamples", "200", *more),
    ]


def test_the_command_reads_a_folder_of_responses(
    copied: Sampling, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Temperature, policy and the like are the folder's."""
    before = (copied.work / "responses.jsonl").read_bytes()
    plot = tmp_path / "plots" / "ratios.png"
    other = ["--config", str(ROOT / "experiments/sample/stochasticity.yaml"), "--temperature", "1"]
    given = arguments(copied, *("--study.plot", str(plot), "--max_new_tokens", "120"))
    assert main([*other, *given]) == 0  # the folder is the one of --responses, whatever a config says
    assert (copied.work / "responses.jsonl").read_bytes() == before
    shown = capsys.readouterr().out
    assert "8 prompts, 24 and 24 responses" in shown and "log π variance" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    summary = json.loads((copied.work / "stochasticity.json").read_text(), parse_constant=pytest.fail)
    assert summary["options"]["temperature"] == 1.0 and summary["options"]["study"]["cut"] == "include"
    assert summary["comparisons"].keys() == QUANTITIES.keys() >= set(KEYS)
    with (copied.work / "stochasticity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == summary["prompts"] == 8
    mean = sum(float(row["thinking_length"]) for row in rows) / 8
    assert mean == pytest.approx(summary["comparisons"]["length"]["thinking"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"policy"', "settings.json: expected the settings of the records beside it"),
        ("[]", "settings.json: expected the settings of the records beside it"),
        ('{"policy": "x", "temperature": 1, "top_p": 1, "max_new_tokens": 8, "seed": 0}', "does not say think"),
    ],
)
def test_a_folder_of_damaged_settings_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    folder = tmp_path / "rows.jsonl.work"
    folder.mkdir()
    (folder / "settings.json").write_text(content)
    assert main(["--responses", str(folder), "--prompts", "builtin:tasks"]) == 2
    assert message in capsys.readouterr().err


def test_what_a_reader_cannot_use_is_said(
    copied: Sampling, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    cases = {
        "no folder of responses; give the OUTPUT.work": ["--responses", str(tmp_path / "none"), "--prompts", "x"],
        "--prompts is missing: give it, or --responses": ["--responses", str(copied.work)],
        "--policy is missing": ["--prompts", "builtin:tasks", "--output", str(tmp_path / "new.jsonl")],
        "16 of 64 responses are missing": arguments(copied, "--samples", "4"),
        "were sampled with other settings: temperature was 1.0, is 0.8": arguments(copied, "--temperature", "0.8"),
        "were sampled with other settings: prompts was": arguments(copied, "--limit", "7"),
        "file/ratios.png: cannot be written: ": arguments(
            copied, "--study.plot", str(tmp_path / "file" / "ratios.png")
        ),
        "plot ratios.svg: give a file that ends in .png or .pdf": arguments(copied, "--study.plot", "ratios.svg"),
        "level must be in (0, 1)": arguments(copied, "--study.intervals.level", "95"),
    }
    for message, given in cases.items():
        try:
            code = main(given)
        except SystemExit as error:  # the parser's own refusals
            code = cast(int, error.code)
        shown = capsys.readouterr().err
        assert code == 2 and message in shown and "Traceback" not in shown, shown
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(UserError, match=r'matplotlib is not installed: pip install "bvpo\[notebooks\]"'):
        Study(plot="ratios.png")
    assert main(arguments(copied)) == 0  # without a plot nothing needs it


@pytest.mark.parametrize("name", ["stochasticity.json", "stochasticity.csv"])
def test_a_report_that_cannot_be_written_is_said(
    copied: Sampling, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A full disk, and a folder in its place."""
    path = copied.work / name
    if Path("/dev/full").exists():
        path.symlink_to("/dev/full")
        assert main(arguments(copied)) == 2
        assert "the report cannot be written: No space left on device" in capsys.readouterr().err
        path.unlink()
    path.mkdir()
    assert main(arguments(copied)) == 2
    assert "the report cannot be written: Is a directory" in capsys.readouterr().err


def test_the_config_is_parsed_by_its_command() -> None:
    path = "experiments/sample/stochasticity.yaml"
    assert (ROOT / path).read_text().startswith(f"# python -m bvpo.stochasticity --config {path}\n")
    sampling, study, generate, progress = stochasticity.options(["--config", str(ROOT / path)])
    assert (sampling.samples, sampling.limit, sampling.temperature, generate, progress) == (10, 200, 0.8, True, True)
    assert study == Study(plot="runs/stochasticity.png")
    assert sampling.work == Path("runs/stochasticity.parquet.work")


def test_plots_show_what_is_finite(copied: Sampling) -> None:
    report = run(copied, Study(intervals=FEW), progress=False)
    finite = [key for key, own in report.figures.comparisons.items() if own.ratio]
    figure = stochasticity.plot_ratios(report)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [QUANTITIES[key].label for key in finite]
    figure = stochasticity.plot_prompts(report, "logprob_variance", "variance of log π")
    x, y = figure.axes[0].lines[1].get_data()
    np.testing.assert_array_equal(y, report.figures.moments["thinking"]["logprob_variance"])
    assert math.isclose(sum(x), sum(report.figures.moments["no_thinking"]["logprob_variance"]))
