"""Mathematical answers, checked by math-verify in a process of its own, which ends when time is up.

math-verify bounds its time by SIGALRM, which works in a main thread only and interrupts no big-integer arithmetic. This
file is both sides: `Checker` asks, and the file run as a program answers. It imports nothing of the package, so that
the program starts quickly.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from threading import Timer
from typing import IO, cast


class Checker:
    """The process, as a context; it is replaced where a check takes too long.

    Args:
        timeout: Seconds for one check.

    Attributes:
        expired: Checks that took too long, or ended the process.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.expired = timeout, 0

    def __enter__(self) -> Checker:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def is_correct(self, gold: str, answer: str) -> bool | None:
        """As `is_correct` below; False where time is up."""
        timer = Timer(self.timeout, self._end)
        timer.start()
        print(json.dumps([gold, answer]), file=self.process.stdin, flush=True)
        reply = self._output.readline()  # "" when the process has ended
        timer.cancel()
        timer.join()
        if self._ended or not reply:
            self._stop()
            self._start()
        if not reply:
            self.expired += 1
            return False
        return cast(bool | None, json.loads(reply))

    @property
    def _output(self) -> IO[str]:
        return cast(IO[str], self.process.stdout)

    def _start(self) -> None:
        program = [sys.executable, "-P", __file__]  # -P: modules beside this file are none of the program's
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ended = False
        if not self._output.readline():
            self._stop()
            raise RuntimeError(f"{Path(__file__).name} did not start")

    def _stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _end(self) -> None:
        self._ended = True
        self.process.kill()


def is_correct(gold: str, answer: str) -> bool | None:
    """Whether the answer is mathematically equal to the gold answer; None where the gold answer cannot be parsed.

    Gold without `$` or `\\boxed` is taken as one formula. Which formula of an answer counts is math-verify's default.
    """
    from math_verify import parse, verify

    formula = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
    right = parse(formula, parsing_timeout=None)
    if all(isinstance(part, str) for part in right):  # its fall-back for what it cannot parse
        return None
    return bool(verify(right, parse(answer, parsing_timeout=None), timeout_seconds=None))


def main() -> None:
    """Says that it is ready, then answers each line [gold, answer] on stdin, all in JSON."""
    logging.disable()  # that time is unbounded here is known
    print(json.dumps(is_correct("1", "1")), flush=True)
    for line in sys.stdin:
        print(json.dumps(is_correct(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
