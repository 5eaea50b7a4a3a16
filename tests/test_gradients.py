"""Sketches keep inner products; the mixer keeps the mixture."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from bvpo.gradients import CHUNK, GradientMixer, Sketch, largest_prime, layer_groups, signs, single_group

CPU = torch.device("cpu")


def test_signs_depend_on_seed_and_index_alone_and_are_balanced() -> None:
    whole = signs(0, 100_000, 0, CPU)
    assert torch.equal(signs(12_345, 777, 0, CPU), whole[12_345 : 12_345 + 777])
    assert set(whole.tolist()) == {-1, 1}
    assert abs(float(whole.double().mean())) < 4 / 100_000**0.5
    other = signs(0, 100_000, 1, CPU)
    assert abs(float((whole.double() * other).mean())) < 4 / 100_000**0.5
    for lag in (1, 31, 32, 33, 65_536 % 1000):  # no sign follows from another one
        assert abs(float((whole[lag:].double() * whole[:-lag]).mean())) < 4 / 90_000**0.5


def test_small_gradients_are_kept_exactly() -> None:
    sketch = Sketch(parameters=10, size=16)
    out = torch.zeros(sketch.width)
    sketch.add_(out, torch.arange(4.0), 0)
    sketch.add_(out, torch.arange(6.0), 4)
    assert sketch.exact and out.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


def test_any_cut_into_shards_gives_the_same_sketch() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sketch = Sketch(parameters=10_000, size=300, seed=7)
    whole = torch.zeros(293, dtype=torch.float64)  # a prime; 294 to 300 are none
    sketch.add_(whole, values, 0)
    naive = torch.zeros(293, dtype=torch.float64)
    for index, sign in enumerate(signs(0, 10_000, 7, CPU).tolist()):
        naive[index % 293] += sign * values[index]
    assert torch.allclose(whole, naive, atol=1e-12)
    for cuts in ([0, 1, 292, 293, 294, 5000, 10_000], [0, 9_999, 10_000]):
        parts = torch.zeros(293, dtype=torch.float64)
        for start, end in pairwise(cuts):
            sketch.add_(parts, values[start:end], start)
        assert torch.allclose(parts, whole, atol=1e-12)


def test_a_gradient_longer_than_a_chunk_is_sketched_whole() -> None:
    size = CHUNK + 1000
    values = torch.ones(size)
    sketch = Sketch(parameters=size, size=1024)
    out = torch.zeros(sketch.width)
    sketch.add_(out, values, 0)
    assert float(out.sum()) == float(signs(0, size, 0, CPU).double().sum())


def spread_over_seeds(a: torch.Tensor, b: torch.Tensor, size: int) -> torch.Tensor:
    """(200,) ⟨Sa, Sb⟩ of as many seeds."""
    products = []
    for seed in range(200):
        sketch = Sketch(parameters=len(a), size=size, seed=seed)
        first, second = torch.zeros(2, sketch.width, dtype=torch.float64)
        sketch.add_(first, a, 0), sketch.add_(second, b, 0)
        products.append(float(first @ second))
    return torch.tensor(products, dtype=torch.float64)


def test_inner_products_are_unbiased_with_the_stated_spread() -> None:
    """Over 200 seeds, at D = 61: mean within 4 standard errors, spread at most ‖a‖‖b‖ √(2/D)."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2000, generator=generator, dtype=torch.float64)
    b = 0.5 * a + torch.randn(2000, generator=generator, dtype=torch.float64)
    values, limit = spread_over_seeds(a, b, 64), float(a.norm() * b.norm()) * (2 / 61) ** 0.5
    assert abs(float(values.mean() - a @ b)) < 4 * float(values.std()) / 200**0.5
    assert float(values.std()) < 1.2 * limit  # 200 draws know a spread to 5%


def test_a_column_of_a_wide_matrix_is_spread_over_the_whole_sketch() -> None:
    """All the gradient in one column of a 600 × 128 matrix: a sketch of 256 numbers would hold it in two of them, with
    a spread of ‖g‖². The largest prime below, 251, gives the stated one."""
    gradient = torch.zeros(600, 128, dtype=torch.float64)
    gradient[:, 7] = torch.randn(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = spread_over_seeds(gradient.flatten(), gradient.flatten(), 256)
    square = float(gradient.square().sum())
    assert abs(float(values.mean()) - square) < 4 * float(values.std()) / 200**0.5
    assert float(values.std()) < 1.2 * square * (2 / 251) ** 0.5


def test_a_sketch_has_a_prime_number_of_numbers_where_it_is_no_copy() -> None:
    assert [largest_prime(n) for n in (1, 2, 3, 4, 25, 32_768, 65_536)] == [1, 2, 3, 3, 23, 32_749, 65_521]
    assert [Sketch(p, 32_768).width for p in (10, 32_750, 32_768, 32_769)] == [10, 32_750, 32_768, 32_749]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 0.7)])
def test_the_mixture_and_the_sketches_are_those_of_two_plain_backwards(weights: tuple[float, float]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    parameters = list(model.parameters())
    inputs = torch.randn(2, 5, 3, dtype=torch.float64)
    losses = [lambda x=x: model(x).square().sum() for x in inputs]
    plain = [torch.autograd.grad(loss(), parameters) for loss in losses]
    mixer = GradientMixer(parameters, single_group(parameters, 65_536))
    sketches = []
    for loss, weight in zip(losses, weights, strict=True):
        with mixer.collecting([weight]) as sketch:
            loss().backward()
        sketches.append(sketch)
    assert all(p.grad is None for p in parameters)  # freed as produced
    mixer.release()
    for parameter, first, second in zip(parameters, *plain, strict=True):
        assert torch.allclose(parameter.grad, weights[0] * first + weights[1] * second, rtol=1e-12)  # type: ignore[arg-type]
    for sketch, gradient in zip(sketches, plain, strict=True):
        assert torch.allclose(sketch, torch.cat([g.flatten() for g in gradient]), rtol=1e-12)  # type: ignore[arg-type]
    mixer.close()
    model.zero_grad()
    losses[0]().backward()
    assert all(p.grad is not None for p in parameters)  # the hooks are gone


def test_a_tied_parameter_counts_once_with_both_its_gradients() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    mixer = GradientMixer([weight], single_group([weight], 9))
    with mixer.collecting([1.0]) as sketch:
        (weight @ weight).sum().backward()
    (expected,) = torch.autograd.grad((weight @ weight).sum(), weight)
    mixer.release()
    assert torch.allclose(weight.grad, expected) and torch.allclose(sketch, expected.flatten())  # type: ignore[arg-type]


def test_layer_groups_are_a_partition_with_weights_of_their_own() -> None:
    """Each group's mixture has its own weights, and each group's part of the sketch is its own gradient's sketch."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Linear(2, 3), "layers": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])})
    model["head"] = nn.Linear(3, 1)
    model.double()
    parameters = dict(model.named_parameters())
    groups = layer_groups(parameters, 65_536)
    assert [group.name for group in groups] == ["embedding", "layer_0", "layer_1", "head"]
    assert sorted(i for group in groups for i in group.members) == list(range(len(parameters)))

    def loss() -> torch.Tensor:
        hidden = model["embed"](torch.ones(2, dtype=torch.float64))
        return model["head"](model["layers"][1](model["layers"][0](hidden).tanh()).tanh()).sum()  # type: ignore[index]

    plain = torch.autograd.grad(loss(), list(parameters.values()))
    mixer = GradientMixer(list(parameters.values()), groups)
    weights = [0.0, 0.25, 0.5, 1.0]
    with mixer.collecting(weights) as sketch:
        loss().backward()
    mixer.release()
    start = 0
    for group, weight in zip(groups, weights, strict=True):
        own = torch.cat([plain[i].flatten() for i in group.members])
        assert torch.allclose(sketch[start : start + len(own)], own, rtol=1e-12)  # type: ignore[index]
        start += len(own)
        for index in group.members:
            gradient = list(parameters.values())[index].grad
            assert (gradient is None) if weight == 0 else torch.allclose(gradient, weight * plain[index])  # type: ignore[arg-type]
