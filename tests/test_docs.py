"""What the docs say can be done: commands are parsed by their own parsers, files, links and pictures are there.

Nothing is trained, sampled or fetched.
"""

from __future__ import annotations

import ast
import configparser
import importlib.util
import json
import os
import pydoc
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from bvpo import ablate, derive, evaluate, export, sample, stochasticity
from bvpo.data import PairData
from bvpo.doctor import DoctorCLI
from bvpo.fit import FitCLI
from bvpo.grid import load_grid
from bvpo.module import BVPO
from bvpo.rows import check_row

ROOT = Path(__file__).parent.parent
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*sorted(ROOT.glob("*.md")), *DOCS, ROOT / "experiments" / "README.md"]
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"cat > (\S+) <<'YAML'\n(.*?)^YAML$", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {"MODEL.yaml": "r1_distill_qwen_7b.yaml", " S": " 0", " T": " 1.0"}  # a name, a seed, a temperature

Parse = Callable[[list[str]], object]


# ---------------------------------------------------------------------- reading the docs


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of a language."""
    return [body for language, body in FENCE.findall(text) if language in languages]


def lines_of_code(text: str) -> Iterator[str]:
    """Lines of shell in fenced and indented blocks, and inline code, which may be wrapped."""
    prose = FENCE.sub("", text)
    indented = "\n".join(line[4:] for line in prose.splitlines() if line.startswith("    "))
    for block in [HEREDOC.sub("", "\n".join(blocks(text, "bash", ""))), indented]:
        yield from block.replace("\\\n", " ").splitlines()
    for span in re.findall(r"`([^`]+)`", prose):
        yield " ".join(span.split())


def words_of(line: str) -> list[str]:
    """A shell line's words: comments, dots and the brackets around what may be left out are gone."""
    for placeholder, value in PLACEHOLDERS.items():
        line = re.sub(rf"{placeholder}(?!\w)", value, line)
    words = shlex.split(line.replace("--config …", "").replace("…", ""), comments=True)
    words = [word.removeprefix("[") if word.startswith("[-") else word for word in words]
    return [word if "[" in word else word.removesuffix("]") for word in words]


def programs() -> dict[str, list[str]]:
    """Each different call of a module of this package or of a benchmark → its words from the program's name on."""
    found: dict[str, list[str]] = {}
    for page, text in PAGES.items():
        for line in lines_of_code(text):
            if "-m bvpo." not in line and "python benchmarks/" not in line:
                continue
            for part in re.split(r"&&|(?<=\s)\|(?=\s)", line):
                words = words_of(part)
                at = next((i for i, word in enumerate(words) if re.match(r"bvpo\.\w|benchmarks/\w+\.py", word)), None)
                if at is not None:
                    found.setdefault(" ".join(words[at:]), [page, *words[at:]])
    return found


PROGRAMS = programs()


# ---------------------------------------------------------------------- commands


class ParsedFit(FitCLI):
    """Its parser, without starting anything."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...


class ParsedDoctor(DoctorCLI):
    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...


def lightning_parser(cli: type[FitCLI]) -> LightningArgumentParser:
    return cli(BVPO, PairData, run=False, args=[], auto_configure_optimizers=False).parser


def parse_grid(args: list[str]) -> object:
    own, others = ablate.parse(args)
    return load_grid(own.grid, others, own.output, own.seeds)


@pytest.fixture(scope="module")
def fit_parser() -> LightningArgumentParser:
    return lightning_parser(ParsedFit)


@pytest.fixture(scope="module")
def parsers(fit_parser: LightningArgumentParser) -> dict[str, Parse]:
    """What takes each command's words; an option that does not exist is a SystemExit."""
    return {
        "fit": fit_parser.parse_args,
        "doctor": lightning_parser(ParsedDoctor).parse_args,
        "sample": sample.parser().parse_args,
        "evaluate": evaluate.parser().parse_args,
        "derive": derive.parser().parse_args,
        "stochasticity": stochasticity.options,
        "ablate": parse_grid,
        "export": export.main,  # of a run without checkpoints: it ends with a message, and not by the parser
        "assets.build_tiny_reasoner": lambda args: None,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's root as a reader of the docs has it: with the files that they tell to write, and one run."""
    root = tmp_path_factory.mktemp("root")
    (root / "runs" / "version_0").mkdir(parents=True)
    shutil.copy(ROOT / "experiments" / "alpaca.yaml", root / "runs" / "version_0" / "config.yaml")
    for name in ("experiments", "benchmarks", "docs"):
        (root / name).symlink_to(ROOT / name)
    for text in PAGES.values():
        for name, content in HEREDOC.findall(text):
            (root / name).write_text(content)
    return root


@pytest.mark.parametrize("command", PROGRAMS)
def test_a_command_is_taken_by_its_parser(
    command: str, parsers: dict[str, Parse], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    page, program, *args = PROGRAMS[command]
    if program.startswith("benchmarks/"):
        source = Path(program).read_text()
        for flag in [word.partition("=")[0] for word in args if word.startswith("--")]:
            known = re.search(rf"add_argument\(\s*f?\"{flag}\"", source) or 'f"--{name}' in source
            assert known, f"{page}: {program} has no {flag}"
        return
    name = program.removeprefix("bvpo.")
    assert importlib.util.find_spec(program) and name in parsers, f"{page}: there is no command {program}"
    if args:  # without, the command is spoken of
        parsers[name](args)


def test_commands_are_found() -> None:
    """In all three forms; a change of the reading above must not leave the test without its subject."""
    assert len(PROGRAMS) > 50
    assert any("torchrun" in text for text in PAGES.values())
    assert {words[1] for words in PROGRAMS.values()} >= {f"bvpo.{name}" for name in ("fit", "ablate", "evaluate")}


def test_the_gate_finds_the_test_command() -> None:
    """.ci/run takes the block behind the comment, and then ruff and mypy of the same environment."""
    block = PAGES["README.md"].partition("<!-- test command -->")[2].lstrip()
    body = FENCE.findall(block)[0][1]
    assert block.startswith("```bash") and body.count("\n") == 1
    assert ".venv/bin/python -m pytest -n auto --dist loadfile" in body


# ---------------------------------------------------------------------- names


def test_classes_are_there() -> None:
    for page, text in PAGES.items():
        for module, name in re.findall(r"\bbvpo\.(\w+)\.([A-Za-z_]+)\b(?!/)", text):
            assert pydoc.locate(f"bvpo.{module}.{name}"), f"{page}: bvpo.{module}.{name}"


def test_options_are_there(fit_parser: LightningArgumentParser) -> None:
    """Options of `bvpo.fit` by their dotted names: in code, on command lines, in prose."""
    known = fit_parser.get_defaults(skip_validation=True)
    for page, text in PAGES.items():
        for option in re.findall(r"`(?:--)?((?:model|data|trainer|checkpoint)\.[a-z_0-9]+)\b(?!\()", text):
            if option != "model.generate":  # of transformers
                assert option in known, f"{page}: bvpo.fit has no option {option}"


def test_extras_are_there() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for page, text in PAGES.items():
        for extra in re.findall(r"(?:bvpo|\.)\[([a-z0-9-]+)\]\"", text):
            assert extra in config["options.extras_require"], f"{page}: no extra {extra}"


# ---------------------------------------------------------------------- files and links


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    prose = FENCE.sub("", PAGES[page])
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"<img src=\"([^\"]+)\"", prose)
    for target in [target for target in targets if "://" not in target]:
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page: str) -> None:
    name = r"(?<![\w/.-])((?:docs|tests|benchmarks|experiments|notebooks|bvpo)/[\w./-]+\.(?:md|py|yaml|ipynb|svg))"
    for found in re.findall(name, PAGES[page]):
        assert found.endswith("MODEL.yaml") or (ROOT / found).exists(), f"{page}: {found}"


def test_every_page_is_in_the_reading_orders() -> None:
    names = {path.name for path in DOCS} - {"index.md"}
    assert names <= set(re.findall(r"\]\((\w+\.md)", PAGES["docs/index.md"]))
    assert names <= set(re.findall(r"\]\(docs/(\w+\.md)", PAGES["README.md"]))


def test_the_readme_has_every_file_of_the_package_once() -> None:
    table = PAGES["README.md"].partition("## Read the code")[2].partition("| --- | --- |")[2]
    listed = Counter(re.findall(r"`([\w/]+)`", table))
    package = ROOT / "bvpo"
    files = {str(path.relative_to(package).with_suffix("")) for path in package.rglob("*.py")}
    assert listed == Counter(name for name in files if not name.endswith("__init__"))


# ---------------------------------------------------------------------- messages


def texts_of(source: str) -> Iterator[str]:
    """All texts of a program, with `…` in place of what is put into them."""
    tree = ast.parse(source)
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


def test_messages_are_those_of_the_program() -> None:
    """What troubleshooting quotes with a space in it is said somewhere; a check's name and `…` alike."""
    said = [text for path in ROOT.glob("bvpo/*.py") for text in texts_of(path.read_text())]
    table = [line.split("|")[1] for line in PAGES["docs/troubleshooting.md"].splitlines() if line.startswith("| ")]
    elsewhere = {"Failed to load …/torchao/…", "error (process 3): …"}  # torchao; put together in two places
    quoted = {quote for cell in table for quote in re.findall(r"`([^`]+ [^`]+)`", cell)} - elsewhere
    assert len(quoted) > 40
    for quote in quoted:
        pattern = ".*".join(re.escape(part) for part in quote.split("…"))
        assert any(re.search(pattern, text, re.DOTALL) for text in said), quote


# ---------------------------------------------------------------------- what the docs tell to write


def test_rows_in_the_docs_can_be_trained_on() -> None:
    rows = [json.loads(block) for block in blocks(PAGES["docs/data.md"], "json")]
    assert rows
    for row in rows:
        check_row(row, "docs/data.md", stops=("<|im_end|>",))


def test_yaml_in_the_docs_is_a_configuration(fit_parser: LightningArgumentParser, tmp_path: Path) -> None:
    written: list[Any] = [yaml.safe_load(block) for text in PAGES.values() for block in blocks(text, "yaml")]
    assert written
    for number, config in enumerate(written):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(config))
        fit_parser.parse_args([f"--config={os.fspath(path)}"])
