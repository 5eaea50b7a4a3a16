"""Sampling: the model's own probabilities, one seed a response, and no influence of the batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from bvpo.decoding import HEADS, draw
from bvpo.errors import UserError
from bvpo.generation import Completion, Decoding, Request, Transformers, generate
from bvpo.pairs import encode_prompt
from bvpo.policy import load_policy, load_tokenizer
from bvpo.tasks import draw_questions
from bvpo.traces import MODES, render_prompt

EOS = [1]
PROMPTS = [[7, 9, 11], [8], [12, 13, 14, 15, 16], [20, 21], [9, 9, 9, 9, 9, 9, 9], [30, 5] * 9]

SMALL: dict[str, Any] = {
    "vocab_size": 47,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from uniform predictions, so that rows differ
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "mistral, window of 5": lambda: MistralConfig(**SMALL, sliding_window=5),
    "gemma3, windows of 4 and all": lambda: Gemma3TextConfig(
        **SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gpt2, learnt positions": lambda: GPT2Config(
        vocab_size=47, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, eos_token_id=1
    ),
    "qwen3-next, recurrent states": lambda: Qwen3NextConfig(
        **SMALL,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        mlp_only_layers=[0, 1, 2],
    ),
}


@cache
def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> PreTrainedModel:
    return load_policy(str(llama_folder))


def texts(completions: list[Completion]) -> list[tuple[list[int], str]]:
    """What a seed settles; log-probabilities are rounded otherwise in another batch."""
    return [(completion.token_ids, completion.finish_reason) for completion in completions]


def distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """(V,) what a token is drawn from: softmax(logits / T), cut to the smallest set of mass top_p, renormalised."""
    probabilities = (logits.double() / temperature).softmax(0)
    ordered, index = probabilities.sort(descending=True, stable=True)
    kept = index[: int((ordered.cumsum(0) < top_p).sum()) + 1]
    expected = torch.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    return expected


def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


# ---------------------------------------------------------------------- the batch has no influence


@pytest.mark.parametrize("name", CONFIGS)
def test_a_response_depends_on_its_seed_and_not_on_its_batch(name: str) -> None:
    """Rows of different ages and lengths, ended rows dropped, places filled again: the same tokens."""
    model, decoding = random_model(name), Decoding(temperature=1.0, max_new_tokens=12)
    prompts, seeds = PROMPTS * 4, list(range(24))
    alone = generate(model, prompts, seeds, decoding, eos_token_ids=[1, 5, 6], batch_size=1)
    for batch_size in (7, 32):  # and 1
        together = generate(model, prompts, seeds, decoding, eos_token_ids=[1, 5, 6], batch_size=batch_size)
        assert texts(together) == texts(alone)
        for one, other in zip(together, alone, strict=True):  # a dozen float32 log-probabilities
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
    backwards = generate(model, prompts[::-1], seeds[::-1], decoding, eos_token_ids=[1, 5, 6], batch_size=7)
    assert texts(backwards[::-1]) == texts(alone)
    assert len({tuple(c.token_ids) for c in alone}) > 12
    assert {c.finish_reason for c in alone} == {"stop", "length"}


def test_the_tiny_reasoner_answers_alike_in_every_batch() -> None:
    model, decoding = load_policy("builtin:tiny_reasoner"), Decoding(temperature=0.8, max_new_tokens=160)
    tokenizer, questions = load_tokenizer("builtin:tiny_reasoner"), draw_questions(12, 0, "held_out")
    prompts = [
        encode_prompt(tokenizer, render_prompt(tokenizer, [{"role": "user", "content": question.instruction}], mode))
        for question in questions
        for mode in MODES
    ]
    runs = [generate(model, prompts, range(24), decoding, eos_token_ids=[3], batch_size=size) for size in (1, 7, 32)]
    assert texts(runs[1]) == texts(runs[0])
    assert texts(runs[2]) == texts(runs[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_temperature_zero_is_the_plain_greedy_loop(name: str) -> None:
    """One sequence at a time, no cache, no padding."""
    model = random_model(name)
    completions = generate(model, PROMPTS, [0] * 6, Decoding(0.0, max_new_tokens=10), eos_token_ids=EOS)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 10 and ids[len(prompt) :][-1:] != EOS:
            ids.append(int(plain_logits(model, ids)[-1].argmax()))
        assert completion.token_ids == ids[len(prompt) :]
        assert completion.finish_reason == ("stop" if ids[-1] == 1 else "length")
        assert completion.logprob == 0


def test_a_shorter_limit_cuts_the_same_response(model: PreTrainedModel) -> None:
    long, short = (
        generate(model, PROMPTS, range(6), Decoding(1.0, max_new_tokens=limit), eos_token_ids=EOS) for limit in (30, 6)
    )
    for whole, cut in zip(long, short, strict=True):
        assert cut.token_ids == whole.token_ids[:6]


def test_every_stop_token_stops_and_nothing_else_does(model: PreTrainedModel) -> None:
    decoding = Decoding(1.0, max_new_tokens=20)
    for stops in ([], [1], [1, 5, 6, 7, 8, 9, 10]):
        for completion in generate(model, PROMPTS * 5, range(30), decoding, eos_token_ids=stops):
            places = [place for place, token in enumerate(completion.token_ids) if token in stops]
            assert places == ([len(completion.token_ids) - 1] if completion.finish_reason == "stop" else [])
            assert completion.finish_reason == "stop" or len(completion.token_ids) == 20


# ---------------------------------------------------------------------- the batch's own work


def test_prompts_are_read_once_and_places_are_filled_again(model: PreTrainedModel) -> None:
    """20 responses to each of two prompts in 8 places: never more than two rows are read, and no ended row is kept."""
    seen: list[tuple[int, int]] = []
    generate(model, PROMPTS, [0] * 6, Decoding(max_new_tokens=1), eos_token_ids=EOS)  # its cache has been asked about
    hook = model.model.register_forward_hook(
        lambda module, args, inputs, output: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    prompts = [PROMPTS[2]] * 20 + [PROMPTS[4]] * 20
    completions = generate(model, prompts, range(40), Decoding(1.0, max_new_tokens=40), eos_token_ids=EOS, batch_size=8)
    hook.remove()
    reads, steps = [rows for rows, width in seen if width > 1], [rows for rows, width in seen if width == 1]
    assert reads[0] == 1  # the first 8 responses
    assert max(reads) <= 2
    assert max(steps) == 8
    tokens = sum(len(completion.token_ids) for completion in completions)
    assert sum(steps) == tokens  # with 8 places, a row that has ended leaves before the next step
    assert len(steps) < tokens / 8 * 1.25 + 40  # the last responses end one by one


def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    requests = [Request(prompt, 0) for prompt in PROMPTS]
    for training in (True, False):
        model.train(training)
        iterator = Transformers(model, 2).complete(requests, Decoding(1.0, max_new_tokens=5), EOS)
        assert model.training == training  # nothing happens before the first completion is asked for
        next(iterator)
        assert not model.training
        assert torch.is_grad_enabled()  # between completions, gradients are the caller's affair
        iterator.close()
        assert model.training == training
    model.train()
    generate(model, PROMPTS, [0] * 6, Decoding(max_new_tokens=2), eos_token_ids=EOS)
    assert model.training


def test_an_interrupt_passes_and_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    model.train()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, [0] * 6, Decoding(), eos_token_ids=EOS)
    hook.remove()
    assert model.training


# ---------------------------------------------------------------------- models without such a cache

NONE: dict[str, Callable[[], PreTrainedConfig]] = {
    "mamba": lambda: MambaConfig(
        vocab_size=47,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    ),
    "rwkv": lambda: RwkvConfig(
        vocab_size=47, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, bos_token_id=0, eos_token_id=1
    ),
    "recurrent gemma, which takes a cache": lambda: RecurrentGemmaConfig(
        **SMALL, attention_window_size=8, lru_width=32
    ),
    "minimax, which has its own": lambda: MiniMaxConfig(
        **SMALL,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        block_size=8,
    ),
}


def random(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NONE)
def test_a_model_whose_steps_need_another_cache_is_refused_before_any_response(name: str) -> None:
    model = random(NONE[name]()).train()
    backend = Transformers(model)
    for _ in range(2):  # also when it is asked again
        with pytest.raises(UserError, match=r"its cached steps are not those of a plain .* VLLMEngine or ServerEngine"):
            backend.complete([Request([5, 6], 0)], Decoding(max_new_tokens=3), EOS)
        assert model.training


def test_a_model_is_asked_once_and_left_as_it_was() -> None:
    model, passes = random(CONFIGS["llama"]()).train(), list[int]()
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    state = torch.get_rng_state()
    for _ in range(2):
        Transformers(model).complete([Request([5], 0)], Decoding(max_new_tokens=3), EOS)
        assert len(passes) == 5  # a read, two steps, and a plain pass for each length of a prompt
    hook.remove()
    assert model.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layers", [2, 12])
def test_roundings_of_half_precision_are_no_fault(layers: int) -> None:
    """A GPU rounds otherwise in another batch: planted here, up to 2⁻⁸ of every output, before a router chooses too."""
    config = {**SMALL, "num_hidden_layers": layers, "initializer_range": 0.1}
    experts = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
    model, generator = random(Qwen3MoeConfig(**config, **experts)), torch.Generator().manual_seed(0)

    def rounded(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return output
        return output * (1 + (torch.rand(output.shape, generator=generator) * 2 - 1) / 256).to(output.dtype)

    for module in model.bfloat16().modules():
        if isinstance(module, torch.nn.Linear) or "Norm" in type(module).__name__:
            module.register_forward_hook(rounded)
    completions = generate(model, PROMPTS, range(6), Decoding(max_new_tokens=3), eos_token_ids=EOS)
    assert len(completions) == 6


# ---------------------------------------------------------------------- probabilities


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 1.0), (0.7, 0.6)])
def test_sampled_frequencies_are_the_models_probabilities(
    model: PreTrainedModel, temperature: float, top_p: float
) -> None:
    """First tokens of 4,000 responses to one prompt, chi-square against softmax(logits / T) cut at top-p."""
    count = 4000
    decoding = Decoding(temperature, top_p, max_new_tokens=1)
    drawn = generate(model, [PROMPTS[0]] * count, range(count), decoding, eos_token_ids=EOS, batch_size=1000)
    expected = distribution(plain_logits(model, PROMPTS[0])[-1], temperature, top_p)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    assert fits(counts, expected * count)
    for completion in drawn[:50]:  # logits in float32
        assert math.exp(completion.logprob or 0) == pytest.approx(float(expected[completion.token_ids[0]]), rel=1e-4)


def fits(observed: Tensor, predicted: Tensor) -> bool:
    """Chi-square at 1e-3, cells of fewer than 5 expected counts taken together."""
    common = predicted >= 5
    rare = [counts[~common].sum()[None] for counts in (observed, predicted)]
    observed, predicted = torch.cat([observed[common], rare[0]]), torch.cat([predicted[common], rare[1]])
    keep = predicted > 0
    return float(chisquare(observed[keep], predicted[keep] * observed.sum() / predicted.sum()).pvalue) > 1e-3


def test_whole_responses_come_as_often_as_their_logprob_says(model: PreTrainedModel) -> None:
    """All continuations of at most two tokens under top-p, enumerated: 4,000 responses against exp(logprob)."""
    count, decoding = 4000, Decoding(0.7, 0.5, max_new_tokens=2)
    drawn = generate(model, [PROMPTS[0]] * count, range(count), decoding, eos_token_ids=EOS, batch_size=500)
    probabilities: dict[tuple[int, ...], float] = {}
    first = distribution(plain_logits(model, PROMPTS[0])[-1], 0.7, 0.5)
    for token in first.nonzero()[:, 0].tolist():
        second = distribution(plain_logits(model, [*PROMPTS[0], token])[-1], 0.7, 0.5)
        ends = [()] if token in EOS else [(end,) for end in second.nonzero()[:, 0].tolist()]
        for end in ends:
            probabilities[(token, *end)] = float(first[token]) * (float(second[end[0]]) if end else 1.0)
    assert sum(probabilities.values()) == pytest.approx(1)
    for completion in drawn:
        assert math.exp(completion.logprob or 0) == pytest.approx(probabilities[tuple(completion.token_ids)], rel=1e-4)
    counts = Counter(tuple(completion.token_ids) for completion in drawn)
    observed = torch.tensor([counts[key] for key in probabilities]).double()
    assert fits(observed, torch.tensor(list(probabilities.values())).double() * count)


@pytest.mark.parametrize("name", CONFIGS)
def test_logprob_is_that_of_a_plain_forward_pass(name: str) -> None:
    """Σ log q over the tokens, by one pass over prompt and response; a lone stop token at the end counts too."""
    model, temperature, top_p = random_model(name), 0.9, 0.8
    decoding = Decoding(temperature, top_p, max_new_tokens=20)
    completions = generate(model, PROMPTS * 3, range(18), decoding, eos_token_ids=EOS, batch_size=8)
    for prompt, completion in zip(PROMPTS * 3, completions, strict=True):
        logits = plain_logits(model, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
        expected = sum(
            float(distribution(row, temperature, top_p)[token].log())
            for row, token in zip(logits, completion.token_ids, strict=True)
        )
        assert completion.logprob == pytest.approx(expected, abs=1e-3)  # 20 float32 logits of size 10


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 10.0])
def test_a_draw_from_a_large_vocabulary_is_the_sorted_one(scale: float, top_p: float) -> None:
    """Uniform (all equal), nearly uniform, and peaked logits, rounded so that equals abound; 1 in 50 is impossible."""
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(200, 4 * HEADS[-1], generator=rng) * scale * 8).round() / 8
    logits[:, ::50] = -torch.inf
    uniforms = torch.rand(200, generator=rng, dtype=torch.float64)
    uniforms[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    tokens, logprobs = draw(logits, uniforms, Decoding(0.8, top_p))
    for row, uniform, token, logprob in zip(logits, uniforms, tokens, logprobs, strict=True):
        expected = distribution(row, 0.8, top_p)
        order = expected.sort(descending=True, stable=True).indices
        place = int(torch.searchsorted(expected[order].cumsum(0), uniform, right=True))
        place = min(place, int((expected > 0).sum()) - 1)  # the sum may end below the uniform number
        # the written-out sum may round to the other side of the uniform number
        assert int(token) in order[max(0, place - 1) : place + 2]
        assert expected[token] > 0
        assert float(logprob) == pytest.approx(float(expected[token].log()), abs=1e-9)


# ---------------------------------------------------------------------- what is refused


def test_bad_settings_are_refused(model: PreTrainedModel) -> None:
    for settings in (
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0},
        {"max_new_tokens": 0},
    ):
        with pytest.raises(ValueError, match="must be"):
            Decoding(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many seeds"):
        generate(model, PROMPTS, [0], Decoding(), eos_token_ids=EOS)
    with pytest.raises(ValueError, match="batch_size must be"):
        Transformers(model, 0)


def test_prompts_that_cannot_be_answered_are_refused_before_any_is(model: PreTrainedModel) -> None:
    backend = Transformers(random_model("llama"))  # 64 positions
    with pytest.raises(UserError, match="request 2: the prompt is empty"):
        backend.complete([Request([5], 0), Request([], 1)], Decoding(max_new_tokens=50), EOS)
    with pytest.raises(UserError, match=r"request 2: .* 15 tokens and max_new_tokens 50 make 65, .* 64 positions"):
        backend.complete([Request([5], 0), Request([5] * 15, 1)], Decoding(max_new_tokens=50), EOS)
    with pytest.raises(UserError, match=r"the model has 64 positions and max_new_tokens is 64: lower it"):
        backend.complete([Request([5], 0)], Decoding(max_new_tokens=64), EOS)
    with pytest.raises(UserError, match=r"request 1 \(prompt 17\): the prompt is empty"):
        backend.complete([Request([], 0, "prompt 17")], Decoding(max_new_tokens=50), EOS)
    [(_, longest)] = backend.complete([Request([5] * 14, 1)], Decoding(1.0, max_new_tokens=50), [])
    assert len(longest.token_ids) == 50
    assert list(backend.complete([], Decoding(), EOS)) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_said(temperature: float) -> None:
    torch.manual_seed(0)
    broken = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    with torch.no_grad():
        broken.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        generate(broken, PROMPTS, range(6), Decoding(temperature, max_new_tokens=5), eos_token_ids=EOS)
