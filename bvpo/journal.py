"""An append-only file of JSON records that survives being killed.

A record is a line. What is whole on the disk is kept, a line that a kill has torn is cut off at the next start, and a
record is read back through its place in the file, so that memory holds keys and places and not the records.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from bvpo.errors import UserError

NO_FIELDS: Mapping[str, type] = MappingProxyType({})
SYNC_SECONDS = 5.0  # what a power cut may cost; a killed process loses nothing


class Journal:
    """The records of all of a folder's files of one name, and one file of it to append to.

    Several machines may write into one folder, each its own file: `responses.jsonl`, `responses.2-of-8.jsonl`.

    Args:
        folder: Created where it does not exist.
        name: Of the files; all `name*.jsonl` are read.
        key: What a record is found by. A key that comes again is a repetition, and the first record stands.
        part: Distinguishes this writer's file.
        fields: What each record must hold, by name, and of which type.

    Raises:
        UserError: Another process writes this file, it cannot be written, or a line before the last one is no record.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        key: Callable[[dict[str, Any]], Hashable],
        part: str = "",
        fields: Mapping[str, type] = NO_FIELDS,
    ) -> None:
        self.path, self._key = folder / f"{name}{f'.{part}' if part else ''}.jsonl", key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)  # nothing waits in memory for a disk that is full
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _cut_torn_line(self.path)
            self._file.seek(0, os.SEEK_END)
            self._places: dict[Hashable, tuple[Path, int]] = {}
            for path in sorted(folder.glob(f"{name}*.jsonl")):
                for place, found in _records(path, key, fields):
                    self._places.setdefault(found, (path, place))
        except BaseException as error:
            self._file.close()  # and the lock with it
            if isinstance(error, BlockingIOError):
                busy = f"{self.path}: another process is writing this file; wait for it, or stop it"
                raise UserError(busy) from None
            if isinstance(error, OSError):
                raise UserError(f"{self.path}: cannot be locked or read: {error.strerror}") from error
            raise
        self._synced = time.monotonic()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def append(self, record: dict[str, Any]) -> None:
        """Write one record. Raises UserError where the disk takes no more."""
        place = self._file.tell()
        try:
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            while line:
                line = line[self._file.write(line) :]
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), place)  # what comes next does not stand behind half a record
                self._file.seek(place)
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}. What is in it is kept: make room and start again"
            ) from error
        self._places.setdefault(self._key(record), (self.path, place))

    def __getitem__(self, key: Hashable) -> dict[str, Any]:
        path, place = self._places[key]
        with path.open("rb") as file:
            file.seek(place)
            record: dict[str, Any] = json.loads(file.readline())
        return record

    def sync(self) -> None:
        """Wait until the disk has everything."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.sync()
        finally:
            self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Leave out what stands behind the last line break: a record whose writer was killed."""
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - (1 << 16))
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def _records(
    path: Path, key: Callable[[dict[str, Any]], Hashable], fields: Mapping[str, type]
) -> Iterator[tuple[int, Hashable]]:
    """Places and keys of a file's records; a torn last line, which another writer is still at, is left out."""
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                found = key(record)
                if wrong := [field for field, kind in fields.items() if not isinstance(record[field], kind)]:
                    raise TypeError(wrong)
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{path}, line {number}: expected one JSON record, found {line[:40]!r}: the file is damaged; "
                    "delete this line, and what it held is made anew"
                ) from None
            yield place, found
            place += len(line)
