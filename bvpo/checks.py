"""Whether what is trained on is what was meant: checks of rows, each with what was found and what to do about it.

A check looks at a sample of rows: as they are read, as text, and as the ids of training. Rows that are refused anyway
(`selection`) come in through their problems.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jinja2 import TemplateError
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from bvpo.batches import BRANCHES, PREFIX, PairBatch, collate, has_branch
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.policy import load_tokenizer
from bvpo.row_faults import (
    Example,
    Fault,
    Sample,
    Status,
    bos_twice,
    draw_sample,
    healthy,
    never_opened,
    no_stop,
    no_trace,
    other_prompt,
    other_template,
    same_sides,
    token_across_border,
)
from bvpo.selection import RowOptions, RowReport, count_reasons, group_fault, group_notes
from bvpo.traces import ThinkFormat, split

QUICK_SAMPLE = 16  # rows that a fit looks at before it starts: half a second with completions of 2,000 tokens
SEVERITY: dict[Status, int] = {"skipped": 0, "pass": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Check:
    """One question, its verdict, what was found and what to do (empty where nothing is)."""

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class RowCheck:
    """A question that is asked of every row.

    Attributes:
        fault: What is wrong with a row that could be trained on.
        problem: What is said of a bad row that answers the question, as a regular expression; None: nothing is.
        everywhere: The verdict where every row that was looked at has the fault.
        quick: Whether a fit asks it, too: what it says anyway, it does not say twice.
    """

    name: str
    fault: Callable[[Example, Sample], Fault | None]
    good: str
    advice: str
    problem: str | None = None
    everywhere: Status | None = None
    quick: bool = True


ROW_CHECKS = (
    RowCheck(
        "trace kept",
        no_trace,
        "the trace pairs' completions hold traces",
        "the completions have lost their traces, most likely in a chat template of the R1 family: take them from the "
        "sampler's own text, or give reasoning_content",
        everywhere="fail",
    ),
    RowCheck(
        "think block opened",
        never_opened,
        "every close tag has its open tag, in the completion or at the prompt's end",
        "end prompt in the open tag that the sampler's prompt had, or put it at the start of chosen and rejected",
        everywhere="fail",
    ),
    RowCheck(
        "trace finished",
        healthy,
        "no trace was cut off",
        "the completion was cut before its answer: leave such rows out, or sample longer",
        problem=r"unfinished trace|finish_reason = length|expected an answer after",
        quick=False,
    ),
    RowCheck(
        "BOS once",
        bos_twice,
        "BOS stands at most once, in front of the prompt",
        "leave BOS out of the text: the tokenizer puts it in front",
        problem="stands inside",
    ),
    RowCheck(
        "EOS",
        no_stop,
        "every completion ends in its stop token, and holds no other",
        "append the stop token to completions that the model ended itself, and to no others",
        problem="comes before the end",
        quick=False,
    ),
    RowCheck(
        "border of prompt and completion",
        token_across_border,
        "tokenizing both together gives the prompt's ids first",
        "nothing for a fit here, whose ids are those of sampling; a trainer that tokenizes both together (TRL) trains "
        "on other ids",
    ),
    RowCheck(
        "prompt ids",
        other_prompt,
        "the policy's template gives the same prompt ids, where rows have a conversation",
        "train the model that the rows were sampled with, set data.think to its format, or build the prompts anew "
        "(a system message belongs into conversation)",
    ),
    RowCheck(
        "chosen is not rejected",
        same_sides,
        "the two sides of every pair differ",
        "leave the row out, or cut less of it: it has a gradient of 0",
        problem=r"equals (empty_)?rejected",
    ),
    RowCheck(
        "scores",
        healthy,
        "no chosen side ties with its rejected side, where candidates have scores",
        "leave the row out: a tie is no preference",
        problem="does not score above",
        quick=False,
    ),
    RowCheck(
        "chat template",
        other_template,
        "rows were sampled with the policy's chat template, or do not say",
        "train the model that the rows were sampled with, or sample them anew",
        quick=False,
    ),
)


def check_rows(check: RowCheck, sample: Sample) -> Check:
    """One question asked of all rows of a sample."""
    faults = {e.number: fault for e in sample.examples if (fault := check.fault(e, sample)) is not None}
    bad = {n: problem for n, problem in sample.bad.items() if check.problem and re.search(check.problem, problem)}
    statuses: list[Status] = [fault.status for fault in faults.values()]
    if faults and len(faults) == len(sample.examples) and check.everywhere:
        statuses.append(check.everywhere)
    parts = []
    if faults:
        worst = max(faults, key=lambda number: SEVERITY[faults[number].status])
        looked = f"{len(faults)} of the {len(sample.examples)} rows looked at"
        parts.append(f"{looked}: in row {worst}, {faults[worst].found}")
    if bad:
        statuses.append(bad_row_status(sample.options))
        first = next(iter(bad))
        parts.append(f"{len(bad)} of {sample.total} rows {_fate(sample.options)}: row {first}, {bad[first]}")
    if not parts:
        return Check(check.name, "pass", check.good if sample.examples else "no row to look at")
    return Check(check.name, max(statuses, key=SEVERITY.__getitem__), "; ".join(parts), check.advice)


def _fate(options: RowOptions) -> str:
    return "refused" if options.on_bad_row == "error" else "dropped"


def bad_row_status(options: RowOptions) -> Status:
    return "fail" if options.on_bad_row == "error" else "warn"


# ---------------------------------------------------------------------- all rows, the tokenizer, a batch


def check_bad_rows(report: RowReport, options: RowOptions) -> Check:
    """All rows that are no pairs of pairs, by reason."""
    if not report.bad:
        return Check("rows", "pass", f"all {report.total} rows can be trained on")
    status: Status = "fail" if len(report.bad) == report.total else bad_row_status(options)
    return Check(
        "rows",
        status,
        f"{len(report.bad)} of {report.total} rows are no pairs and {_fate(options)}: {count_reasons(report.bad)}",
        "mend them, or set data.on_bad_row to drop to train without",
    )


def check_lengths(report: RowReport, options: RowOptions) -> Check:
    """Rows with a sequence that is longer than `max_length`."""
    limit = options.max_length
    if limit is None:
        return Check("length", "pass", "no limit is set (data.max_length): nothing is dropped or cut")
    if not report.overlong:
        return Check("length", "pass", f"no sequence is longer than {limit} tokens")
    all_dropped = options.on_overlong == "drop" and len(report.overlong) + len(report.bad) == report.total
    fate = {"error": "refused", "drop": "dropped"}.get(options.on_overlong, f"cut by {options.on_overlong}")
    return Check(
        "length",
        "fail" if options.on_overlong == "error" or all_dropped else "warn",
        f"{len(report.overlong)} of {report.total} rows longer than {limit} tokens are {fate} ({report.longer(limit)})",
        "raise data.max_length: dropping and cutting favours short traces"
        + ("; or set data.on_overlong" if options.on_overlong == "error" else ""),
    )


def check_groups(report: RowReport, options: RowOptions) -> Check:
    """Rows that are drawn together: whether they have one prompt, and how many are left out with another one."""
    name = "rows together"
    if fault := group_fault(report, options):
        return Check(name, "fail", *fault)
    if found := "; ".join(group_notes(report, options)):
        return Check(name, "warn", found, "mend the rows that are dropped, or leave their groups out of the file")
    return Check(name, "pass", f"each group of {options.together} rows has one prompt")


def check_forced_eos(sample: Sample) -> Check:
    """An EOS right behind an unfinished trace: a trainer or a sampler has put it there, the model has not."""
    name, think, stops = "EOS not forced", sample.options.think, tuple(sample.options.stops)
    forced = []
    for number, row in sample.bad_rows.items():
        texts = [row.get(column) for column in ("prompt", "chosen", "rejected")]
        prompt, *completions = [text if isinstance(text, str) else "" for text in texts]
        for text in (text for text in completions if text.endswith(stops)):
            own = split(text.lstrip(), think)
            if not own.closed and (own.opened or prompt.rstrip().endswith(think.open)) and number not in forced:
                forced.append(number)
    if not forced:
        return Check(name, "pass", "no unfinished trace ends in a stop token")
    return Check(
        name,
        bad_row_status(sample.options),
        f"{len(forced)} of the {len(sample.bad_rows)} bad rows looked at have a stop token right behind a trace "
        f"without {think.close}: the first is row {forced[0]}",
        "leave out what was cut off, and append no stop token to it: it would teach the policy to stop in mid-thought",
    )


def check_padding(batch: PairBatch, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Check:
    """Whether each completion's ids, its EOS included, and nothing else are under the mask of a collated batch.

    Args:
        batch: The collated examples, in their order.
    """
    same = tokenizer.pad_token_id in (None, tokenizer.eos_token_id)
    which = "pad and EOS are one token" if same else "pad is not EOS"
    for branch in BRANCHES:
        sequences = batch.trace if branch == "trace" else batch.empty
        own = [example for example in examples if has_branch(example.ids, branch)]
        sides = [(e, PREFIX[branch] + side) for side in ("chosen", "rejected") for e in own]
        for i, (example, name) in enumerate(sides):
            masked = sequences.input_ids[i][sequences.completion_mask[i]].tolist()
            if masked != example.ids[name]:
                return Check(
                    "padding",
                    "fail",
                    f"{which}; row {example.number}: the mask holds {len(masked)} tokens of {name}, which has "
                    f"{len(example.ids[name])}",
                    "this is a defect of the batching, please report it",
                )
    return Check("padding", "pass", f"{which}; masks come from lengths: every completion's last token is inside")


def check_tags(tokenizer: PreTrainedTokenizerBase, think: ThinkFormat) -> Check:
    """Whether each think tag is one token."""
    counts = {tag: len(tokenizer(tag, add_special_tokens=False).input_ids) for tag in (think.open, think.close)}
    several = {tag: count for tag, count in counts.items() if count != 1}
    if not several:
        return Check("think tags", "pass", f"{think.open} and {think.close} are one token each")
    found = ", ".join(f"{tag} is {count} tokens" for tag, count in several.items())
    return Check(
        "think tags",
        "warn",
        found,
        "most likely not this model's tags: set data.think; where they are, the tags' ids depend on their neighbours",
    )


def check_template_keeps_traces(tokenizer: PreTrainedTokenizerBase, think: ThinkFormat) -> Check:
    """Whether the chat template leaves an assistant's trace as it is. It matters to other trainers only."""
    name, advice = "template keeps traces", "do not render completions with it: TRL does so with conversational rows"
    if not tokenizer.chat_template:
        return Check(name, "skipped", "the tokenizer has no chat template")
    content = f"{think.open}\nreasons\n{think.close}\n\nanswer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        return Check(name, "warn", f"the chat template refuses an assistant's turn: {error}", advice)
    if "reasons" in text:
        return Check(name, "pass", "an assistant's last turn keeps its trace")
    found = "the chat template cuts the trace out of an assistant's turn; completions here never pass through it"
    return Check(name, "warn", found, advice)


def row_checks(sample: Sample, report: RowReport) -> list[Check]:
    """All checks of rows and tokenizer."""
    tokenizer, think = sample.tokenizer, sample.options.think
    checks = [check_bad_rows(report, sample.options), check_lengths(report, sample.options)]
    checks += [check_groups(report, sample.options)] if sample.options.together > 1 else []
    checks += [check_rows(check, sample) for check in ROW_CHECKS]
    checks += [check_forced_eos(sample), check_tags(tokenizer, think), check_template_keeps_traces(tokenizer, think)]
    if sample.examples:
        pad = tokenizer.pad_token_id
        batch = collate([e.ids for e in sample.examples], int(pad) if isinstance(pad, int) else 0)
        checks.append(check_padding(batch, sample.examples, tokenizer))
    return checks


# ---------------------------------------------------------------------- at the start of a fit


def quick_checks(data: PairData) -> list[Check]:
    """Those checks that no fit should start without, on a sample of the training rows: no model, below a second.

    Bad and over-long rows are left to `selection`, which sees all rows.
    """
    data.tokenizer = getattr(data, "tokenizer", None) or load_tokenizer(data.tokenizer_name)
    options = data.row_options(anchors=False)
    sample = draw_sample(data.read(str(data.sources["train"])), data.tokenizer, options, data.seed, size=QUICK_SAMPLE)
    checks = [check_rows(check, replace(sample, bad={})) for check in ROW_CHECKS if check.quick]
    return [*checks, check_tags(data.tokenizer, options.think)] if sample.examples else []


def require(checks: Sequence[Check], source: str) -> None:
    """Show the warnings. Raises UserError at the first check that failed."""
    for check in checks:
        message = f"{source}: {check.name}: {check.found}. What to do: {check.advice}"
        if check.status == "fail":
            raise UserError(f"{message} (python -m bvpo.doctor shows all)")
        if check.status == "warn":
            rank_zero_warn(message)
