"""`--data.train lab/pairs`: rows from a Hub, read by the real clients of `datasets` and `huggingface_hub`.

The Hub is a server of this file, which speaks the part of the Hub's API that reading a data set takes. A fresh process
reaches it as its HTTP proxy: every request of every client then comes here, whatever host it is for, and no name is
looked up.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets
import pytest

from bvpo.pairs import load_rows, tokenize_rows
from bvpo.policy import load_tokenizer

MODEL = "builtin:tiny_reasoner"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIGURATIONS = """---
configs:
- config_name: short
  data_files: [{split: train, path: short.parquet}]
- config_name: long
  data_files: [{split: train, path: long.parquet}]
---
"""


def built_in_rows() -> datasets.Dataset:
    """Rows with every column that the sampler writes."""
    return load_rows(MODEL).select(range(4))


@dataclass(frozen=True)
class Repository:
    """A data set's files by their paths; `refused` is the status and error code that every request gets instead."""

    files: dict[str, bytes] = field(default_factory=dict)
    refused: tuple[int, str] | None = None


def repositories() -> dict[str, Repository]:
    buffer = BytesIO()
    built_in_rows().to_parquet(buffer)
    parquet, rows = buffer.getvalue(), built_in_rows().to_list()
    return {
        "lab/pairs": Repository({"data/train-00000-of-00001.parquet": parquet}),
        "lab/lines": Repository({"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}),
        "lab/no-train": Repository({"data/test.parquet": parquet, "data/validation.parquet": parquet}),
        "lab/two": Repository(
            {"README.md": CONFIGURATIONS.encode(), "short.parquet": parquet, "long.parquet": parquet}
        ),
        "lab/damaged": Repository({"train.parquet": parquet[:-20]}),
        "lab/no-data": Repository({".gitattributes": b"*.parquet filter=lfs\n"}),
        "lab/gated": Repository(refused=(401, "GatedRepo")),
        "lab/not-granted": Repository(refused=(403, "GatedRepo")),
        "lab/private": Repository(refused=(401, "RepoNotFound")),
        "lab/missing": Repository(refused=(404, "RepoNotFound")),
    }


class Hub(BaseHTTPRequestHandler):
    """The Hub's answers about `repositories`, which a subclass brings."""

    repositories: dict[str, Repository]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if (match := re.fullmatch(r"/(?:api/)?datasets/(\w+/[\w-]+)(?:/([\w-]+)/(\w+))?/?(.*)", path)) is None:
            return self.answer(404)
        name, kind, _, inside = match.groups()
        repository = self.repositories[name]
        if repository.refused is not None:
            return self.answer(repository.refused[0], code=repository.refused[1])
        if kind == "resolve":
            if inside in repository.files:
                return self.answer(200, repository.files[inside])
            return self.answer(404, code="EntryNotFound")
        if kind == "tree":
            listed = folder(repository.files, inside)
            return self.answer(200, listed) if listed else self.answer(404, code="EntryNotFound")
        if kind == "paths-info":
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            return self.answer(200, [described(path, repository.files[path]) for path in asked])
        siblings = [{"rfilename": path} for path in repository.files]
        return self.answer(200, {"id": name, "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_POST = do_GET

    def answer(self, status: int, body: Any = b"", code: str = "") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{object_id(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


def folder(files: dict[str, bytes], name: str) -> list[dict[str, Any]]:
    """A folder's own files and folders."""
    prefix = f"{name}/" if name else ""
    inside = {path: content for path, content in files.items() if path.startswith(prefix)}
    folders = sorted({prefix + path.removeprefix(prefix).split("/")[0] for path in inside} - set(inside))
    own = [described(path, content) for path, content in inside.items() if "/" not in path.removeprefix(prefix)]
    return own + [{"type": "directory", "path": path, "oid": object_id(path.encode())} for path in folders]


def described(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": object_id(content)}


def object_id(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


# --- Asking it --------------------------------------------------------------------------------------------------------

ASK = """
import json, sys, time
from bvpo.errors import UserError
from bvpo.reading import load_rows

time.sleep = lambda seconds: None  # the Hub's client waits 23 s in all between its attempts
answers = {}
for source in sys.argv[1:]:
    try:
        answers[source] = load_rows(source).to_list()
    except UserError as error:
        answers[source] = str(error)
print(json.dumps(answers))
"""


def ask(sources: list[str], port: int, home: Path, **environment: str) -> dict[str, Any]:
    """Each source's rows or, where it is refused, the message; asked in a process of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {name: value for name, value in own.items() if not name.lower().endswith("_proxy")}
    own |= {"HF_ENDPOINT": "http://hub.test", "HTTP_PROXY": f"http://127.0.0.1:{port}", "HF_HOME": str(home)}
    command = [sys.executable, "-c", ASK, *sources]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    served = repositories()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHub", (Hub,), {"repositories": served})) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield ask(list(served), server.server_port, tmp_path_factory.mktemp("hub"))
        server.shutdown()


@pytest.fixture
def closed_port() -> int:
    """A port that nobody listens on any more."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("name", ["lab/pairs", "lab/lines"])
def test_a_data_set_of_the_hub_gives_the_rows_of_its_file(name: str, answers: dict[str, Any]) -> None:
    rows, expected = datasets.Dataset.from_list(answers[name]), built_in_rows()
    assert rows.to_list() == expected.to_list()
    tokenizer = load_tokenizer(MODEL)
    assert tokenize_rows(rows, tokenizer, name).to_list() == tokenize_rows(expected, tokenizer, MODEL).to_list()


NOWHERE = "there is no such data set on the Hub, or it is private: check the id, or log in with `hf auth login`"
REFUSED = {  # data set → what the message holds
    "lab/missing": [NOWHERE],
    "lab/private": [NOWHERE],
    "lab/gated": ["a gated data set: ask for access at", "log in with `hf auth login`"],
    "lab/not-granted": ["a gated data set: ask for access at https://huggingface.co/datasets/lab/not-granted"],
    "lab/no-train": ["has no such split; it has ", "test", "validation"],
    "lab/two": ["has several configurations, short, long"],
    "lab/no-data": ["holds no data files"],
    "lab/damaged": ["cannot be read: Parquet magic bytes not found"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_does_not_give_is_refused_in_a_line(name: str, answers: dict[str, Any]) -> None:
    message = answers[name]
    assert message.startswith(f"{name}: ") and all(part in message for part in REFUSED[name]), message
    assert "\n" not in message and len(message) < 300


def test_a_hub_out_of_reach_is_said_in_a_line(closed_port: int, tmp_path: Path) -> None:
    message = ask(["lab/pairs"], closed_port, tmp_path)["lab/pairs"]
    assert message.startswith("lab/pairs: the Hub cannot be reached") and "\n" not in message


def test_the_offline_switch_is_named(closed_port: int, tmp_path: Path) -> None:
    message = ask(["lab/pairs"], closed_port, tmp_path, HF_HUB_OFFLINE="1")["lab/pairs"]
    assert message.startswith("lab/pairs: the Hub cannot be reached") and "HF_HUB_OFFLINE" in message
