"""A YAML file → the fits of an ablation, checked: every cell is parsed by the parser of `bvpo.fit` before one starts.

    base: {config: ../alpaca.yaml}          options of every cell; `config` is one file or several, beside this one
    cells: {DPO: {model.mixing.alpha: 1.0}} named cells: options that differ; an empty one has {}
    grid: {model.beta: [0.1, 0.5]}          every combination of these values, with every cell
    seeds: 8                                seed_everything 0 to 7, or a list
    metrics: {loss: loss/mixed}             label: log key. The last value logged; `mean KEY` its mean over the run;
                                            of a list, the mean of its keys
    baseline: DPO                           the cell that others are compared with, at the same point of the grid
    output: runs/ablations/beta             folder of runs, tables and plot
    prepare: [python -m bvpo.derive …]      commands that are run first

Option names are those of `bvpo.fit`, dotted or nested. Only `true` and `false` are booleans; `off` and dates are texts.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from bvpo.ablation_table import Metric
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.fit import TRAINER_DEFAULTS, FitCLI
from bvpo.module import BVPO
from bvpo.runs import flat_options

KEYS = ("base", "cells", "grid", "seeds", "metrics", "baseline", "output", "prepare")
OWN = {  # options that the command itself gives every fit
    "seed_everything": "give seeds",
    "trainer.default_root_dir": "give output",
    "trainer.enable_progress_bar": "one bar is shown for the grid",
    "trainer.logger": "results are read from metrics.csv",
    "ckpt_path": "fits go on by themselves",
}
JOBS = "jobs"  # submitit's files, in the grid's folder


@dataclass(frozen=True)
class Cell:
    """One setting, whatever the seed.

    Attributes:
        name: Of the table's row.
        baseline: Name of the cell that it is compared with; None where there is none.
        arguments: Of `bvpo.fit`.
        settings: All options as they are resolved, in YAML.
        steps: Optimizer steps of a fit; None where the data decide.
        caches: What decides the tokenized rows and the reference's log-probabilities: cells with the same share them.
    """

    name: str
    baseline: str | None
    arguments: tuple[str, ...]
    settings: str = ""
    steps: int | None = None
    caches: str = ""

    @property
    def folder(self) -> str:
        """A folder's name."""
        return re.sub(r"[^\w.=+-]+", "_", self.name)


@dataclass(frozen=True)
class Fit:
    """A cell with a seed."""

    cell: Cell
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def arguments(self) -> list[str]:
        """Of `bvpo.fit`."""
        return [
            *self.cell.arguments,
            f"--seed_everything={self.seed}",
            f"--trainer.default_root_dir={self.folder}",
            "--trainer.enable_progress_bar=false",
            "--ckpt_path=last",
        ]


@dataclass(frozen=True)
class Grid:
    """All that the YAML file says.

    Attributes:
        source: The file.
        metrics: What the table shows.
        output: Folder of runs, tables and plot.
        prepare: Commands, in words.
    """

    source: Path
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    metrics: tuple[Metric, ...]
    output: Path
    prepare: tuple[str, ...] = ()

    @property
    def fits(self) -> list[Fit]:
        """Every cell with every seed; seed by seed, so that an early table compares the same seeds."""
        return [
            Fit(cell, seed, self.output / cell.folder / f"seed_{seed}") for seed in self.seeds for cell in self.cells
        ]


def load_grid(path: Path, options: Sequence[str] = (), output: Path | None = None, seeds: Any = None) -> Grid:
    """Read and check a grid.

    Args:
        options: Arguments of `bvpo.fit` that every cell gets besides its own, last.
        output, seeds: Replace the file's.

    Raises:
        UserError: The file cannot be read, has an unknown key, or a cell that `bvpo.fit` does not take; or an option is
            one that the grid itself gives every fit.
    """
    given = _read(path)
    _refuse_own("the command line", _of_command_line(options))
    named = _mapping(path, given, "cells") or {"": {}}
    axes = _mapping(path, given, "grid")
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid: {key}: expected a list of values, found {values!r}")
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    labels = {name: [_label(name, point) for point in points] for name in named}
    if labels == {"": [""]}:
        raise UserError(f"{path}: expected cells or a grid, found neither")
    against = _baselines(path, given.get("baseline"), labels)
    base = _arguments(path, "base", _mapping(path, given, "base"))
    cells = [
        Cell(
            labels[name][number],
            against[labels[name][number]],
            (*base, *_arguments(path, f"cell {name}", own or {}), *_arguments(path, "grid", point), *options),
        )
        for name, own in named.items()
        for number, point in enumerate(points)
    ]
    _unique(path, [cell.name for cell in cells], "cells of that name")
    _unique(path, [cell.folder for cell in cells], "cells whose folder is")
    for cell in cells:
        if cell.folder in ("", ".", "..", JOBS):
            raise UserError(f"{path}: cell {cell.name!r}: its folder would be no cell's own; give it another name")
    parser = fit_parser()
    return Grid(
        path,
        tuple(_parsed(path, cell, parser) for cell in cells),
        _seeds(path, given.get("seeds", 1) if seeds is None else seeds),
        _metrics(path, _mapping(path, given, "metrics")),
        output or Path(_text(path, given, "output")),
        _commands(path, given.get("prepare") or []),
    )


def fit_parser() -> LightningArgumentParser:
    """The parser of `bvpo.fit`; it raises where the command would exit, and makes nothing."""

    class Parsed(FitCLI):
        def before_instantiate_classes(self) -> None: ...

        def instantiate_classes(self) -> None: ...

    return Parsed(
        BVPO,
        PairData,
        run=False,
        args=[],
        seed_everything_default=0,
        trainer_defaults=dict(TRAINER_DEFAULTS),
        parser_kwargs={"exit_on_error": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    ).parser


# ---------------------------------------------------------------------- the file


class _Loader(yaml.SafeLoader):
    """YAML without its traps: a key that is there twice is an error, and only true and false are booleans."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name = str(self.construct_object(key))
            if name in names:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name!r} is there twice; give each a name of its own", problem_mark=key.start_mark
                )
            names.add(name)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^([Tt]rue|[Ff]alse|TRUE|FALSE)$"), list("tTfF"))


def _read(path: Path) -> dict[str, Any]:
    try:
        given = yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.constructor.ConstructorError as error:
        line = 1 + error.problem_mark.line if error.problem_mark else 1
        raise UserError(f"{path}: line {line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected the keys {', '.join(KEYS)}, found {type(given).__name__}")
    if unknown := [key for key in given if key not in KEYS]:
        raise UserError(f"{path}: there is no key {unknown[0]}; expected {', '.join(KEYS)}")
    return given


def _mapping(path: Path, given: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = given.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key}: expected names with values, found {value!r}")
    return {str(name): own for name, own in value.items()}


def _text(path: Path, given: Mapping[str, Any], key: str) -> str:
    value = given.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{path}: {key}: expected a text, found {value!r}")
    return value


def _list_of_text(path: Path, value: Any, key: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(own, str) and own for own in values):
        raise UserError(f"{path}: {key}: expected a text or a list of texts, found {value!r}")
    return values


def _commands(path: Path, value: Any) -> tuple[str, ...]:
    commands = _list_of_text(path, value, "prepare")
    for command in commands:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UserError(f"{path}: prepare: {command}: {error}") from error
        if not words:
            raise UserError(f"{path}: prepare: expected commands, found {command!r}")
    return tuple(commands)


def _unique(path: Path, names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: there are {names.count(name)} {what} {name!r}; give each a name of its own")


def _seeds(path: Path, value: Any) -> tuple[int, ...]:
    seeds = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{path}: seeds: expected how many, or a list of seeds ≥ 0, found {value!r}")
    _unique(path, [str(seed) for seed in seeds], "seeds")
    return tuple(seeds)


def _metrics(path: Path, given: Mapping[str, Any]) -> tuple[Metric, ...]:
    if not given:
        raise UserError(f"{path}: metrics: expected labels with log keys, such as loss: loss/mixed, found none")
    return tuple(Metric(label, tuple(_list_of_text(path, keys, "metrics"))) for label, keys in given.items())


# ---------------------------------------------------------------------- cells


def _label(name: str, point: Mapping[str, Any]) -> str:
    """Such as `DPO, beta=0.1`: an option's last word says enough where it is read beside its siblings."""
    values = [f"{key.rpartition('.')[2]}={_shown(value)}" for key, value in point.items()]
    return ", ".join([*([name] if name else []), *values])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _baselines(path: Path, baseline: Any, labels: Mapping[str, list[str]]) -> dict[str, str | None]:
    """Each cell's baseline: of the same grid point where it is one of `cells`, else the one point of that name."""
    every = [label for own in labels.values() for label in own]
    if baseline is None:
        return dict.fromkeys(every)
    if not isinstance(baseline, str | int | float):
        raise UserError(f"{path}: baseline: expected the name of a cell, found {baseline!r}")
    baseline = str(baseline)
    if baseline in labels:
        return {label: labels[baseline][number] for own in labels.values() for number, label in enumerate(own)}
    if baseline not in every:
        raise UserError(f"{path}: baseline: there is no cell {baseline!r}; expected one of {', '.join(every)}")
    return dict.fromkeys(every, baseline)


def _refuse_own(where: str, options: Mapping[Any, Any]) -> None:
    for key in flat_options(options):
        if key.removesuffix("+") in OWN:
            raise UserError(f"{where}: {key} is not a cell's to set: {OWN[key.removesuffix('+')]}")


def _of_command_line(words: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` → options."""
    options = {}
    for word, after in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            try:
                options[key] = yaml.load(value if equals else after, _Loader)
            except yaml.YAMLError:  # a text
                options[key] = value
    return options


def _arguments(path: Path, where: str, options: Any) -> list[str]:
    """Options → command line. A `config` is looked for beside the grid's file, and comes first."""
    if not isinstance(options, dict):
        raise UserError(f"{path}: {where}: expected options with values, found {options!r}")
    _refuse_own(f"{path}: {where}", options)
    files = _list_of_text(path, options.get("config") or [], f"{where}: config")
    found = [path.parent / file for file in files]
    if missing := [file for file in found if not file.is_file()]:
        raise UserError(f"{path}: {where}: config {missing[0]}: there is no such file")
    values = {key: value for key, value in options.items() if key != "config"}
    return [*(f"--config={file}" for file in found), *(f"--{key}={_shown(value)}" for key, value in values.items())]


def _parsed(path: Path, cell: Cell, parser: LightningArgumentParser) -> Cell:
    """The cell as `bvpo.fit` reads it. Raises UserError where it does not."""
    try:
        config = parser.parse_args(list(cell.arguments))
    except ArgumentError as error:
        raise UserError(f"{path}: cell {cell.name}: {' '.join(str(error).split())}") from error
    if config.trainer.logger is False:
        raise UserError(f"{path}: cell {cell.name}: a config sets trainer.logger to false: {OWN['trainer.logger']}")
    settings = parser.dump(config, skip_none=False)
    resolved = yaml.safe_load(settings)
    model, mixing = resolved["model"], resolved["model"]["mixing"].get("init_args", {})
    caches = [model["policy"], model["reference"], mixing.get("anchor"), resolved["trainer"]["precision"]]
    steps = config.trainer.max_steps
    return replace(
        cell,
        settings=settings,
        steps=steps if steps > 0 else None,
        caches=json.dumps([caches, resolved["data"]], default=str),
    )
