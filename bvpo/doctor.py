"""Show and check what a fit would train on: `python -m bvpo.doctor --config experiments/alpaca.yaml`.

The options are those of `bvpo.fit`. Nothing is trained, no GPU and no run folder is used, and one process is started,
whatever the configuration asks for. `--plan` looks at memory alone: of the model its config.json is read, of the rows
nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.text import Text

from bvpo import doctor_report as report
from bvpo.batches import collate
from bvpo.budget import largest_batch, memory_facts, planned_batch
from bvpo.checks import Check, check_bad_rows, check_lengths, row_checks
from bvpo.commands import exit_code
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.fit import TRAINER_DEFAULTS, FitCLI
from bvpo.inspection import Inspection, count_rows, inspect, length_table
from bvpo.machine import Machine, available_ram, format_bytes, machine_of
from bvpo.memory import WEIGHT_BYTES, MemoryEstimate, memory_estimate
from bvpo.model_checks import (
    check_frequencies,
    check_labels,
    check_memory,
    check_positions,
    check_start,
    check_vocabulary,
    joined,
)
from bvpo.module import BVPO
from bvpo.policy import completion_logps, load_tokenizer
from bvpo.row_faults import Example
from bvpo.row_sizes import RowSizes, tokenizer_size
from bvpo.selection import notes
from bvpo.shapes import ModelShape, model_shape

USAGE = (
    "python -m bvpo.doctor --config FILE [--config FILE ...] [--rows N] [--row NUMBER] [--plan] [--json] "
    "[--OPTION VALUE ...]"
)
MODEL_ROWS = 2  # rows that the model checks take through the model: the shortest of those looked at
DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


class DoctorCLI(FitCLI):
    """The fit's parser; module and data are made, trainer, callbacks, loggers and strategy are not."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--rows", type=int, default=2, help="Rows shown, random by seed.")
        parser.add_argument("--row", type=int | list[int] | None, default=None, help="Row numbers (from 1) shown, too.")
        parser.add_argument(
            "--model_checks", type=bool | None, default=None, help="Load the models; null: where memory allows."
        )
        parser.add_argument(
            "--device_memory",
            type=str | None,
            default=None,
            help="Of one device, such as 80GiB; null: of this machine's.",
        )
        parser.add_argument(
            "--plan", action="store_true", help="Memory alone, for rows of data.max_length tokens: none is read."
        )
        parser.add_argument("--json", action="store_true", help="One JSON document on stdout, and nothing else.")

    def instantiate_classes(self) -> None:
        config = self.config.clone()
        config.trainer.strategy = "auto"
        for name in ("callbacks", "logger", "plugins", "profiler"):
            config.trainer[name] = None
        if config.plan:  # the model need not be here
            config.model.policy, config.model.reference = "builtin:tiny_reasoner", None
        instances = self.parser.instantiate_classes(config)
        self.model, self.datamodule = instances.model, instances.data


@dataclass(frozen=True)
class Plan:
    """What the doctor found without a look at the rows."""

    checks: list[Check]
    memory: MemoryEstimate
    machine: Machine

    @property
    def failed(self) -> bool:
        return any(check.status == "fail" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        checks = [asdict(check) for check in self.checks]
        return {"checks": checks, "memory": self.memory.as_dict(), "ranks": self.machine.ranks}


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor found.

    Attributes:
        shown: The rows to print.
        unfit: Why rows that were asked for cannot be printed, by number.
        memory: None where there is no row to train on.
    """

    train: Inspection
    shown: list[Example]
    unfit: dict[int, str]
    checks: list[Check]
    memory: MemoryEstimate | None
    machine: Machine

    @property
    def failed(self) -> bool:
        return any(check.status == "fail" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {
            "source": self.train.source,
            "checks": [asdict(check) for check in self.checks],
            "lengths": length_table(self.train),
            "rows": count_rows(self.train),
            "memory": self.memory and self.memory.as_dict(),
            "ranks": self.machine.ranks,
        }


def plan(cli: DoctorCLI) -> Plan:
    """Memory for the longest rows that may come. Raises UserError where the configuration cannot be followed."""
    config, data, module = cli.config, cast(PairData, cli.datamodule), cast(BVPO, cli.model)
    machine, shape = machine_of(config.trainer, config.device_memory), model_shape(config.model.policy)
    batch = planned_batch(data, shape.packs and module.packing != "off")
    estimate = memory_estimate(memory_facts(config, module, shape, batch, machine))
    checks = [check_memory(estimate, machine, attention=shape.heads > 0), check_positions(shape, batch.tokens)]
    return Plan(checks, estimate, machine)


def diagnose(cli: DoctorCLI) -> Diagnosis:
    """Everything that is printed. Raises UserError where the configuration cannot be followed."""
    config, data, module = cli.config, cast(PairData, cli.datamodule), cast(BVPO, cli.model)
    if config.rows < 0:
        raise UserError(f"rows must be ≥ 0, got {config.rows}")
    machine = machine_of(config.trainer, config.device_memory)
    numbers = [config.row] if isinstance(config.row, int) else config.row or []
    anchors = module.mixing.anchor == "marginal"
    data.tokenizer = load_tokenizer(data.tokenizer_name)

    train = inspect(data, "train", anchors, [number - 1 for number in numbers])
    checks, sources = row_checks(train.sample, train.report), {"": train}
    if data.sources["validation"] is not None:
        own = sources["validation "] = inspect(data, "validation", anchors)
        both = (check_bad_rows(own.report, own.options), check_lengths(own.report, own.options))
        checks += [replace(check, name=f"validation {check.name}") for check in both]

    estimate, kept = None, train.kept
    if kept:
        precision = str(config.trainer.precision or "32-true")
        shape = model_shape(module.policy_name)
        batch = largest_batch(train, kept, data, shape.packs and module.packing != "off")
        estimate = memory_estimate(memory_facts(config, module, shape, batch, machine))
        checks.append(check_memory(estimate, machine, attention=shape.heads > 0))
        shapes = {"": shape}
        if module.reference_name not in (None, module.policy_name):
            shapes["reference "] = model_shape(module.reference_name)
        sizes = [
            replace(check, name=source + model + check.name)
            for source, own in sources.items()
            for model, its in shapes.items()
            for check in size_checks(own, its)
        ]
        broken = any(check.status == "fail" for check in sizes)
        checks += [*sizes, *model_checks(module, train, shape, precision, config.model_checks, broken)]
    requested = [e for e in train.sample.examples if e.number in numbers]
    drawn = [e for e in train.sample.examples if e.number not in numbers][: config.rows]
    unfit = {n: train.report.bad[n - 1] for n in numbers if n - 1 in train.report.bad}
    return Diagnosis(train, requested + drawn, unfit, checks, estimate, machine)


# ---------------------------------------------------------------------- the model


def size_checks(found: Inspection, shape: ModelShape) -> list[Check]:
    """What the configuration of a model says of a source's rows, without its weights; nothing where no row is left."""
    size = tokenizer_size(found.sample.tokenizer)
    rows = RowSizes.of(found.trained_on, ids=size > shape.vocabulary)
    if not rows.spans:
        return []
    checks = [check_vocabulary(shape, size, rows.largest_id or 0), check_positions(shape, rows.longest)]
    return checks if shape.frequencies is None else [*checks, check_frequencies(shape, rows)]


def model_checks(
    module: BVPO, train: Inspection, shape: ModelShape, precision: str, wanted: bool | None, broken: bool
) -> list[Check]:
    """Forward passes of policy and reference over the shortest rows, on the CPU, in the trainer's precision."""
    need, free = 3 * shape.parameters * WEIGHT_BYTES.get(precision, 4), available_ram()
    reason = None
    if wanted is False:
        reason = "switched off by model_checks"
    elif broken:
        reason = "the model does not take these rows, see above"
    elif not train.sample.examples:
        reason = "no row to look at"
    elif wanted is None and free is not None and need > free:
        reason = f"needs {format_bytes(need)} of main memory, {format_bytes(free)} are free; --model_checks true tries"
    if reason is not None:
        return [Check(name, "skipped", reason) for name in ("labels", "start")]
    rows = sorted((e.ids for e in train.sample.examples), key=lambda ids: ids["length"])[:MODEL_ROWS]
    dtype = DTYPES.get(precision, torch.float32)
    module.reference_logps = "live"  # a cache of all rows is not asked for
    with default_dtype(dtype), torch.no_grad():
        module.configure_model()
    batch = collate(rows, 0)
    sequences = [own for own in (batch.trace, batch.empty) if own.pairs]
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    assert module.reference is not None
    with torch.no_grad(), mixed:
        policy = joined([completion_logps(module.policy, own) for own in sequences], sequences)
        reference = joined([module.reference.completion_logps(own) for own in sequences], sequences)
        labels = check_labels(module.policy, batch, rows)
    same = module.reference_name in (None, module.policy_name)
    return [labels, check_start(module.loss, policy, reference, same, dtype)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The trainer's precision plugin does this around `configure_model`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------- the command


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    train, options = found.train, found.train.options
    for number, problem in found.unfit.items():
        console.print(Text(f"row {number} is no pair: {problem}"), soft_wrap=True)
    if found.shown:
        console.print(Text(report.LEGEND), soft_wrap=True)
    for example in found.shown:
        report.print_example(console, example, train.sample.tokenizer, options.think)
    report.print_lengths(console, length_table(train), options.max_length)
    left_out = set(range(train.report.total)) - set(train.kept)
    good = replace(train.report, bad={}, overlong=[])  # the checks say what happens to the others
    report.print_counts(console, count_rows(train), list(notes(good, options, left_out)))
    if found.memory is not None:
        report.print_memory(console, found.memory, found.machine)
    report.print_checks(console, found.checks)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 where no check fails, 1 where one does; 2 after an error that the
    user can mend; 130 when interrupted."""

    def work() -> int:
        cli = DoctorCLI(
            BVPO,
            PairData,
            run=False,
            args=None if args is None else list(args),
            trainer_defaults=dict(TRAINER_DEFAULTS),
            parser_kwargs={"prog": "python -m bvpo.doctor", "description": __doc__, "usage": USAGE},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
        found = plan(cli) if cli.config.plan else diagnose(cli)
        if cli.config.json:
            print(json.dumps(found.as_dict(), indent=2))  # in ASCII, which every stdout takes
        elif isinstance(found, Plan):
            report.print_memory(Console(), found.memory, found.machine)
            report.print_checks(Console(), found.checks)
        else:
            print_diagnosis(found, Console())
        return int(found.failed)

    return exit_code(work, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
