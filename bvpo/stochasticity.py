"""How much responses vary with a trace and without: `python -m bvpo.stochasticity --config FILE`.

The measurement of appendix B of the paper (arXiv 2510.05095), for any model and prompts: `bvpo.response_variance` has
the definitions. The responses are those of `bvpo.sample` with the same options, kept and gone on with in the same
folder, so either command uses what the other has sampled. Their journaled log-probability is under the distribution
that they were drawn from; that under the model itself is computed here, in one forward pass a response.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from bvpo.batches import SequenceBatch
from bvpo.commands import exit_code, options_parser
from bvpo.engines import TransformersEngine
from bvpo.errors import UserError
from bvpo.generation import Transformers
from bvpo.journal import Journal
from bvpo.pairs import encode_completion, encode_prompt
from bvpo.policy import completion_logps
from bvpo.response_variance import QUANTITIES, Bootstrap, Draw, Draws, Figures, compare
from bvpo.sampler import Job, Sampler
from bvpo.sampling import Sampling
from bvpo.sampling_settings import read_settings
from bvpo.traces import MODES, Mode, think_format

SETTINGS = ("policy", "temperature", "top_p", "max_new_tokens", "seed")  # of a folder of responses


@dataclass(frozen=True)
class Study:
    """How the responses are looked at.

    Args:
        cut: Whether responses that were cut at `max_new_tokens` are among them. With them the figures are of the first
            so many tokens of every response; without them they are of those alone that happened to be short.
        scorer: What computes log π of the responses: batch size, dtype and device.
        intervals: Over prompts.
        plot: The ratios as a PNG or PDF file; null draws none.
    """

    cut: Literal["include", "exclude"] = "include"
    scorer: TransformersEngine = field(default_factory=TransformersEngine)
    intervals: Bootstrap = field(default_factory=Bootstrap)
    plot: str | None = None

    def __post_init__(self) -> None:
        if self.plot is not None:
            if Path(self.plot).suffix not in (".png", ".pdf"):
                raise UserError(f"plot {self.plot}: give a file that ends in .png or .pdf")
            _need_matplotlib()


@dataclass(frozen=True)
class Report:
    """The figures, and what they are of.

    Attributes:
        responses: A mode's responses.
        cut: Those of them that were cut at `max_new_tokens`.
        other_ids: Those left out, as their text has other token ids than were sampled.
    """

    figures: Figures
    responses: dict[Mode, int]
    cut: dict[Mode, int]
    other_ids: dict[Mode, int]


# ---------------------------------------------------------------------- responses → log π


def run(sampling: Sampling, study: Study = Study(), generate: bool = True, progress: bool = True) -> Report:
    """Sample what is missing, compute log π where it is missing, and compare. All is kept in `sampling.work`.

    Args:
        sampling: What scoring and pairing read of it plays no role.
        generate: Whether missing responses are sampled.

    Raises:
        UserError: Responses are missing and are not to be sampled, or what `Sampler` raises.
    """
    if sampling.shard is not None:
        raise UserError("shard: sample the shards by python -m bvpo.sample with stage generate, and leave it out here")
    if sampling.samples < 2:
        raise UserError(f"samples must be ≥ 2 to give a variance, got {sampling.samples}")
    sampler = Sampler(sampling, progress)
    with sampler.journal() as responses:
        if generate:
            sampler.generate(responses)
        draws, other_ids = read_draws(sampler, responses, study.scorer)
    return Report(
        compare(_kept(draws, study, sampling.max_new_tokens), study.intervals),
        responses={mode: len(sampler.prompts) * sampling.samples for mode in MODES},
        cut={mode: sum(draw.cut for own in draws.values() for draw in own[mode]) for mode in MODES},
        other_ids=other_ids,
    )


def _kept(draws: Draws, study: Study, limit: int) -> Draws:
    """The responses that are looked at. Raises UserError where leaving out the cut ones leaves too few."""
    if study.cut == "include":
        return draws
    kept = {p: {mode: [draw for draw in own[mode] if not draw.cut] for mode in MODES} for p, own in draws.items()}
    if _compared(draws) and not _compared(kept):
        raise UserError(
            f"none of {len(draws)} prompts has two responses in both modes that were not cut at max_new_tokens "
            f"{limit}: raise it, with another output, or give --study.cut include"
        )
    return kept


def _compared(draws: Draws) -> bool:
    return any(min(len(own[mode]) for mode in MODES) >= 2 for own in draws.values())


def read_draws(
    sampler: Sampler, responses: Journal, scorer: TransformersEngine
) -> tuple[dict[str, dict[Mode, list[Draw]]], dict[Mode, int]]:
    """The prompts' responses with their log π, and how many have no log π: their sampled token ids are not known.

    Raises:
        UserError: Responses are missing.
    """
    work, jobs = sampler.options.work, sampler.jobs(sampler.prompts)
    missing = [job.key for job in jobs if job.key not in responses]
    if missing:
        raise UserError(
            f"{work}: {len(missing)} of {len(jobs)} responses are missing, the first to prompt {missing[0][0]}: give "
            "fewer samples, or sample them: leave --responses out"
        )
    name = f"logprobs_{scorer.dtype}"
    with Journal(work, name, lambda r: (r["prompt"], r["kind"], r["number"])) as logprobs:
        _score([job for job in jobs if job.key not in logprobs], sampler, responses, logprobs, scorer)
        draws: dict[str, dict[Mode, list[Draw]]] = {p.id: {mode: [] for mode in MODES} for p in sampler.prompts}
        other_ids: dict[Mode, int] = dict.fromkeys(MODES, 0)
        for job in jobs:
            record, mode = responses[job.key], cast(Mode, job.kind)
            if job.key not in logprobs:
                other_ids[mode] += 1
                continue
            logprob, cut = logprobs[job.key]["logprob"], record["finish_reason"] == "length"
            draws[job.prompt.id][mode].append(Draw(logprob, record["logprob"], record["n_tokens"], cut))
    return draws, other_ids


@torch.no_grad()
def _score(
    jobs: list[Job], sampler: Sampler, responses: Journal, logprobs: Journal, scorer: TransformersEngine
) -> None:
    """Write down log π of responses, in batches of similar length, the longest first."""
    sequences = []
    for _, group in groupby(jobs, key=lambda job: (job.prompt.id, job.kind)):
        own = [job for job in group if responses[job.key]["same_ids"]]
        if own:
            before = sampler.prompt_text(own[0].prompt, own[0].kind)
            prompt = encode_prompt(sampler.tokenizer, before)
        for job in own:
            ids = encode_completion(sampler.tokenizer, responses[job.key]["text"], before)
            sequences.append((job, prompt, ids))
    if not sequences:
        return
    sequences.sort(key=lambda sequence: -len(sequence[1]) - len(sequence[2]))
    model = cast(Transformers, scorer.start(sampler.options.policy)).model.eval()
    with tqdm(total=len(sequences), desc="log π", unit="response", disable=not sampler.progress) as bar:
        for start in range(0, len(sequences), scorer.batch_size):
            part = sequences[start : start + scorer.batch_size]
            batch = SequenceBatch(
                pad_sequence([torch.tensor(prompt + ids) for _, prompt, ids in part], True).to(model.device),
                torch.tensor([len(prompt) for _, prompt, _ in part], device=model.device),
                torch.tensor([len(prompt) + len(ids) for _, prompt, ids in part], device=model.device),
                step_pairs=0,
            )
            sums = completion_logps(model, batch)
            if not sums.isfinite().all():
                raise UserError(f"{sampler.options.policy}: a log-probability is not finite in {scorer.dtype}")
            for (job, _, _), logprob in zip(part, sums.tolist(), strict=True):
                logprobs.append(dict(zip(("prompt", "kind", "number"), job.key, strict=True)) | {"logprob": logprob})
            bar.update(len(part))


def folder_options(folder: str) -> dict[str, Any]:
    """The options that a folder of responses was sampled with.

    Raises:
        UserError: It is no such folder, or its settings are damaged.
    """
    settings = read_settings(Path(folder))
    if not settings or not folder.rstrip("/").endswith(".work"):
        raise UserError(f"{folder}: no folder of responses; give the OUTPUT.work of a python -m bvpo.sample")
    names = (*SETTINGS, "think")
    if missing := [name for name in names if name not in settings]:
        raise UserError(
            f"{folder}: settings.json does not say {', '.join(missing)}: give what the responses were sampled with as "
            "options, in place of --responses"
        )
    return {name: settings[name] for name in names}


# ---------------------------------------------------------------------- output


def print_report(report: Report, study: Study, console: Console | None = None) -> None:
    """The table, each interval under its figure, and what the table does not show."""
    console, figures, level = console or Console(), report.figures, f"{study.intervals.level:.0%}"
    table = Table(title=f"{len(figures.prompts)} prompts, {_both(report.responses)} responses with and without a trace")
    for name in ("", *MODES, f"ratio of means\n{level}", f"median ratio\n{level}"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for key, quantity in QUANTITIES.items():
        own = figures.comparisons[key]
        ratios = [f"{_text(own.ratio)}\n{_span(own.interval)}", f"{_text(own.median)}\n{_span(own.median_interval)}"]
        table.add_row(f"{quantity.label}\n{quantity.unit}", _text(own.thinking), _text(own.no_thinking), *ratios)
    console.print(table)
    if any(report.cut.values()):
        fractions = {mode: report.cut[mode] / report.responses[mode] for mode in MODES}
        then = {
            "include": "they are part of the figures, which are of prefixes there",
            "exclude": "they are left out, and the figures are of responses that happened to be short",
        }
        console.print(f"{_both(fractions, '.1%')} of the responses were cut at max_new_tokens: {then[study.cut]}")
    if any(report.other_ids.values()):
        console.print(f"left out: {_both(report.other_ids)} responses whose text has other token ids than were sampled")
    if figures.left_out:
        console.print(f"left out: {figures.left_out} prompts with fewer than two responses in a mode")
    for key, own in figures.comparisons.items():
        if own.undefined:
            console.print(f"{QUANTITIES[key].label}: 0/0 in {own.undefined} of the prompts; the median is without them")


def _both(values: Mapping[Mode, float], form: str = "d") -> str:
    return " and ".join(format(values[mode], form) for mode in MODES)


def _text(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"


def _span(interval: tuple[float, float] | None) -> str:
    return "—" if interval is None else f"{interval[0]:.3g}–{interval[1]:.3g}"


def write_report(report: Report, sampling: Sampling, study: Study) -> tuple[Path, Path]:
    """`stochasticity.json`, the figures, and `stochasticity.csv`, the prompts' moments, in the folder of responses.

    Raises:
        UserError: They cannot be written, or the disk takes no more.
    """
    figures = report.figures
    options = {name: getattr(sampling, name) for name in (*SETTINGS, "prompts", "samples")}
    options |= {"think": asdict(think_format(sampling.think)), "study": asdict(study)}
    counts = {"prompts": len(figures.prompts), "left_out": figures.left_out}
    counts |= {name: getattr(report, name) for name in ("responses", "cut", "other_ids")}
    comparisons = {key: asdict(own) for key, own in figures.comparisons.items()}
    summary, prompts = (sampling.work / f"stochasticity.{suffix}" for suffix in ("json", "csv"))
    columns = {f"{mode}_{name}": values for mode, own in figures.moments.items() for name, values in own.items()}
    try:
        summary.write_text(json.dumps({"options": options} | counts | {"comparisons": comparisons}, indent=1) + "\n")
        with prompts.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt_id", *columns])
            writer.writerows(zip(figures.prompts, *(values.tolist() for values in columns.values()), strict=True))
    except OSError as error:
        raise UserError(
            f"{sampling.work}: the report cannot be written: {error.strerror or error}. The responses are kept: make "
            "room and start again"
        ) from error
    return summary, prompts


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('plot: matplotlib is not installed: pip install "bvpo[notebooks]", or leave the plot out')


def plot_ratios(report: Report) -> Any:
    """The ratios of means with their intervals, as a matplotlib figure."""
    axes = _axes((7, 3))
    shown = {key: own for key, own in report.figures.comparisons.items() if own.ratio}
    for place, own in enumerate(shown.values()):
        axes.plot([own.ratio], [place], "o", color="C0")
        if own.interval is not None:
            axes.plot(own.interval, [place, place], color="C0")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [QUANTITIES[key].label for key in shown])
    axes.set(title="Thinking over no_thinking", xlabel="ratio of means over prompts", xscale="log")
    axes.invert_yaxis()
    return axes.figure


def plot_prompts(report: Report, moment: str, label: str) -> Any:
    """A moment of each prompt's responses, thinking against no_thinking, as a matplotlib figure."""
    axes = _axes((5, 5))
    ours, theirs = (report.figures.moments[mode][moment] for mode in MODES)
    top = max(ours.max(), theirs.max())
    axes.plot([0, top], [0, top], color="black", linewidth=0.8)
    axes.plot(theirs, ours, "o", alpha=0.4)
    axes.set(title=label, xlabel="no_thinking", ylabel="thinking")
    axes.set_xscale("symlog", linthresh=1)  # where all responses are alike, there is a 0
    axes.set_yscale("symlog", linthresh=1)
    return axes.figure


def save(figure: Any, plot: str) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        Path(plot).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(plot, dpi=150)
    except OSError as error:
        raise UserError(f"plot {plot}: cannot be written: {error.strerror}") from error


def _axes(size: tuple[float, float]) -> Any:
    _need_matplotlib()
    from matplotlib.figure import Figure

    axes = Figure(figsize=size, layout="constrained").subplots()
    axes.grid(alpha=0.3)
    return axes


# ---------------------------------------------------------------------- command line


def options(args: Sequence[str] | None) -> tuple[Sampling, Study, bool, bool]:
    """Sampling, study, whether to sample what is missing, and whether to show progress."""
    parser = options_parser("stochasticity", __doc__)
    parser.add_argument(
        "--responses",
        type=str | None,
        default=None,
        help="The OUTPUT.work of a `bvpo.sample`: look at its responses and sample none. What they were sampled with "
        "is read from it; give the prompts as they were given there.",
    )
    parser.add_class_arguments(Study, "study")
    parser.add_class_arguments(Sampling)
    required = ("policy", "prompts", "output")
    parser.set_defaults(dict.fromkeys(required, ""))  # asked for below: --responses may give them
    folder = parser.parse_args(args).responses
    if folder is not None:
        parser.set_defaults(folder_options(folder))
    config = parser.parse_args(args)
    if folder is not None:
        config.output = folder.rstrip("/").removesuffix(".work")  # whatever a config says
    for name in required:
        if not config[name]:
            raise UserError(f"--{name} is missing: give it, or --responses")
    config = parser.instantiate_classes(config)
    own = {name: config[name] for name in Sampling.__dataclass_fields__}
    return Sampling(**own), Study(**vars(config.study)), folder is None, config.progress


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0; 2 after an error that the user can mend; 130 when interrupted."""

    def work() -> None:
        sampling, study, generate, progress = options(args)
        report = run(sampling, study, generate, progress)
        print_report(report, study)
        files = [str(path) for path in write_report(report, sampling, study)]
        if study.plot is not None:
            save(plot_ratios(report), study.plot)
            files.append(study.plot)
        print("written: " + ", ".join(files))

    return exit_code(work, "what has been sampled is kept; the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
