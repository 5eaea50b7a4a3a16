"""Mathematical answers, checked by math-verify in a process of its own, which ends when time is up.

math-verify bounds its time by SIGALRM, which works in a main thread only and interrupts no big-integer arithmetic. This
file is both sides: `Checker` asks, and the file run as a program answers. It imports nothing of the package, so that
the program starts quickly.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from typing import IO, Any, cast

MEMORY = 4 << 30  # bytes that the process may take: some numbers are larger than any memory
GRACE = 5.0  # seconds beyond a check's own after which the process ends itself, its parent having been killed
SMALL = 1e-3  # nearer to 0, math-verify's rounding to 6 decimals leaves at most three digits of a number
CLOSE = 5e-6  # the most, relative to it, that a number of six digits is off by


class Checker:
    """The process, as a context; it is replaced where a check takes too long.

    Args:
        timeout: Seconds for one check.

    Attributes:
        expired: Checks that took too long, or ended the process.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.expired, self._closed = timeout, 0, False

    def __enter__(self) -> Checker:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def close(self) -> None:
        """End the process for good, in the middle of a check too, which another thread may wait for."""
        self._closed = True
        self.process.kill()

    def is_correct(self, gold: str, answer: str) -> bool | None:
        """As `is_correct` below; False where time is up."""
        timer = Timer(self.timeout, self._end)
        timer.start()
        try:
            print(json.dumps([gold, answer]), file=self.process.stdin, flush=True)
            reply = self._output.readline()  # "" when the process has ended
        finally:
            timer.cancel()
            timer.join()
        if (self._ended or not reply) and not self._closed:
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
        # -P: modules beside this file are none of the program's. A session of its own: Ctrl-C is for the parent alone
        program = [sys.executable, "-P", __file__, str(self.timeout + GRACE)]
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
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


def check_all(
    pairs: Sequence[tuple[str, str]], timeout: float, workers: int
) -> Iterator[tuple[int, bool | None, bool]]:
    """(index of a pair of gold and answer, as `is_correct` below, whether time was up), by rising index.

    Args:
        timeout: Seconds for one pair.
        workers: Processes that check at the same time. May be called in any thread.
    """
    idle: SimpleQueue[Checker] = SimpleQueue()

    def check(index: int) -> tuple[int, bool | None, bool]:
        checker = idle.get()
        try:
            expired = checker.expired
            verdict = checker.is_correct(*pairs[index])
            return index, verdict, checker.expired > expired
        finally:
            idle.put(checker)

    with ExitStack() as stack:
        count = min(workers, len(pairs))
        checkers = [stack.enter_context(Checker(timeout)) for _ in range(count)]
        for checker in checkers:
            idle.put(checker)
        if count:
            pool = stack.enter_context(ThreadPoolExecutor(count))
            for checker in checkers:
                stack.callback(checker.close)  # before the pool waits for its threads: Ctrl-C waits for no check
            yield from pool.map(check, range(len(pairs)))


def is_correct(gold: str, answer: str) -> bool | None:
    """Whether the answer is mathematically equal to the gold answer; None where the gold answer cannot be parsed.

    Gold without `$` or `\\boxed` is taken as one formula. Which formula of an answer counts is math-verify's default.
    Numbers below `SMALL` must agree in six digits, too: math-verify says of any two below 1e-7 that they are equal.
    """
    from math_verify import parse, verify

    formula = gold if re.search(r"(?<!\\)\$|\\boxed", gold) else f"${gold}$"
    right = parse(formula, parsing_timeout=None)
    if all(isinstance(part, str) for part in right):  # its fall-back for what it cannot parse
        return None
    found = parse(answer, parsing_timeout=None)
    return any(
        verify(own, other, timeout_seconds=None) and not equal_by_rounding_alone(own, other)
        for own in right
        for other in found
    )


def equal_by_rounding_alone(right: Any, found: Any) -> bool:
    """Whether of two expressions that math-verify finds equal one has a small number that the other does not have.

    Args:
        right, found: Of what math-verify's `parse` gives. False where their numbers are not known.
    """
    try:
        ours = _numbers(right)
        if not any(abs(own) < SMALL for own in ours):
            return False
        theirs = _numbers(found)
        return bool(theirs) and (_has_more(ours, theirs) or _has_more(theirs, ours))
    except Exception:  # sympy may raise anything over an expression: math-verify's word stands then
        return False


def _has_more(numbers: list[Any], others: list[Any]) -> bool:
    small = (own for own in numbers if 0 < abs(own) < SMALL)
    return any(all(abs(own - other) > CLOSE * abs(own) for other in others) for own in small)


def _numbers(part: Any) -> list[Any]:
    """Values of an expression, of a relation's right side, or of all that a set, tuple or matrix holds.

    [] where there is none, or one is not known, as with a variable in it.
    """
    from math_verify.grader import is_relation, take_first_relation, take_last_relation
    from sympy import Expr, Float, MatrixBase, Set, Tuple, UnevaluatedExpr
    from sympy.logic.boolalg import BooleanAtom

    if is_relation(part):
        return _numbers(take_last_relation(part).rhs) if take_first_relation(part).lhs.is_Symbol else []
    if isinstance(part, MatrixBase | Set | Tuple):
        held = part.flat() if isinstance(part, MatrixBase) else part.args
        inner = [_numbers(own) for own in held if not isinstance(own, BooleanAtom)]  # that an interval is open
        return [value for own in inner for value in own] if all(inner) else []
    if not isinstance(part, Expr) or part.free_symbols:
        return []
    value = part.replace(UnevaluatedExpr, lambda own: own).evalf(30)  # a percent sign is an unevaluated 1/100
    return [Float(0) if isinstance(value, Float) and value._prec == 1 else value]  # no digit is certain: it is 0


def main(limit: float) -> None:
    """Says that it is ready, then answers each line [gold, answer] on stdin, all in JSON, until stdin is closed.

    Args:
        limit: Seconds for one check, after which the system ends the process, which no arithmetic holds up.
    """
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most), most))
    logging.disable()  # that time is unbounded here is known
    print(json.dumps(is_correct("1", "1")), flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limit)
        reply = json.dumps(is_correct(*json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
