"""Evaluate a model: `python -m bvpo.evaluate --config experiments/evaluate/tiny_reasoner.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from bvpo.commands import exit_code, options_parser, read_options
from bvpo.evaluation import Evaluation, run
from bvpo.evaluation_report import print_figures


def parser() -> ArgumentParser:
    """The command line: the fields of `Evaluation`."""
    own = options_parser("evaluate", __doc__)
    own.add_class_arguments(Evaluation)
    return own


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0; 2 after an error that the user can mend; 130 when interrupted."""

    def work() -> None:
        options, progress = read_options(parser(), Evaluation, args)
        results = run(options, progress)
        print_figures(results.figures, results.judges)
        for note in results.notes:
            print(note)
        print(f"results  {options.output}/results.json")

    return exit_code(work, "what has been answered is kept; the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
