"""The marginal anchor: log π(y|x) from K traces a completion, so that μ is the gradient of the marginal loss.

    prior draws,      r_k ~ q(r|x):    log π(y|x)            ≈ logsumexp_k[ log π(r_k,y|x) − log q(r_k|x) ] − log K
    posterior draws,  r_k ~ π_ref(r|x,y): log π(y|x)/π_ref(y|x) ≈ logsumexp_k[ log π(r_k,y)/π_ref(r_k,y) ] − log K

Policy and reference use the same traces. The bias is O(1/K) and grows as the weights become uneven. Trust needs both a
good effective sample size and agreement of disjoint halves of the traces: the size alone misses a mode that few hit.

Shapes: C completions (chosen and rejected answers of a microbatch's rows), A sequences (a completion with one trace).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bvpo.losses import PairLogps, PreferenceLoss


def group_logsumexp(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """log Σ exp(values) within each group: (A,) values and group indices → (groups,); −inf where a group is empty."""
    top = torch.full((groups,), -torch.inf, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce(0, group, values.detach(), "amax")
    sums = torch.zeros_like(top).scatter_add(0, group, (values - top[group]).exp())
    return sums.log() + top


def marginal_logps(logps: Tensor, proposal: Tensor, completion: Tensor, completions: int) -> Tensor:
    """(C,) estimates of log π(y|x), up to a constant that policy and reference share.

    Args:
        logps: (A,) log π(r_k, y | x).
        proposal: (A,) log q(r_k | x); log π_ref(r_k, y | x) for posterior draws.
        completion: (A,) which of the completions a sequence belongs to.
    """
    counts = torch.bincount(completion, minlength=completions).to(logps)
    return group_logsumexp(logps - proposal, completion, completions) - counts.log()


@dataclass(frozen=True)
class AnchorQuality:
    """How far an anchor can be trusted: sums over completions, so that microbatches and ranks add up to one mean.

    Attributes:
        sums: (4,) effective sizes, completions, half differences, completions with two traces or more.
    """

    sums: Tensor

    @property
    def effective_size(self) -> Tensor:
        """1/Σ w² of the normalised weights w_k ∝ π(r_k,y|x)/q(r_k|x), a completion's mean: at most K."""
        return self.sums[0] / self.sums[1]

    @property
    def half_difference(self) -> Tensor:
        """|log π(y|x) from the even traces − from the odd ones| in nats, the mean over completions with two traces or
        more; NaN where there is none."""
        return self.sums[2] / self.sums[3]


@torch.no_grad()
def anchor_quality(logps: Tensor, proposal: Tensor, completion: Tensor, completions: int) -> AnchorQuality:
    """Quality of the estimates of `marginal_logps`, from the same arguments; float64."""
    weights = logps - proposal
    total = group_logsumexp(weights, completion, completions)
    square = torch.zeros_like(total).scatter_add(0, completion, (2 * (weights - total[completion])).exp())
    even = _rank_in_group(completion) % 2 == 0
    halves = [marginal_logps(logps[half], proposal[half], completion[half], completions) for half in (even, ~even)]
    size, difference = 1 / square, (halves[0] - halves[1]).abs()[torch.bincount(completion, minlength=completions) > 1]
    sums = [size.sum(), torch.ones_like(size).sum(), difference.sum(), torch.ones_like(difference).sum()]
    return AnchorQuality(torch.stack(sums).double())


def marginal_coefficients(
    loss: PreferenceLoss, policy: Tensor, reference: Tensor, proposal: Tensor, completion: Tensor, completions: int
) -> tuple[Tensor, AnchorQuality]:
    """(A,) ∂L/∂ log π(r_k,y|x) of the summed marginal loss, and the estimates' quality.

    Args:
        policy, reference, proposal: (A,) log π(r_k,y|x), log π_ref(r_k,y|x) and log q(r_k|x), as in `marginal_logps`.
        completion: (A,) which completion a sequence belongs to: the chosen ones come first, then the rejected ones.
    """
    leaf = policy.detach().requires_grad_()
    with torch.enable_grad():
        sides = [marginal_logps(logps, proposal, completion, completions).chunk(2) for logps in (leaf, reference)]
        tokens = torch.ones_like(sides[0][0])  # a marginal probability has no length
        losses = loss(*(PairLogps(chosen, rejected, tokens, tokens) for chosen, rejected in sides))
        (coefficients,) = torch.autograd.grad(losses.sum(), leaf)
    return coefficients, anchor_quality(policy, proposal, completion, completions)


def draw_two(weights: Tensor, completion: Tensor, completions: int, seed: int) -> tuple[list[int], list[int]]:
    """Two different sequences of each completion, with probability ∝ w_i w_j; −1 where it has one sequence only.

    E‖g_i − g_j‖²/2 over such draws is the variance of g over traces given the answers: exactly unbiased for posterior
    draws (equal weights), and for weighted ones the plug-in variance over 1 − Σ w².

    Args:
        weights: (A,) log of the traces' posterior weights, up to a constant a completion.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs: list[tuple[int, int]] = []
    for number in range(completions):
        own = (completion == number).nonzero()[:, 0].cpu()
        if len(own) < 2:
            pairs.append((-1, -1))
            continue
        w = weights[own.to(weights.device)].cpu().softmax(0)
        joint = torch.outer(w, w).fill_diagonal_(0.0).flatten()
        if not float(joint.sum()) > 0:  # one trace has all the weight
            pairs.append((-1, -1))
            continue
        i, j = divmod(int(joint.multinomial(1, generator=generator)), len(own))
        pairs.append((int(own[i]), int(own[j])))
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def _rank_in_group(group: Tensor) -> Tensor:
    """(A,) 0, 1, 2, … within each group, in the order of appearance."""
    order = group.argsort(stable=True)
    starts = torch.bincount(group).cumsum(0) - torch.bincount(group)
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - starts[group[order]]
    return rank
