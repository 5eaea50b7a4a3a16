"""The forward and backward passes of a training step: each estimator's, and those that the marginal anchor takes.

Under a sharded policy every pass is one of all ranks together; a rank that has nothing left to compute takes a dummy
through it, which counts nothing. Elsewhere a rank's passes are its own.

Shapes: B rows of a microbatch, A sequences of the anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bvpo import ranks
from bvpo.anchor import draw_two, marginal_coefficients
from bvpo.batches import AnchorBatch, Branch, PairBatch, SequenceBatch
from bvpo.gradients import GradientMixer
from bvpo.losses import PreferenceLoss
from bvpo.policy import completion_logps, in_step, sequence_logps
from bvpo.records import StepRecord, ValidationRecord, branch_metrics
from bvpo.reference import Reference
from bvpo.slices import is_sharded


@dataclass(frozen=True)
class Passes:
    """What the passes of a run are taken with.

    Attributes:
        gradients: Where the gradients of all passes go.
        backward: Lightning's `manual_backward`.
        max_tokens: Tokens, padding included, that go through the model at once.
    """

    policy: PreTrainedModel
    reference: Reference
    loss: PreferenceLoss
    gradients: GradientMixer
    backward: Callable[[Tensor], Any]
    max_tokens: int | None

    @property
    def share(self) -> float:
        """What a loss is multiplied with so that the ranks' gradients add up: sharded gradients are averaged."""
        return float(ranks.count()) if is_sharded(self.policy) else 1.0

    def branch(self, step: StepRecord, branch: Branch, sequences: SequenceBatch, weights: Sequence[float]) -> None:
        """One estimator's passes over one microbatch: its gradient goes, weighted, into the mixture."""
        if not any(weights) and not self.gradients.sketching:
            return
        step.computed.add(branch)
        parts = sequences.cut(self.max_tokens)
        with self.gradients.collecting(weights) as sketch:
            for part, counted in in_step(self.policy, parts):
                policy, reference = sequence_logps(self.policy, part), self.reference.logps(part)
                losses = self.loss(policy, reference)  # (B,)
                self.backward(losses.sum() * (counted * self.share) / part.step_pairs)
                if counted:
                    step.add(branch_metrics(branch, losses.detach(), policy, reference, self.loss.beta), part)
        step.add_sketch(branch, sketch)

    def validation(self, record: ValidationRecord, branch: Branch, sequences: SequenceBatch) -> None:
        """One branch's log values on rows that are not trained on."""
        for part, counted in in_step(self.policy, sequences.cut(self.max_tokens)):
            policy, reference = sequence_logps(self.policy, part), self.reference.logps(part)
            losses = self.loss(policy, reference)
            if counted:
                record.add(branch, branch_metrics(branch, losses, policy, reference, self.loss.beta), part.pairs)

    def anchor(self, step: StepRecord, batch: PairBatch, seed: int) -> None:
        """The marginal loss's gradient on one microbatch, sketched and not mixed in.

        ∇L = Σ_k ∂L/∂ℓ_k ∇ℓ_k over the log-probabilities ℓ_k of all its sequences. The coefficients are found first,
        without a graph; then at most as many sequences as a branch has are taken through the model at a time.
        """
        anchors, width = batch.anchors, len(batch.trace.lengths)
        parts = anchors.cuts(width, self.max_tokens) if anchors else []  # none where no row has a trace pair
        sequences = in_step(self.policy, [anchors.sequences.part(part) for part in parts] if anchors else [])
        with torch.no_grad():
            policy = [completion_logps(self.policy, part) for part, _ in sequences][: len(parts)]
            reference = [self.reference.completion_logps(part) for part, _ in sequences][: len(parts)]
        coefficients, proposal = torch.zeros(0), torch.zeros(0)
        if anchors is not None:
            reference_logps = torch.cat(reference).double()
            proposal = reference_logps if anchors.log_q is None else anchors.log_q
            coefficients, quality = marginal_coefficients(
                self.loss, torch.cat(policy).double(), reference_logps, proposal, anchors.completion, width
            )
            step.qualities.append(quality)
            proposal = reference_logps - proposal
        with self.gradients.collecting([0.0] * len(step.weights)) as sketch:
            for number, (part, counted) in enumerate(sequences):
                logps = completion_logps(self.policy, part)
                own = coefficients[parts[number]].to(logps) if counted else torch.zeros_like(logps)
                self.backward((logps * own).sum() * self.share / max(batch.trace.step_pairs, 1))
        step.add_sketch("anchor", sketch)
        self._conditional_variance(step, anchors, proposal, width, seed)

    def _conditional_variance(
        self, step: StepRecord, anchors: AnchorBatch | None, weights: Tensor, width: int, seed: int
    ) -> None:
        """The part of trΣ_t that sampling the traces causes: n/2 ‖g − g'‖² of two posterior draws of n rows' traces.

        Rows whose chosen or rejected answer has a single trace are left out; without any row nothing is recorded.
        """
        rows: list[int] = []
        draws: Sequence[list[int]] = ([], [])
        if anchors is not None:
            draws = draw_two(weights, anchors.completion, width, seed)
            rows = [row for row in range(width // 2) if min(draws[0][row], draws[0][width // 2 + row]) >= 0]
        sharded = is_sharded(self.policy)
        count = int(ranks.total(torch.tensor(len(rows)))) if sharded else len(rows)
        if not count:
            return
        sketches = []
        for drawn in draws:
            own = [drawn[row] for row in rows] + [drawn[width // 2 + row] for row in rows]
            parts = anchors.sequences.part(own).cut(self.max_tokens) if anchors is not None and rows else []
            with self.gradients.collecting([0.0] * len(step.weights)) as sketch:
                for part, counted in in_step(self.policy, parts):
                    losses = self.loss(sequence_logps(self.policy, part), self.reference.logps(part))
                    self.backward(losses.sum() * (counted * self.share) / count)
            assert sketch is not None
            sketches.append(sketch)
        difference = sketches[0] - sketches[1]
        if sharded:
            difference = ranks.total(difference)
        step.add_conditional_variance(count / 2 * difference.double().square().sum(), count / self.share)
