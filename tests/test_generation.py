"""Sampling: the model's own probabilities, one seed a response, and no influence of the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedModel

from bvpo.policy import load_policy
from bvpo.generation import Decoding, generate


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> PreTrainedModel:
    return load_policy(str(llama_folder))


PROMPTS = [[7, 9, 11], [8], [12, 13, 14, 15, 16], [20, 21], [9, 9, 9, 9, 9, 9, 9]]


def test_a_response_depends_on_its_seed_and_not_on_its_batch(model: PreTrainedModel) -> None:
    decoding = Decoding(temperature=1.0, max_new_tokens=12)
    prompts, seeds = PROMPTS * 4, list(range(20))
    alone = generate(model, prompts, seeds, decoding, eos_token_ids=[1], batch_size=1)
    for batch_size in (7, 20):
        assert generate(model, prompts, seeds, decoding, eos_token_ids=[1], batch_size=batch_size) == alone
    backwards = generate(model, prompts[::-1], seeds[::-1], decoding, eos_token_ids=[1], batch_size=7)
    assert backwards[::-1] == alone
    assert len({tuple(c.token_ids) for c in alone}) > 10


def test_temperature_zero_is_the_plain_greedy_loop(model: PreTrainedModel) -> None:
    for prompt, completion in zip(
        PROMPTS, generate(model, PROMPTS, [0] * 5, Decoding(0.0, max_new_tokens=10), eos_token_ids=[1]), strict=True
    ):
        ids = list(prompt)
        while len(ids) < len(prompt) + 10 and ids[len(prompt) :][-1:] != [1]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert completion.token_ids == ids[len(prompt) :]
        assert completion.finish_reason == ("stop" if ids[-1] == 1 else "length")


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 1.0), (0.7, 0.6)])
def test_sampled_frequencies_are_the_models_probabilities(
    model: PreTrainedModel, temperature: float, top_p: float
) -> None:
    """First tokens of 4,000 responses to one prompt, chi-square against softmax(logits / T) cut at top-p."""
    count = 4000
    decoding = Decoding(temperature, top_p, max_new_tokens=1)
    drawn = generate(model, [PROMPTS[0]] * count, range(count), decoding, eos_token_ids=[1], batch_size=1000)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    probabilities = (logits / temperature).softmax(0)
    ordered, index = probabilities.sort(descending=True)
    kept = index[: int((ordered.cumsum(0) < top_p).sum()) + 1]
    expected = torch.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    common = expected * count >= 5
    observed, predicted = counts[common], expected[common] * count
    if not bool(common.all()):
        observed = torch.cat([observed, counts[~common].sum()[None]])
        predicted = torch.cat([predicted, expected[~common].sum()[None] * count])
    keep = predicted > 0
    assert chisquare(observed[keep], predicted[keep]).pvalue > 1e-3


def test_bad_settings_are_refused(model: PreTrainedModel) -> None:
    for settings in ({"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="must be"):
            Decoding(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many seeds"):
        generate(model, PROMPTS, [0], Decoding(), eos_token_ids=[1])
