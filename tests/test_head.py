"""The chunked head against autograd through all logits at once.

Shapes: M scored tokens, D numbers of a hidden state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from bvpo import head as head_module
from bvpo.head import BACKWARD_ROWS, Head, head_logps

M, D, V = 2 * BACKWARD_ROWS + 3, 8, 40  # the last chunk is a small one

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 3.0, "softcap": 5.0},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK", {"cpu": 1, "cuda": 1})  # the least rows, then


@pytest.fixture(params=["kept", "computed again"])
def softmax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to have the softmax in the backward pass."""
    if request.param == "computed again":
        monkeypatch.setattr(head_module, "KEPT", 0)
    return str(request.param)


def tensors(dtype: torch.dtype, bias: bool = False, **options: Any) -> tuple[Tensor, Head, Tensor, Tensor]:
    """Hidden states, head, targets, and the gradient that comes from above; one target is as good as certain."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    own = torch.randn(V, generator=generator, dtype=torch.float64) if bias else None
    hidden[0] = 6 * weight[7]
    targets = torch.randint(V, (M,), generator=generator)
    targets[0] = 7
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, own)]
    assert leaves[0] is not None and leaves[1] is not None
    return leaves[0], Head(leaves[1], leaves[2], **options), targets, torch.randn(M, generator=generator)


def plain_logps(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """The definition, with all logits in memory."""
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def gradients(logps: Callable[..., Tensor], hidden: Tensor, head: Head, targets: Tensor, above: Tensor) -> list[Tensor]:
    result = logps(hidden, head, targets)
    leaves = [leaf for leaf in (hidden, head.weight, head.bias) if leaf is not None]
    return [result.detach(), *torch.autograd.grad(result, leaves, above.to(result.dtype))]


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_those_through_all_logits(
    softmax: str, variant: str, dtype: torch.dtype, relative: float
) -> None:
    """fp32 against float64 on the same numbers: 1e-5 is 170 roundings of the largest entry."""
    hidden, head, targets, above = tensors(dtype, **VARIANTS[variant])
    exact = hidden.detach().double().requires_grad_(), head.to(torch.float64)
    expected = gradients(plain_logps, *exact, targets, above.double())
    found = gradients(head_logps, hidden, head, targets, above)
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == dtype
        assert_close(own.double(), other, rtol=relative, atol=relative * float(other.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bf16_every_gradient_is_within_rounding(softmax: str, variant: str) -> None:
    """Of the exact one on the same rounded numbers. 3% is 8 roundings of bf16 (2⁻⁸ each) in the norm."""
    hidden, head, targets, above = tensors(torch.bfloat16, **VARIANTS[variant])
    exact = hidden.detach().double().requires_grad_(), head.to(torch.float64)
    expected = gradients(plain_logps, *exact, targets, above.double())
    found = gradients(head_logps, hidden, head, targets, above)
    assert found[0].dtype == torch.float32 and all(own.dtype == torch.bfloat16 for own in found[1:])
    for own, other in zip(found, expected, strict=True):
        assert own.isfinite().all()
        assert (own.double() - other).norm() <= 0.03 * other.norm()


def test_a_certain_token_keeps_its_gradient_in_bf16(softmax: str) -> None:
    """1 − p comes from the log-probability: p alone is 1 in bf16 from 0.998 on."""
    hidden = torch.tensor([[7.0]], dtype=torch.bfloat16, requires_grad=True)
    head, targets = Head(torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)), torch.tensor([0])
    gradient = torch.autograd.grad(head_logps(hidden, head, targets).sum(), hidden)[0]
    assert float(gradient) == pytest.approx(1 - 1 / (1 + torch.exp(torch.tensor(-7.0)).item()), rel=2**-8)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(softmax: str, frozen: str) -> None:
    hidden, head, targets, above = tensors(torch.float64)
    expected = dict(zip(("hidden", "weight"), gradients(plain_logps, hidden, head, targets, above)[1:], strict=True))
    leaves = {"hidden": hidden, "weight": head.weight}
    leaves.pop(frozen).requires_grad_(False)
    ((name, leaf),) = leaves.items()
    (found,) = torch.autograd.grad(head_logps(hidden, head, targets), leaf, above.double())
    assert_close(found, expected[name])


def test_a_second_backward_pass_gives_the_same(softmax: str) -> None:
    hidden, head, targets, above = tensors(torch.float32)
    result = head_logps(hidden, head, targets)
    first, second = (torch.autograd.grad(result, head.weight, above, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("rows", "grad"), [(M, True), (0, True), (M, False)])
def test_what_is_kept_for_the_backward_pass(
    rows: int, grad: bool, softmax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No (M, V) tensor but the softmax, and that only where it is small and a backward pass is to come."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    hidden, head, targets, _ = tensors(torch.float32)
    with torch.set_grad_enabled(grad), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert len(head_logps(hidden[:rows], head, targets[:rows])) == rows
    assert (M * V in kept) == (softmax == "kept" and rows == M and grad)
    assert all(size in (rows, rows * D, V * D, rows * V) for size in kept)


def test_under_autocast_products_are_rounded_and_gradients_are_not() -> None:
    """As a linear layer's: bf16 products of fp32 weights, and gradients in fp32."""
    hidden, head, targets, above = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(head_logps, hidden, head, targets, above)
    expected = gradients(head_logps, hidden, head, targets, above)
    assert all(own.dtype == torch.float32 for own in found)
    for own, other in zip(found, expected, strict=True):
        assert 0 < (own - other).norm() <= 0.03 * other.norm()


def test_a_tied_embedding_gets_both_gradients_in_one_go(softmax: str) -> None:
    """Its hook sees their sum, once a backward pass."""
    embedding, tokens = nn.Embedding(V, D, dtype=torch.float64), torch.arange(M) % V
    targets, seen = tokens.roll(1), []

    def loss(logps: Callable[..., Tensor]) -> Tensor:
        return logps(torch.tanh(embedding(tokens)), Head(embedding.weight), targets).sum()

    (expected,) = torch.autograd.grad(loss(plain_logps), embedding.weight)
    embedding.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    loss(head_logps).backward()
    assert len(seen) == 1
    assert_close(seen[0], expected)
