"""JSON to a server and back: what the network or a server breaks is tried again, within bounds; a refusal is not."""

from __future__ import annotations

import json
import math
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from itertools import count
from typing import Any, TypeVar
from urllib.parse import urlsplit

from bvpo.errors import UserError

T = TypeVar("T")
LONGEST = 1e8  # seconds; the operating system takes no timeout of much more


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Args:
        attempts: At one request, at most.
        seconds: From a request's first failure to the start of its last attempt, at most.
        first_delay: Seconds before the second attempt; twice that before the third, and so on, each shortened by a
            random part of up to a half, so that many requests do not come back at once.
        longest_delay: Seconds between two attempts, at most.
        connect: Seconds for a connection.
        answer: Seconds from a request to the last byte of its answer.

    Raises:
        UserError: One of these is no number of attempts, or no time.
    """

    attempts: int = 50
    seconds: float = 900.0
    first_delay: float = 0.5
    longest_delay: float = 30.0
    connect: float = 10.0
    answer: float = 1800.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise UserError(f"patience.attempts must be ≥ 1, got {self.attempts}")
        if not self.seconds >= 0:
            raise UserError(f"patience.seconds must be ≥ 0, got {self.seconds}")
        for name in ("first_delay", "longest_delay"):
            if not 0 <= getattr(self, name) <= LONGEST:
                raise UserError(f"patience.{name} must be ≥ 0 and ≤ {LONGEST:g} seconds, got {getattr(self, name)}")
        for name in ("connect", "answer"):
            if not 0 < getattr(self, name) <= LONGEST:
                raise UserError(f"patience.{name} must be > 0 and ≤ {LONGEST:g} seconds, got {getattr(self, name)}")


class Fault(Exception):
    """What the next attempt may not meet again.

    Attributes:
        delay: Seconds before the next attempt that the server has asked for.
    """

    def __init__(self, message: str, delay: float = 0.0) -> None:
        super().__init__(message)
        self.delay = delay


class Calls:
    """Requests that are under way and can be ended all at once, from another thread."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def end(self) -> None:
        self.ended.set()
        with self._lock:
            for channel in self._open:
                with suppress(OSError):  # the server may have closed it
                    channel.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def under_way(self, channel: socket.socket) -> Iterator[None]:
        with self._lock:
            self._open.add(channel)
        try:
            if self.ended.is_set():
                raise Fault("ended")
            yield
        finally:
            with self._lock:
                self._open.discard(channel)


class Remote:
    """Where requests go.

    Args:
        url: Of one resource; http or https.
        key: Sent as a bearer token unless empty; no message holds it.
        patience: When to give up.

    Raises:
        UserError: The URL is none, or the key cannot be sent.
    """

    def __init__(self, url: str, key: str, patience: Patience) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:  # a port that is none, a bracket too few
            host = None
        sendable = url.isascii() and url.isprintable() and not set(" ?#") & set(url)
        if not host or not sendable or parts.scheme not in ("http", "https"):
            raise UserError(f"{url}: not a server's URL; expected something like http://localhost:8000/v1")
        if any(not character.isprintable() or ord(character) > 255 for character in key):
            raise UserError(f"{url}: the key for it has a line break or another character that no header takes")
        self.url, self.patience, self._key = url, patience, key
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port, self._path = host, port, parts.path

    def post(self, calls: Calls, name: str, content: dict[str, Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer.

        Args:
            name: Of the request, for messages.
            read: Takes the answer's JSON; may raise Fault to have another attempt.

        Raises:
            UserError: The server refuses the request, or `patience` is at its end.
        """
        patience, body, jitter, failed = self.patience, json.dumps(content).encode(), random.Random(), math.inf
        for attempt in count(1):
            try:
                return read(self._attempt(calls, name, body))
            except Fault as error:
                fault, now = error, time.monotonic()
            failed = min(failed, now)
            delay = min(patience.longest_delay, patience.first_delay * 2.0 ** min(attempt - 1, 60))
            delay *= jitter.uniform(0.5, 1.0)
            left = patience.seconds - (now - failed)
            delay = max(delay, min(fault.delay, left))  # however long the server asks for, there is a last attempt
            if attempt >= patience.attempts or delay > left or calls.ended.wait(delay):
                break
        raise UserError(
            f"{self.url}: gave up on {name} after {attempt} attempts, {now - failed:.1f} s after the first one failed; "
            f"the last error: {fault}. What had been answered is kept: see to the server and start again"
        )

    def _attempt(self, calls: Calls, name: str, body: bytes) -> Any:
        try:
            status, delay, answer = self._exchange(calls, body)
        except (socket.gaierror, ssl.SSLCertVerificationError, UnicodeError) as error:  # a host's name may be none
            raise UserError(f"{self.url}: cannot be reached: {error}") from error
        except TimeoutError as error:
            limits = (
                f"no connection within {self.patience.connect} s, or no whole answer within {self.patience.answer} s"
            )
            raise Fault(limits) from error
        except (OSError, HTTPException) as error:
            raise Fault(f"{type(error).__name__}: {error}") from error
        if status in (408, 429) or status >= 500:
            raise Fault(f"status {status}: {self._message(answer)}", delay)
        if status != 200:
            raise UserError(f"{self.url}: refused {name} with status {status}: {self._message(answer)}")
        try:
            return json.loads(answer)
        except (RecursionError, ValueError) as error:
            raise Fault(f"an answer of {len(answer)} bytes that is no whole JSON ({error})") from error

    def _exchange(self, calls: Calls, body: bytes) -> tuple[int, float, bytes]:
        """Status, the seconds to wait that it names, and the answer."""
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection = self._kind(self._host, self._port, timeout=self.patience.connect)
        try:
            connection.connect()
            channel: socket.socket = connection.sock
            with calls.under_way(channel):
                deadline = time.monotonic() + self.patience.answer
                channel.settimeout(self.patience.answer)
                connection.request("POST", self._path, body, headers)
                parts = []
                with connection.getresponse() as response:
                    while part := response.read1(1 << 16):
                        parts.append(part)
                        left = deadline - time.monotonic()  # of the whole answer: each part may come in time
                        if left <= 0:
                            raise TimeoutError
                        channel.settimeout(left)
                    if response.length:
                        raise IncompleteRead(b"".join(parts), response.length)
                return response.status, _seconds(response.headers.get("Retry-After")), b"".join(parts)
        finally:
            connection.close()

    def _message(self, answer: bytes) -> str:
        """What a server says of an error, in its own words."""
        try:
            said = json.loads(answer)
            said = said.get("error", said)
            text = str(said["message"] if isinstance(said, dict) else said)
        except (AttributeError, KeyError, RecursionError, ValueError):
            text = answer.decode(errors="replace")
        return (text.replace(self._key, "…") if self._key else text)[:500].strip()


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header; 0 where it names a date or nothing."""
    value = (retry_after or "").strip()
    return min(float(value), LONGEST) if value.isascii() and value.isdigit() else 0.0
