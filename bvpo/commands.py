"""What the command lines share: files of options, and how a program starts and ends."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

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


def begin() -> None:
    """What every program starts with: Lightning's remarks are hidden, and stdout takes every character.

    Where stdout is not UTF-8, a `?` stands for what it does not have. stderr escapes such characters by itself.
    """
    quiet_lightning()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's and a test's may be another
        sys.stdout.reconfigure(errors="replace")


def exit_code(work: Callable[[], int | None], interrupted: str) -> int:
    """Do the work. What it returns, or 0; 2 after an error that the user can mend; 130 when interrupted.

    Args:
        interrupted: What an interruption leaves.
    """
    begin()
    try:
        return work() or 0
    except (UserError, MisconfigurationException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UnicodeDecodeError as error:
        if (message := undecoded_options(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130


def undecoded_options(error: Exception) -> str | None:
    """What to tell the user where a file of options is in another encoding than the system's; None for other errors."""
    if not isinstance(error, UnicodeDecodeError):
        return None
    modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if "jsonargparse._paths" not in modules:  # which reads such files alone, in the system's encoding
        return None
    return (
        f"a --config file cannot be read: byte {error.object[error.start]:#x} at {error.start} is no {error.encoding}; "
        "save the file as UTF-8, and start with PYTHONUTF8=1 in the environment"
    )
