"""What the command lines share: files of options, and how a program ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from jsonargparse import ArgumentParser

from bvpo.errors import UserError
from bvpo.runs import quiet_lightning

T = TypeVar("T")


def options_parser(program: str, description: str | None, progress: bool = True) -> ArgumentParser:
    """The parser of `python -m bvpo.PROGRAM`, to which the program adds its own options.

    Args:
        progress: Whether there are progress bars to turn off.
    """
    parser = ArgumentParser(prog=f"python -m bvpo.{program}", description=description)
    parser.add_argument("--config", action="config", help="A YAML file of the options below; a later one wins.")
    if progress:
        parser.add_argument("--progress", type=bool, default=True, help="Show progress bars.")
    return parser


def read_options(parser: ArgumentParser, kind: type[T], args: Sequence[str] | None) -> tuple[T, bool]:
    """The options, where they are the fields of a class, and whether to show progress bars."""
    given = parser.parse_args(args)
    progress = given.pop("progress")
    given.pop("config", None)
    return kind(**vars(parser.instantiate_classes(given))), progress


def exit_code(work: Callable[[], None], interrupted: str) -> int:
    """Do the work. 0; 2 after an error that the user can mend; 130 when interrupted.

    Args:
        interrupted: What an interruption leaves.
    """
    quiet_lightning()
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    return 0
