"""A reasoning model so small that its prompts, traces and answers can be enumerated: the theorems' ground truth.

What a real run can only estimate is exact here: μ, the biases and covariances of trace and empty-trace gradients,
MSE_B(α) and α*_B, at any distance from the reference. The same model samples the rows that a real data set would hold,
so the estimators' own biases can be measured.

Data, as in the paper but with two candidates instead of five: for a uniform prompt x two responses (r, y) are drawn
from the reference until their answers differ, and the better answer is chosen, whatever its trace. The empty-trace pair
is drawn likewise and, given x, independently.

Shapes: X prompts, R traces, Y answers, N rows, P parameters, K anchor traces a row, M units of n rows.
A *table* is (X, R+1, Y): log π(r,y|x) of the traces, then log π(y|x,∅).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from bvpo.losses import DPO, PairLogps
from bvpo.mixing import ErrorTerms, Number, mean_squared_error, optimal_alpha
from bvpo.moments import GradientMoments

EMPTY = -1  # index of the empty trace


class Reasoner(nn.Module):
    """π(r|x) ∝ exp⟨prompt_x, trace_r⟩ and π(y|x,r) ∝ exp⟨answer_y, tanh(prompt_x + trace_r)⟩, in float64.

    The empty trace has a vector of its own and is never sampled; every other parameter serves both modes.
    """

    def __init__(self, prompts: int, traces: int, answers: int, width: int, scale: float, generator: Generator) -> None:
        super().__init__()

        def embedding(rows: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(rows, width, generator=generator, dtype=torch.float64))

        self.prompt, self.trace, self.answer = embedding(prompts), embedding(traces), embedding(answers)
        self.empty = embedding(1)

    def forward(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log π(r|x), (X, R), and log π(y|x,r), (X, R+1, Y); temperature divides the logits of both."""
        state = torch.tanh(self.prompt[:, None] + torch.cat([self.trace, self.empty]))  # (X, R+1, width)
        traces = self.prompt @ self.trace.T
        return (traces / temperature).log_softmax(-1), (state @ self.answer.T / temperature).log_softmax(-1)


@dataclass(frozen=True)
class Pairs:
    """N preference pairs as indices, every field (N,). Both traces of an empty-trace pair are `EMPTY`."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_trace: Tensor
    rejected_trace: Tensor

    def __getitem__(self, index: Tensor) -> Pairs:
        return Pairs(*(getattr(self, column.name)[index] for column in fields(self)))

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Rows:
    """What a data set holds: N rows of a trace pair, an empty-trace pair and (N, K) anchor traces."""

    trace: Pairs
    empty: Pairs
    anchor_traces: Tensor


@dataclass(frozen=True)
class Population:
    """Every row that the reference can produce.

    Attributes:
        trace, empty: (N,) pairs; row n holds `trace[n]` and `empty[n]`, of one prompt.
        probability: (N,) of the rows.
        answers: (X, Y, Y) probability of a prompt with its trace pair's chosen and rejected answer.
        proposal: (X, R) log q(r|x) that anchor traces are drawn from: tempered like the data, never filtered.
        dropped_fraction: Probability that the filter drops a response.
    """

    trace: Pairs
    empty: Pairs
    probability: Tensor
    answers: Tensor
    proposal: Tensor
    dropped_fraction: float

    @classmethod
    def enumerate(cls, model: Reasoner, scores: Tensor, temperature: float, kept: Tensor) -> Population:
        """Data sampled from `model`: (X, Y) `scores` of the answers, (R,) `kept` by the filter on traces."""
        proposal, answers = (logps.detach() for logps in model(temperature))
        responses = (proposal[..., None] + answers[:, :EMPTY]).exp() * kept[:, None]  # (X, R, Y)
        trace, trace_probability = enumerate_pairs(responses, scores)
        empty, empty_probability = enumerate_pairs(answers[:, EMPTY:].exp(), scores)
        empty = replace(empty, chosen_trace=empty.chosen_trace + EMPTY, rejected_trace=empty.rejected_trace + EMPTY)
        t, e = (trace.prompt[:, None] == empty.prompt).nonzero().T  # every two pairs of one prompt
        by_answers = torch.zeros(*scores.shape, scores.shape[1]).to(scores)
        by_answers.index_put_((trace.prompt, trace.chosen, trace.rejected), trace_probability, accumulate=True)
        return cls(
            trace[t],
            empty[e],
            trace_probability[t] * empty_probability[e] / len(scores),
            by_answers / len(scores),
            proposal,
            1 - float(responses.sum((1, 2)).mean()),
        )

    def draw(self, rows: int, generator: Generator) -> Tensor:
        """(rows,) indices of independent rows."""
        return self.probability.multinomial(rows, replacement=True, generator=generator)

    def sample(self, rows: int, anchor_traces: int, generator: Generator) -> Rows:
        """Independent rows, with anchor traces drawn from q independently of the pairs."""
        index = self.draw(rows, generator)
        trace = self.trace[index]
        anchors = self.proposal[trace.prompt].exp().multinomial(anchor_traces, replacement=True, generator=generator)
        return Rows(trace, self.empty[index], anchors)


def enumerate_pairs(responses: Tensor, scores: Tensor) -> tuple[Pairs, Tensor]:
    """All pairs of two responses, the better answer chosen, and their probabilities given the prompt.

    Args:
        responses: (X, R, Y) weight of a response of each prompt; the two are drawn independently in proportion to it.
        scores: (X, Y) of the answers; equal ones make no pair.
    """
    prompts, traces, answers = (torch.arange(size) for size in responses.shape)
    x, r, y, r_rejected, y_rejected = torch.cartesian_prod(prompts, traces, answers, traces, answers).T
    weight = responses[x, r, y] * responses[x, r_rejected, y_rejected] * (scores[x, y] > scores[x, y_rejected])
    pairs, weight = Pairs(x, y, y_rejected, r, r_rejected)[weight > 0], weight[weight > 0]
    return pairs, weight / torch.zeros(len(scores)).to(weight).index_add(0, pairs.prompt, weight)[pairs.prompt]


@dataclass(frozen=True)
class ExactMoments:
    """The population's gradients at one θ; variances are of one row, summed over parameters.

    Attributes:
        marginal, trace, empty: (P,) μ, E g_t and E g_e.
        trace_variance, empty_variance, covariance: trΣ_t, trΣ_e, trΣ_te.
        trace_conditional_variance: E tr Var(g_t | x, y⁺, y⁻): the part that the traces add.
    """

    marginal: Tensor
    trace: Tensor
    empty: Tensor
    trace_variance: Tensor
    empty_variance: Tensor
    covariance: Tensor
    trace_conditional_variance: Tensor

    @property
    def terms(self) -> ErrorTerms:
        b_t, b_e = self.trace - self.marginal, self.empty - self.marginal
        return ErrorTerms(b_t @ b_t, b_e @ b_e, b_t @ b_e, self.trace_variance, self.empty_variance, self.covariance)

    def mean_squared_error(self, alpha: Number, batch_size: Number) -> Tensor:
        return torch.as_tensor(mean_squared_error(alpha, *self.terms.values(), batch_size))

    def optimal_alpha(self, batch_size: Number) -> float:
        return float(optimal_alpha(*self.terms.values(), batch_size))


@dataclass(frozen=True)
class Oracle:
    """The exact gradients of a policy on data of its reference.

    Attributes:
        model: Gives the architecture.
        policy: (P,) θ.
        reference_table: (X, R+1, Y) log-probabilities at θ_ref.
        population: The data.
        loss: Taken of trace, empty-trace and marginal log-probabilities alike.
    """

    model: Reasoner
    policy: Tensor
    reference_table: Tensor
    population: Population
    loss: DPO

    @classmethod
    def build(
        cls,
        prompts: int = 6,
        traces: int = 8,
        answers: int = 4,
        width: int = 6,
        scale: float = 1.2,
        beta: float = 0.5,
        temperature: float = 1.0,
        longest: int | None = None,
        seed: int = 0,
    ) -> Oracle:
        """A random model at θ = θ_ref, and its data.

        Args:
            prompts, traces, answers, width: X, R, Y and the embeddings' width.
            scale: Standard deviation of the embeddings.
            beta: Of the DPO loss.
            temperature: That traces and answers are sampled at.
            longest: Responses with a longer trace are drawn again; trace r has r + 1 tokens.
            seed: Of embeddings and scores.
        """
        generator = Generator().manual_seed(seed)
        model = Reasoner(prompts, traces, answers, width, scale, generator)
        scores = torch.rand(prompts, answers, generator=generator, dtype=torch.float64)
        kept = torch.arange(1, traces + 1) <= (traces if longest is None else longest)
        population = Population.enumerate(model, scores, temperature, kept)
        reference = nn.utils.parameters_to_vector(model.parameters()).detach()
        return cls(model, reference, joint_logps(*model()).detach(), population, DPO(beta))

    def at(self, policy: Tensor) -> Oracle:
        """The same data and reference under another policy."""
        return replace(self, policy=policy)

    def drifted(self, drift: float, direction: int = 3) -> Oracle:
        """θ moved from here by normal noise of standard deviation `drift`, seeded by `direction`."""
        noise = torch.randn(self.policy.shape, generator=Generator().manual_seed(direction), dtype=torch.float64)
        return self.at(self.policy + drift * noise)

    def table(self, theta: Tensor) -> Tensor:
        """Log-probabilities at θ, (X, R+1, Y)."""
        values = theta.split([p.numel() for p in self.model.parameters()])
        named = zip(self.model.named_parameters(), values, strict=True)
        return joint_logps(*functional_call(self.model, {name: v.view(p.shape) for (name, p), v in named}, (1.0,)))

    @cached_property
    def policy_table(self) -> Tensor:
        return self.table(self.policy)

    @cached_property
    def score_functions(self) -> Tensor:
        """(X, R+1, Y, P) gradients of the table at θ."""
        scores: Tensor = jacrev(self.table)(self.policy)
        return scores

    def gradients(self, pairs: Pairs) -> Tensor:
        """(N, P) gradients of the pairs' losses: g_t of trace pairs, g_e of empty-trace pairs."""
        traces = self.policy_table.shape[1]
        chosen, rejected = (F.one_hot(r % traces, traces) for r in (pairs.chosen_trace, pairs.rejected_trace))
        return self._gradients(pairs, chosen.double().log(), rejected.double().log())

    def marginal_gradients(self, pairs: Pairs) -> Tensor:
        """(N, P) gradients of the marginal loss of the pairs' answers, all traces enumerated: their mean is μ."""
        every = F.pad(torch.zeros_like(self.population.proposal), (0, 1), value=-torch.inf)[pairs.prompt]
        return self._gradients(pairs, every, every)

    def anchor_gradients(self, pairs: Pairs, anchor_traces: Tensor) -> Tensor:
        """As `marginal_gradients`, with log π(y|x) ≈ logsumexp_k[log π(r_k,y|x) − log q(r_k|x)] − log K: (N, P)."""
        share = F.one_hot(anchor_traces, self.policy_table.shape[1]).double().mean(1)  # of the K draws: (N, R+1)
        weight = share.log() - F.pad(self.population.proposal, (0, 1))[pairs.prompt]
        return self._gradients(pairs, weight, weight)

    def effective_sample_size(self, pairs: Pairs, anchor_traces: Tensor) -> Tensor:
        """(Σ w)² / Σ w² of the chosen answer's weights w_k = π(r_k,y⁺|x) / q(r_k|x): (N,)."""
        logps = self.policy_table[pairs.prompt, :EMPTY, pairs.chosen] - self.population.proposal[pairs.prompt]
        return 1 / logps.gather(1, anchor_traces).softmax(-1).square().sum(-1)

    def _gradients(self, pairs: Pairs, chosen_weight: Tensor, rejected_weight: Tensor) -> Tensor:
        """(N, P) gradients of the loss of log Σ_r weight_r π(r,y|x); the log-weights are (N, R+1)."""
        rows = torch.arange(len(pairs))

        def logps(table: Tensor) -> PairLogps:
            chosen = (table[rows, pairs.prompt, :, pairs.chosen] + chosen_weight).logsumexp(-1)
            rejected = (table[rows, pairs.prompt, :, pairs.rejected] + rejected_weight).logsumexp(-1)
            return _pair_logps(chosen, rejected)

        policy = self.policy_table.expand(len(pairs), -1, -1, -1).clone().requires_grad_()  # a table for each row
        reference = self.reference_table.expand(len(pairs), -1, -1, -1)
        (by_table,) = torch.autograd.grad(self.loss(logps(policy), logps(reference)).sum(), policy)
        return by_table.flatten(1) @ self.score_functions.flatten(0, 2)

    @cached_property
    def row_gradients(self) -> Tensor:
        """(3, N, P) trace, empty-trace and marginal gradients of the population's rows."""
        trace, empty = self.population.trace, self.population.empty
        return torch.stack([self.gradients(trace), self.gradients(empty), self.marginal_gradients(trace)])

    @cached_property
    def moments(self) -> ExactMoments:
        p = self.population.probability
        trace, empty, marginal = means = p @ self.row_gradients
        t, e, _ = self.row_gradients - means[:, None]
        added = t - self._given_answers(t)
        return ExactMoments(
            marginal,
            trace,
            empty,
            trace_variance=p @ t.square().sum(-1),
            empty_variance=p @ e.square().sum(-1),
            covariance=p @ (t * e).sum(-1),
            trace_conditional_variance=p @ added.square().sum(-1),
        )

    def _given_answers(self, values: Tensor) -> Tensor:
        """E[values | x, y⁺, y⁻] at each of the population's rows: (N, P)."""
        pairs, p = self.population.trace, self.population.probability
        _, group = torch.stack([pairs.prompt, pairs.chosen, pairs.rejected]).unique(dim=1, return_inverse=True)
        total = torch.zeros_like(values).index_add(0, group, p[:, None] * values)
        return (total / torch.zeros_like(p).index_add(0, group, p)[:, None])[group]

    def window(self, units: Tensor, prompts: Tensor | None = None) -> GradientMoments:
        """A window of units of the population's rows, (M, n) indices; its anchor enumerates all traces."""
        trace, empty, anchor = self.row_gradients[:, units].mean(2)
        return GradientMoments.from_gradients(trace, empty, anchor, torch.full((len(units),), units.shape[1]), prompts)

    def sampled_window(self, rows: Rows, units: int) -> GradientMoments:
        """A window of M units of N/M sampled rows each; its anchor has the rows' anchor traces."""
        anchor = self.anchor_gradients(rows.trace, rows.anchor_traces)
        kinds = torch.stack([self.gradients(rows.trace), self.gradients(rows.empty), anchor])
        trace, empty, anchor = kinds.unflatten(1, (units, -1)).mean(2)
        return GradientMoments.from_gradients(trace, empty, anchor, torch.full((units,), len(rows.trace) // units))

    def marginal_loss(self, theta: Tensor) -> Tensor:
        """L_m at θ, with the whole population as data: a scalar."""
        losses = self.loss(_answer_pairs(self.table(theta)), _answer_pairs(self.reference_table))
        return (self.population.answers * losses).sum()

    def smoothness(self, thetas: Tensor) -> float:
        """Largest spectral norm of L_m's Hessian over (N, P) points."""
        hessians = vmap(jacrev(grad(self.marginal_loss)), chunk_size=128)(thetas)
        return float(torch.linalg.eigvalsh(hessians).abs().max())


def joint_logps(traces: Tensor, answers: Tensor) -> Tensor:
    """The table of what `Reasoner.forward` returns: (X, R+1, Y)."""
    return answers + F.pad(traces, (0, 1))[..., None]


def _pair_logps(chosen: Tensor, rejected: Tensor) -> PairLogps:
    """Pairs for DPO, which reads no lengths."""
    return PairLogps(chosen, rejected, torch.ones_like(chosen), torch.ones_like(rejected))


def _answer_pairs(table: Tensor) -> PairLogps:
    """log π(y|x) = log Σ_r π(r,y|x) of every two answers: (X, Y, Y)."""
    logps = table[:, :EMPTY].logsumexp(1)
    return _pair_logps(*torch.broadcast_tensors(logps[:, :, None], logps[:, None]))


def descent_bound(
    loss: Number,
    gradient_sq: Number,
    bias_sq: Number,
    mean_sq: Number,
    variance: Number,
    learning_rate: Number,
    smoothness: Number,
) -> Number:
    """Upper bound of E L(θ − η g) for an L-smooth loss (Theorem 3); at ηL = 1, L(θ) − η/2 ‖∇L‖² + η/2 MSE(g).

    Args:
        loss, gradient_sq: L(θ) and ‖∇L(θ)‖².
        bias_sq, mean_sq, variance: ‖E g − ∇L‖², ‖E g‖² and E‖g − E g‖² of the gradient that the step takes.
        learning_rate, smoothness: η and L.
    """
    biased = loss - learning_rate / 2 * (gradient_sq - bias_sq)
    rest = 1 - learning_rate * smoothness
    return biased - learning_rate / 2 * rest * mean_sq + learning_rate**2 * smoothness / 2 * variance
