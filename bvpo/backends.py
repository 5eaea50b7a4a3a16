"""Sampling by other programs: vLLM in this process, or a server that speaks OpenAI's completions API.

Both get prompts as token ids, never as text, which would be tokenized again and given a second BOS; one request a
response with its own seed, as the children of vLLM's `n=5` have the seeds that follow; and nothing is left to a model's
generation defaults (top-k, penalties, stop tokens). Their random numbers are their own: the same seed gives another
response than in `bvpo.generation`, from the same distribution.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from bvpo.errors import UserError
from bvpo.generation import Completion, Decoding, Request, check_requests
from bvpo.remote import Calls, Fault, Patience, Remote

HIGHEST_ID = 2**31  # no vocabulary has as many tokens


def _completion(
    source: str, name: str, token_ids: Any, reason: Any, logprob: Any, decoding: Decoding, stops: Sequence[int]
) -> Completion:
    """Raises UserError for what is no response, and where it ended for a reason that was not asked for."""
    if not isinstance(token_ids, list) or not all(
        type(token) is int and 0 <= token < HIGHEST_ID for token in token_ids
    ):
        raise UserError(f"{source}: {name}: expected a list of token ids, found {_short(token_ids)}")
    if not 1 <= len(token_ids) <= decoding.max_new_tokens:
        raise UserError(
            f"{source}: {name}: {len(token_ids)} tokens, asked for 1 to {decoding.max_new_tokens} (max_new_tokens)"
        )
    if logprob is not None and not math.isfinite(logprob):
        raise UserError(f"{source}: {name}: its log-probability is {logprob}, no finite number: check the model there")
    if reason not in ("stop", "length") or (reason == "stop" and token_ids[-1:] not in [[stop] for stop in stops]):
        raise UserError(
            f"{source}: {name} ended by {reason!r} at token {token_ids[-1:]}; expected 'length', or "
            f"'stop' at one of {list(stops)}: does the server set stop words or tokens of its own?"
        )
    return Completion(token_ids, reason, logprob)


def _short(answer: Any) -> str:
    try:
        return repr(answer)[:200]
    except RecursionError:
        return f"a deeply nested {type(answer).__name__}"


# ---------------------------------------------------------------------- vLLM


class VLLM:
    """vLLM's engine in this process (`pip install "bvpo[vllm]"`, 0.10.2 or later, a GPU).

    Log-probabilities are vLLM's "processed" ones, after temperature and top-p; it computes them in float32.

    Args:
        model: A folder or Hub id.
        tensor_parallel_size: GPUs that the model is split over.
        dtype: Of weights and activations; `auto` takes the checkpoint's.
        gpu_memory_utilization: The fraction of each GPU's memory for weights and KV cache.
        max_model_len: Positions of prompt and response; None takes the model's.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
    ) -> None:
        try:
            vllm: Any = importlib.import_module("vllm")
            self._params: Any = importlib.import_module("vllm.sampling_params")
        except ImportError as error:
            raise UserError(f'vLLM cannot be imported ({error}): pip install "bvpo[vllm]"') from error
        arguments = vllm.EngineArgs(
            model=model,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_len,
            logprobs_mode="processed_logprobs",
        )
        self._engine = vllm.LLMEngine.from_engine_args(arguments)

    def complete(
        self, requests: Sequence[Request], decoding: Decoding, stops: Sequence[int]
    ) -> Generator[tuple[int, Completion]]:
        """See `bvpo.generation.Backend`; one call at a time."""
        check_requests(requests, decoding, self._engine.model_config.max_model_len, "max_model_len")
        return self._complete(requests, decoding, stops)

    def _complete(
        self, requests: Sequence[Request], decoding: Decoding, stops: Sequence[int]
    ) -> Generator[tuple[int, Completion]]:
        engine, waited = self._engine, {str(index): index for index in range(len(requests))}
        try:
            for name, index in waited.items():
                prompt = {"prompt_token_ids": list(requests[index].prompt)}
                engine.add_request(name, prompt, self._parameters(requests[index].seed, decoding, stops))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        [end], index = output.outputs, waited.pop(output.request_id)
                        logprob = end.cumulative_logprob if decoding.temperature > 0 else 0.0
                        name, ids, reason = requests[index].label(index), list(end.token_ids), end.finish_reason
                        yield index, _completion("vLLM", name, ids, reason, logprob, decoding, stops)
        finally:
            engine.abort_request(list(waited))

    def _parameters(self, seed: int, decoding: Decoding, stops: Sequence[int]) -> Any:
        return self._params.SamplingParams(
            n=1,
            seed=seed,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=list(stops),
            ignore_eos=True,  # the EOS stops where it is among the stop tokens
            logprobs=0,  # of the tokens drawn, and of no others
            detokenize=False,
            output_kind=self._params.RequestOutputKind.FINAL_ONLY,
        )


# ---------------------------------------------------------------------- a server


class Server:
    """A server with OpenAI's `/completions` that gives token ids on `return_token_ids`.

    These are vLLM (`vllm serve MODEL --logprobs-mode processed_logprobs`, 0.10.2 or later) and SGLang since July 2026.
    A text cannot stand in for ids: tokenizing it again may give others. A server that is away, overloaded or answers
    in part is tried again, within `patience`; what it refuses is not.

    Args:
        url: Ends in `/v1`, as a rule.
        model: The name that the server has for the model.
        concurrency: Requests under way at once. The server batches them.
        processed_logprobs: Whether the server's log-probabilities are those after temperature and top-p: vLLM's are
            with `--logprobs-mode processed_logprobs`, which no answer tells. Otherwise a completion has a `logprob`
            only where there is no difference, at temperature 1 and top-p 1, and at temperature 0.
        api_key_variable: The environment variable that holds the key, if the server wants one.
        patience: When to give up.

    Raises:
        UserError: The URL is none, `concurrency` is no number of requests, or the environment variable is not set or
            holds what cannot be sent.
    """

    def __init__(
        self,
        url: str,
        model: str,
        concurrency: int = 64,
        processed_logprobs: bool = False,
        api_key_variable: str | None = None,
        patience: Patience = Patience(),
    ) -> None:
        if concurrency < 1:
            raise UserError(f"concurrency must be ≥ 1, got {concurrency}")
        key = os.environ.get(api_key_variable, "").strip() if api_key_variable else ""
        if api_key_variable and not key:
            raise UserError(f"the environment variable {api_key_variable}, for the key of {url}, is not set")
        self._remote = Remote(url.rstrip("/") + "/completions", key, patience)
        self.model, self.concurrency, self.processed_logprobs = model, concurrency, processed_logprobs

    def complete(
        self, requests: Sequence[Request], decoding: Decoding, stops: Sequence[int]
    ) -> Generator[tuple[int, Completion]]:
        """See `bvpo.generation.Backend`; the server says which prompts are too long for it.

        Raises:
            UserError: While completions are taken: the server refuses a request, or `patience` is at its end. All
                completions that had arrived have then been yielded.
        """
        check_requests(requests, decoding, None)
        return self._complete(requests, decoding, stops)

    def _complete(
        self, requests: Sequence[Request], decoding: Decoding, stops: Sequence[int]
    ) -> Generator[tuple[int, Completion]]:
        calls, futures = Calls(), dict[Future[Completion], int]()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for index, request in enumerate(requests):
                    futures[pool.submit(self._ask, calls, index, request, decoding, stops)] = index
                for future in as_completed(list(futures)):
                    completion = future.result()
                    yield futures.pop(future), completion
            except UserError:
                calls.end()
                pool.shutdown(cancel_futures=True)
                for future, index in futures.items():
                    if not future.cancelled() and not future.exception():
                        yield index, future.result()
                raise
            finally:
                calls.end()
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, calls: Calls, index: int, request: Request, decoding: Decoding, stops: Sequence[int]) -> Completion:
        name = request.label(index)

        def read(answer: Any) -> Completion:
            try:
                [choice] = answer["choices"]
                reason, token_ids, known = choice["finish_reason"], choice.get("token_ids"), choice.get("logprobs")
                logprob = float(sum(known["token_logprobs"])) if known else None
                complete = not known or token_ids is None or len(known["token_logprobs"]) == len(token_ids)
            except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
                raise UserError(f"{self._remote.url}: this is no completion: {_short(answer)}") from error
            if token_ids is None:
                raise UserError(
                    f"{self._remote.url}: gives text without token ids, although `return_token_ids` was asked for; "
                    "serve the model by vLLM 0.10.2 or later, or by an SGLang that has this option"
                )
            if reason not in ("stop", "length"):  # such as `abort` where a server shuts down
                raise Fault(f"an answer that ended by {reason!r}")
            if not complete:
                raise UserError(f"{self._remote.url}: {name}: not as many log-probabilities as tokens")
            logprob = logprob if decoding.temperature > 0 else 0.0
            return _completion(self._remote.url, name, token_ids, reason, logprob, decoding, stops)

        return self._remote.post(calls, name, self._content(request, decoding, stops), read)

    def _content(self, request: Request, decoding: Decoding, stops: Sequence[int]) -> dict[str, Any]:
        content: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.prompt),
            "seed": request.seed,
            "n": 1,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_new_tokens,
            "stop_token_ids": list(stops),
            "ignore_eos": True,  # the EOS stops where it is among the stop tokens
            "return_token_ids": True,
        }
        content |= {
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        if decoding.temperature > 0 and (self.processed_logprobs or decoding.temperature == decoding.top_p == 1):
            content["logprobs"] = 0  # of the tokens drawn, and of no others
        return content
