"""vLLM and servers: what they are asked, what becomes of their answers, and of a server's faults.

vLLM needs a GPU, so here a stand-in with the same few names records what it is called with: these tests show that the
requests are right, not that vLLM is. The server is a real one over HTTP, with faults planted in its answers.
"""

from __future__ import annotations

import json
import math
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bvpo.backends import VLLM, Server
from bvpo.errors import UserError
from bvpo.generation import Completion, Decoding, Request, Transformers, generate
from bvpo.policy import load_policy
from bvpo.remote import Patience

STOPS = [3, 4]
DECODING = Decoding(temperature=0.7, top_p=0.9, max_new_tokens=5)
REQUESTS = [Request([10, 20 + number], 1000 + number) for number in range(12)]
SHORT = Patience(attempts=6, seconds=4, first_delay=0.01, longest_delay=0.05, connect=1, answer=1)


def answer_to(prompt: list[int], seed: int, limit: int) -> tuple[list[int], str, list[float]]:
    """A made-up response, different for each prompt and seed: its tokens, why it ended, their log-probabilities."""
    if seed % 3 == 0:
        return [prompt[-1]] * limit, "length", [-0.25] * limit
    return [prompt[-1], seed % 1000 + 5, 3], "stop", [-0.5, -1.0, -seed / 1000]


def expected(request: Request, logprob: bool = True) -> Completion:
    tokens, reason, logprobs = answer_to(list(request.prompt), request.seed, DECODING.max_new_tokens)
    return Completion(tokens, reason, sum(logprobs) if logprob else None)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- vLLM


@dataclass
class FakeEngine:
    """Answers the latest request first, two a step; the parts of vLLM's engine that the back end uses."""

    arguments: SimpleNamespace
    asked: dict[str, tuple[dict[str, Any], SimpleNamespace]] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    model_config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(max_model_len=100))

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SimpleNamespace) -> None:
        self.asked[request_id] = prompt, params
        self.waiting.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[SimpleNamespace]:
        outputs = []
        for name in [self.waiting.pop() for _ in range(min(2, len(self.waiting)))]:
            prompt, params = self.asked[name]
            tokens, reason, logprobs = answer_to(prompt["prompt_token_ids"], params.seed, params.max_tokens)
            end = SimpleNamespace(token_ids=tuple(tokens), finish_reason=reason, cumulative_logprob=sum(logprobs))
            outputs.append(SimpleNamespace(request_id=name, finished=True, outputs=[end]))
        return outputs

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """A module named vllm; the engines made from it."""
    made: list[FakeEngine] = []

    def from_engine_args(arguments: SimpleNamespace) -> FakeEngine:
        made.append(FakeEngine(arguments))
        return made[-1]

    vllm, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.__dict__.update(EngineArgs=SimpleNamespace, LLMEngine=SimpleNamespace(from_engine_args=from_engine_args))
    params.__dict__.update(SamplingParams=SimpleNamespace, RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return made


def test_vllm_gets_ids_and_a_seed_for_each_response(engines: list[FakeEngine]) -> None:
    backend = VLLM("some/model", tensor_parallel_size=2, dtype="bfloat16", gpu_memory_utilization=0.8, max_model_len=99)
    answers = list(backend.complete(REQUESTS, DECODING, STOPS))
    assert [index for index, _ in answers] != list(range(12))
    assert dict(answers) == {index: expected(request) for index, request in enumerate(REQUESTS)}
    [engine] = engines
    assert vars(engine.arguments) == {
        "model": "some/model",
        "tensor_parallel_size": 2,
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.8,
        "max_model_len": 99,
        "logprobs_mode": "processed_logprobs",
    }
    asked = list(engine.asked.values())
    assert [prompt for prompt, _ in asked] == [{"prompt_token_ids": list(request.prompt)} for request in REQUESTS]
    assert [params.seed for _, params in asked] == [request.seed for request in REQUESTS]
    for _, params in asked:
        assert (params.n, params.temperature, params.top_p, params.max_tokens) == (1, 0.7, 0.9, 5)
        assert (params.stop_token_ids, params.ignore_eos, params.logprobs) == (STOPS, True, 0)
    assert engine.aborted == []


def test_vllm_greedy_responses_have_no_uncertainty(engines: list[FakeEngine]) -> None:
    answers = VLLM("some/model").complete(REQUESTS, Decoding(0.0, max_new_tokens=5), STOPS)
    assert {completion.logprob for _, completion in answers} == {0.0}


def test_vllm_requests_end_with_the_iterator(engines: list[FakeEngine]) -> None:
    answers = VLLM("some/model").complete(REQUESTS, DECODING, STOPS)
    index, _ = next(answers)
    answers.close()
    assert sorted(map(int, engines[0].aborted)) == [other for other in range(12) if other != index]


def test_vllm_refuses_what_it_cannot_answer(engines: list[FakeEngine]) -> None:
    backend = VLLM("some/model")
    with pytest.raises(UserError, match="request 1: the prompt is empty"):
        backend.complete([Request([], 0)], DECODING, STOPS)
    with pytest.raises(UserError, match=r"the model has 100 positions \(max_model_len\): shorten the prompt"):
        backend.complete([Request([5] * 96, 0)], DECODING, STOPS)
    with pytest.raises(UserError, match=r"ended by 'stop' at token \[3\]"):
        list(backend.complete(REQUESTS, DECODING, [4]))


def test_without_vllm_the_way_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r'pip install "bvpo\[vllm\]"'):
        VLLM("some/model")


# ---------------------------------------------------------------------- a server

Fault = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """Answers, or takes the next planted fault for this prompt."""
        own: FaultyServer = self.server  # type: ignore[assignment]
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with own.lock:
            own.asked.append(asked)
            own.headers.append(dict(self.headers))
            faults = own.faults.get(asked["prompt"][-1], [])
            fault = faults.pop(0) if faults else send
        fault(self, json.dumps(own.answer(asked)).encode())

    def log_message(self, *_: Any) -> None:
        pass


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: dict[int, list[Fault]] = {}  # by a prompt's last token
        self.answer: Callable[[dict[str, Any]], Any] = choice_to

    def handle_error(self, *_: Any) -> None:
        """A client that has gone is no news."""


def choice_to(asked: dict[str, Any]) -> dict[str, Any]:
    tokens, reason, logprobs = answer_to(asked["prompt"], asked["seed"], asked["max_tokens"])
    choice: dict[str, Any] = {"text": "…", "finish_reason": reason, "token_ids": tokens, "logprobs": None}
    if "logprobs" in asked:
        choice["logprobs"] = {"token_logprobs": logprobs}
    return {"choices": [choice]}


@contextmanager
def running(port: int = 0) -> Iterator[FaultyServer]:
    server = FaultyServer(port)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with running() as made:
        yield made


def client(port: int, patience: Patience = SHORT, concurrency: int = 4, **options: Any) -> Server:
    return Server(f"http://127.0.0.1:{port}/v1", "m", concurrency=concurrency, patience=patience, **options)


def send(handler: Handler, body: bytes, status: int = 200, length: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def status(code: int, said: bytes = b'{"error": {"message": "overloaded"}}') -> Fault:
    return lambda handler, body: send(handler, said, code)


def half_of_the_json(handler: Handler, body: bytes) -> None:
    send(handler, body[: len(body) // 2])


def half_of_the_length(handler: Handler, body: bytes) -> None:
    send(handler, body[: len(body) // 2], length=len(body))
    handler.connection.shutdown(socket.SHUT_RDWR)


def nothing(handler: Handler, body: bytes) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def silence(handler: Handler, body: bytes) -> None:
    time.sleep(1.5)  # more than SHORT's answer


def drop_by_drop(handler: Handler, body: bytes) -> None:
    """Each part in time, the whole in seconds."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    for place in range(len(body)):
        handler.wfile.write(body[place : place + 1])
        time.sleep(0.05)


def abort(handler: Handler, body: bytes) -> None:
    answer = json.loads(body)
    answer["choices"][0]["finish_reason"] = "abort"
    send(handler, json.dumps(answer).encode())


FAULTS: dict[str, Fault] = {
    "408": status(408),
    "429": status(429),
    "500": status(500),
    "503 and no JSON": status(503, b"<html>busy"),
    "half of the JSON": half_of_the_json,
    "half of the announced length": half_of_the_length,
    "a closed connection": nothing,
    "silence": silence,
    "drop by drop": drop_by_drop,
    "aborted": abort,
}


def test_a_server_gets_ids_and_a_seed_for_each_response(server: FaultyServer) -> None:
    answers = dict(client(server.server_port, processed_logprobs=True).complete(REQUESTS, DECODING, STOPS))
    assert answers == {index: expected(request) for index, request in enumerate(REQUESTS)}
    asked = sorted(server.asked, key=lambda asked: asked["seed"])
    assert [(one["prompt"], one["seed"]) for one in asked] == [(list(r.prompt), r.seed) for r in REQUESTS]
    assert asked[0] == {
        "model": "m",
        "prompt": [10, 20],
        "seed": 1000,
        "n": 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 5,
        "stop_token_ids": STOPS,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


@pytest.mark.parametrize(
    ("temperature", "top_p", "processed", "known"),
    [(0.7, 1.0, False, False), (1.0, 0.9, False, False), (1.0, 1.0, False, True), (0.7, 0.9, True, True)],
)
def test_a_logprob_is_given_where_it_is_that_of_the_draw(
    server: FaultyServer, temperature: float, top_p: float, processed: bool, known: bool
) -> None:
    backend = client(server.server_port, processed_logprobs=processed)
    answers = dict(backend.complete(REQUESTS, Decoding(temperature, top_p, 5), STOPS))
    assert answers == {index: expected(request, known) for index, request in enumerate(REQUESTS)}


def test_greedy_responses_of_a_server_have_no_uncertainty(server: FaultyServer) -> None:
    answers = client(server.server_port).complete(REQUESTS, Decoding(0.0, max_new_tokens=5), STOPS)
    assert {completion.logprob for _, completion in answers} == {0.0}


def test_responses_come_as_they_end(server: FaultyServer) -> None:
    """While one request hangs, the others are handed over; then it is given another try."""
    server.faults[20] = [lambda handler, body: time.sleep(0.6)]
    answers = list(client(server.server_port).complete(REQUESTS, DECODING, STOPS))
    assert [index for index, _ in answers][-1] == 0
    assert len(server.asked) == 13


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_tried_again_and_nothing_is_lost(server: FaultyServer, name: str) -> None:
    """Once at the first request, three times in a row at the second."""
    fault = FAULTS[name]
    slow = name in ("silence", "drop by drop")
    server.faults = {20: [fault], 21: [fault] * (1 if slow else 3)}
    patience = SHORT if slow else replace(SHORT, seconds=60, connect=10, answer=30)  # a busy machine is no fault
    answers = list(client(server.server_port, patience).complete(REQUESTS[:4], DECODING, STOPS))
    assert sorted(index for index, _ in answers) == [0, 1, 2, 3]
    assert dict(answers) == {index: expected(request, logprob=False) for index, request in enumerate(REQUESTS[:4])}
    tries = Counter(asked["seed"] for asked in server.asked)
    assert tries == {1000: 2, 1001: 2 if slow else 4, 1002: 1, 1003: 1}


def test_a_server_that_is_not_there_yet_is_waited_for() -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    answers: list[tuple[int, Completion]] = []
    patience = Patience(attempts=100, seconds=10, first_delay=0.02, longest_delay=0.05, connect=1, answer=1)
    asking = threading.Thread(target=lambda: answers.extend(client(port, patience).complete(REQUESTS, DECODING, STOPS)))
    asking.start()
    time.sleep(0.3)
    assert answers == []
    with running(port):
        asking.join(timeout=10)
    assert dict(answers) == {index: expected(request, logprob=False) for index, request in enumerate(REQUESTS)}


def test_a_server_that_dies_half_way_and_comes_back_loses_nothing() -> None:
    patience = Patience(attempts=100, seconds=10, first_delay=0.02, longest_delay=0.05, connect=1, answer=1)
    with running() as first:
        port = first.server_port
        for request in REQUESTS[6:]:
            first.faults[request.prompt[-1]] = [nothing] * 100
        answers = client(port, patience).complete(REQUESTS, DECODING, STOPS)
        taken = [next(answers) for _ in range(6)]
    assert sorted(index for index, _ in taken) == [0, 1, 2, 3, 4, 5]
    time.sleep(0.2)
    with running(port) as second:
        taken += answers
        assert {asked["seed"] for asked in second.asked} == {request.seed for request in REQUESTS[6:]}
    assert len(taken) == 12
    assert dict(taken) == {index: expected(request, logprob=False) for index, request in enumerate(REQUESTS)}


@pytest.mark.parametrize(
    ("patience", "most"),
    [
        (Patience(attempts=4, seconds=60, first_delay=0.01, longest_delay=0.02, connect=1, answer=1), 4),
        (Patience(attempts=10_000, seconds=2, first_delay=0.01, longest_delay=0.02, connect=1, answer=1), 240),
    ],
)
def test_a_server_that_stays_away_is_given_up_and_answers_are_kept(patience: Patience, most: int) -> None:
    """Bounded by attempts, and by time: enough of it for the other answers to come on a machine that is busy."""
    with running() as server:
        for request in REQUESTS[5:]:
            server.faults[request.prompt[-1]] = [nothing] * 10_000
        answers, taken = client(server.server_port, patience, concurrency=12).complete(REQUESTS, DECODING, STOPS), []
        began = time.monotonic()
        with pytest.raises(
            UserError, match=r"gave up on request \d+ after \d+ attempts, \d+\.\d s after .* RemoteDisc.* is kept"
        ):
            for answer in answers:
                taken.append(answer)
        assert time.monotonic() - began < 10
        assert dict(taken) == {index: expected(request, logprob=False) for index, request in enumerate(REQUESTS[:5])}
        tries = Counter(asked["seed"] for asked in server.asked)
        assert 1 < max(tries.values()) <= most


@pytest.mark.parametrize(("code", "said"), [(400, "too long"), (401, "who are you"), (404, "no such model")])
def test_a_refusal_is_said_at_once(server: FaultyServer, code: int, said: str) -> None:
    """In the server's words, whichever form they have."""
    for form in ({"error": {"message": said}}, {"message": said}, {"error": said}, said):
        server.asked.clear()
        server.faults = {20: [status(code, json.dumps(form).encode())]}
        with pytest.raises(UserError, match=f"refused request 1 with status {code}: .*{said}"):
            list(client(server.server_port).complete(REQUESTS[:1], DECODING, STOPS))
        assert len(server.asked) == 1


def test_answers_that_came_before_a_refusal_are_kept(server: FaultyServer) -> None:
    server.faults = {31: [status(400)]}
    taken = []
    with pytest.raises(UserError, match="refused request 12"):
        for answer in client(server.server_port, concurrency=1).complete(REQUESTS, DECODING, STOPS):
            taken.append(answer)
    assert dict(taken) == {index: expected(request, logprob=False) for index, request in enumerate(REQUESTS[:11])}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": [{"text": "a", "finish_reason": "stop"}]}, "text without token ids"),
        ({"choices": [{"text": "a", "finish_reason": "stop", "token_ids": [9]}]}, r"ended by 'stop' at token \[9\]"),
        ({"choices": []}, "no completion"),
        (["hello"], "no completion"),
        *(
            ({"choices": [{"finish_reason": "length", "token_ids": ids}]}, r"request \d+: expected a list of token ids")
            for ids in (["9"], [9.0], [9, None], [[9]], {"9": 9}, "nine", 9, [-1], [True], [10**30], [2**31])
        ),
        ({"choices": [{"finish_reason": "length", "token_ids": []}]}, "0 tokens, asked for 1 to 5 "),
        ({"choices": [{"finish_reason": "length", "token_ids": [9] * 6}]}, r"6 tokens, .* 5 \(max_new_tokens\)"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(server: FaultyServer, answer: Any, message: str) -> None:
    server.answer = lambda asked: answer
    with pytest.raises(UserError, match=message):
        list(client(server.server_port).complete(REQUESTS, DECODING, STOPS))


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        ([-1.0, math.nan], "its log-probability is nan, no finite number"),
        ([-1.0, -math.inf], "its log-probability is -inf"),
        ([-1.0, None], "no completion"),
        ([-1.0], "not as many log-probabilities as tokens"),
    ],
)
def test_logprobs_that_are_none_are_refused(server: FaultyServer, logprobs: list[Any], message: str) -> None:
    choice = {"finish_reason": "length", "token_ids": [9, 9], "logprobs": {"token_logprobs": logprobs}}
    server.answer = lambda asked: {"choices": [choice]}
    with pytest.raises(UserError, match=message):
        list(client(server.server_port).complete(REQUESTS[:1], Decoding(1.0, max_new_tokens=2), STOPS))


def test_a_refusal_names_what_was_asked_for(server: FaultyServer) -> None:
    server.faults = {20: [status(400, b'{"message": "too long"}')]}
    named = replace(REQUESTS[0], name="prompt 17, thinking, response 2")
    with pytest.raises(UserError, match=r"refused request 1 \(prompt 17, thinking, response 2\) with status 400"):
        list(client(server.server_port).complete([named], DECODING, STOPS))


def test_json_that_is_too_deep_is_a_fault(server: FaultyServer) -> None:
    deep = b'{"choices":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    server.faults = {20: [lambda handler, body: send(handler, deep), status(503, deep)]}
    answers = dict(client(server.server_port).complete(REQUESTS[:1], DECODING, STOPS))
    assert answers == {0: expected(REQUESTS[0], logprob=False)}


@pytest.mark.parametrize(("asked", "waited"), [("1", 1.0), (" 1 ", 1.0), ("3600", 2.0), ("Thu, 01 Jan 2099", 0.0)])
def test_a_server_that_asks_for_time_is_given_it_within_the_patience(
    server: FaultyServer, asked: str, waited: float
) -> None:
    """Then the request is tried once more."""

    def later(handler: Handler, body: bytes) -> None:
        moments.append(time.monotonic())
        handler.send_response(429)
        handler.send_header("Retry-After", asked)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def then(handler: Handler, body: bytes) -> None:
        moments.append(time.monotonic())
        send(handler, body)

    moments: list[float] = []
    server.faults = {20: [later, then]}
    patience = replace(SHORT, seconds=2, connect=10, answer=30)
    [(_, answer)] = client(server.server_port, patience).complete(REQUESTS[:1], DECODING, STOPS)
    assert answer == expected(REQUESTS[0], logprob=False)
    assert moments[1] - moments[0] >= waited - 0.05  # a busy machine is late


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attempts": 0}, "patience.attempts must be ≥ 1, got 0"),
        ({"seconds": -1}, "patience.seconds must be ≥ 0, got -1"),
        ({"first_delay": math.nan}, "patience.first_delay must be ≥ 0 and"),
        ({"longest_delay": math.inf}, "patience.longest_delay must be ≥ 0 and"),
        ({"connect": -1}, r"patience.connect must be > 0 and ≤ 1e\+08 seconds, got -1"),
        ({"answer": 0}, "patience.answer must be > 0"),
        ({"answer": 1e300}, "patience.answer must be > 0"),
    ],
)
def test_patience_that_is_none_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Patience(**options)


@pytest.mark.parametrize("concurrency", [0, -1])
def test_a_server_is_asked_something(concurrency: int) -> None:
    with pytest.raises(UserError, match="concurrency must be ≥ 1, got"):
        client(1, concurrency=concurrency)


def test_a_key_is_sent_without_its_line_break(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", " s3cret\n")
    list(client(server.server_port, api_key_variable="SOME_KEY").complete(REQUESTS[:1], DECODING, STOPS))
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("key", ["s3cret\ns3cret", "s3cret\x7f", "s3cret–"])
def test_a_key_that_cannot_be_sent_is_refused_unsaid(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(UserError, match="no header takes") as caught:
        client(1, api_key_variable="SOME_KEY")
    assert "s3cret" not in str(caught.value)


def test_the_key_comes_from_the_environment_and_is_never_said(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match="SOME_KEY"):
        client(server.server_port, api_key_variable="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "s3cret")
    server.faults = {20: [status(401, b'{"error": {"message": "wrong key s3cret"}}')]}
    with pytest.raises(UserError, match="wrong key …") as caught:
        list(client(server.server_port, api_key_variable="SOME_KEY").complete(REQUESTS, DECODING, STOPS))
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value)


def test_addresses_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    strange = ("http://localhost:abc/v1", "http://localhost:99999/v1", "http://[::1/v1", "http://localhost/v 1")
    for url in (
        "localhost:8000/v1",
        "ftp://somewhere/v1",
        "http://",
        "http://localhost/v1?a=1",
        "http://é/v1",
        *strange,
    ):
        with pytest.raises(UserError, match="not a server's URL"):
            Server(url, "m")

    def unknown(*_: Any, **__: Any) -> None:  # asking the network's name server may take long
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="cannot be reached"):
        list(Server("http://no-such-host.invalid/v1", "m", patience=SHORT).complete(REQUESTS, DECODING, STOPS))
    with pytest.raises(UserError, match="the prompt is empty"):
        Server("http://localhost/v1", "m").complete([Request([], 0)], DECODING, STOPS)


def test_requests_under_way_end_with_the_iterator(server: FaultyServer) -> None:
    """Though the server would answer in a minute only."""
    patience, began = Patience(answer=60, first_delay=60), time.monotonic()
    wait = threading.Event()
    server.faults = {request.prompt[-1]: [lambda handler, body: wait.wait(30) and None] for request in REQUESTS[1:]}
    answers = client(server.server_port, patience).complete(REQUESTS, DECODING, STOPS)
    assert next(answers)[0] == 0
    answers.close()
    wait.set()
    assert time.monotonic() - began < 5
    assert len(server.asked) <= 6  # those that were waiting are never sent


def test_the_tiny_reasoner_behind_a_server_is_the_tiny_reasoner(server: FaultyServer) -> None:
    """The same interface, the same responses, whichever back end."""
    model, decoding = load_policy("builtin:tiny_reasoner"), Decoding(1.0, max_new_tokens=8)

    def answer(asked: dict[str, Any]) -> Any:
        with own:
            [end] = generate(
                model,
                [asked["prompt"]],
                [asked["seed"]],
                Decoding(asked["temperature"], asked["top_p"], asked["max_tokens"]),
                eos_token_ids=asked["stop_token_ids"],
            )
        logprobs = {"token_logprobs": [end.logprob] + [0.0] * (len(end.token_ids) - 1)}
        return {"choices": [{"finish_reason": end.finish_reason, "token_ids": end.token_ids, "logprobs": logprobs}]}

    own, server.answer = threading.Lock(), answer
    here = dict(Transformers(model, 4).complete(REQUESTS, decoding, STOPS))
    there = dict(client(server.server_port, Patience()).complete(REQUESTS, decoding, STOPS))
    assert here.keys() == there.keys()
    for index, completion in here.items():
        assert there[index].token_ids == completion.token_ids
        assert there[index].finish_reason == completion.finish_reason
        assert there[index].logprob == pytest.approx(completion.logprob, abs=1e-3)
