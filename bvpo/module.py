"""BVPO as a LightningModule: two losses, two backward passes, one mixed gradient a step.

How this differs from the paper (arXiv 2510.05095):
- α need not be fixed at 0.5: `mixing` sets it step by step from past steps only, and α̂ is estimated and logged for the
  batch that the optimizer sees, whatever α is in use.
- The two gradients come from two backward passes instead of one over the summed losses. The mixture is the same number;
  the separate gradients are what the statistics are made of, and each graph is freed before the next one is built.
- Dropout is off in policy and reference, so that both losses are ln 2 at step 0.

α̂ minimises the mean squared error of the raw gradient. AdamW and clipping rescale that gradient, and the bound that
makes this error the right target is tight at a step of 1/L only: read α̂ as a statement about the gradient, not about
accuracy.

Shapes: B rows of a microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from bvpo import ranks
from bvpo.batches import BRANCHES, PairBatch, SequenceBatch
from bvpo.compatibility import check_policy, check_trainer, with_fitting_statistics
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.gradients import GradientMixer, Group, layer_groups, single_group
from bvpo.lora import LoRA, without_base
from bvpo.losses import DPO, PreferenceLoss
from bvpo.mixing import Fixed, MixingPolicy
from bvpo.models import Models
from bvpo.monitor import GradientMonitor
from bvpo.optimization import SkippedSteps, adamw, follow_options, scheduled
from bvpo.passes import Passes
from bvpo.policy import resolve_model
from bvpo.records import StepRecord, ValidationRecord, gradient_metrics, trains
from bvpo.reference import CachedReference, LiveReference, Reference
from bvpo.slices import is_sharded
from bvpo.throughput import ModelFlops, peak_flops, peak_memory


class BVPO(L.LightningModule):
    """Policy, frozen reference, and the training step.

    Args:
        policy: The model to train: a Hub id, a folder saved by `save_pretrained`, or `builtin:tiny_reasoner`.
        reference: The model it is held to; by default the policy as it is before training.
        reference_logps: Where the reference's log-probabilities come from: `live` keeps a frozen copy in memory;
            `cached` computes them once, before the first step, and reads them from the disk from then on; `adapter` is
            the policy with its LoRA adapters off.
        reference_cache: Folder of cached log-probabilities; null: beside the cached rows. Runs share it.
        loss: The preference loss, applied to the trace pairs and to the empty-trace pairs.
        beta: Replaces the loss's own beta.
        mixing: What sets α, the weight of the trace gradient.
        lora: Train LoRA adapters (rank, alpha, target) instead of the weights; null trains the weights.
        learning_rate: Peak learning rate of AdamW.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        schedule: What the learning rate does after that, until the last optimizer step.
        weight_decay: AdamW's decoupled weight decay.
        optimizer: `adamw`, or `adamw_8bit`, whose moments take a byte a number each (torchao).
        accumulate: Microbatches of an optimizer step on a rank.
        clip: Largest norm of the mixed gradient; 0 does not clip.
        sketch_size: Numbers kept of a unit's gradient for the statistics; a smaller model's gradient is kept exactly.
        packing: `auto` computes sequences without padding, and a prompt that chosen and rejected share once, where the
            model's architecture allows it; `flex` does this with FlexAttention, on CUDA GPUs; `off` pads.
        activation_checkpointing: Keep the layers' inputs alone for the backward pass and compute the rest again: less
            memory for about a third more time.
    """

    def __init__(
        self,
        policy: str = "builtin:tiny_reasoner",
        reference: str | None = None,
        reference_logps: Literal["live", "cached", "adapter"] = "live",
        reference_cache: str | None = None,
        loss: PreferenceLoss = DPO(),
        beta: float | None = None,
        mixing: MixingPolicy = Fixed(),
        lora: LoRA | None = None,
        learning_rate: float = 1e-6,
        warmup_steps: int = 0,
        schedule: Literal["constant", "linear", "cosine"] = "cosine",
        weight_decay: float = 0.0,
        optimizer: Literal["adamw", "adamw_8bit"] = "adamw",
        accumulate: int = 1,
        clip: float = 1.0,
        sketch_size: int = 32_768,
        packing: Literal["auto", "flex", "off"] = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        for name, least, value in (
            ("learning_rate", 0, learning_rate),
            ("warmup_steps", 0, warmup_steps),
            ("weight_decay", 0, weight_decay),
            ("accumulate", 1, accumulate),
            ("clip", 0, clip),
            ("sketch_size", 1, sketch_size),
        ):
            if not value >= least:
                raise UserError(f"{name} must be ≥ {least}, got {value}")
        for model in (policy, reference):
            if model is not None:
                resolve_model(model)
        self.policy_name, self.reference_name = policy, reference
        self.reference_logps, self.reference_cache = reference_logps, reference_cache
        self.packing, self.activation_checkpointing, self.lora = packing, activation_checkpointing, lora
        if reference_logps == "adapter" and (lora is None or reference not in (None, policy)):
            raise UserError(
                "reference_logps adapter is the policy without its LoRA adapters: it needs --model.lora, and no "
                "--model.reference"
            )
        self.loss = loss if beta is None else loss.with_beta(beta)
        self.mixing = mixing
        if mixing.anchor == "marginal" and not isinstance(self.loss, DPO):
            raise UserError("the marginal anchor is defined for DPO: a marginal probability has no length to divide by")
        self.learning_rate, self.warmup_steps, self.schedule = learning_rate, warmup_steps, schedule
        self.weight_decay, self.accumulate, self.clip, self.sketch_size = weight_decay, accumulate, clip, sketch_size
        self.optimizer_name = optimizer
        self.strict_loading = lora is None  # a checkpoint has the adapters alone

        self.reference: Reference | None = None
        self.monitor: GradientMonitor | None = None
        self.metrics: dict[str, float] = {}  # of the last optimizer step
        self.skips = SkippedSteps()
        self._warned = False  # of steps whose pairs have no weight
        self._step: StepRecord | None = None

    # ------------------------------------------------------------------ models, statistics, optimizer

    def configure_model(self) -> None:
        """Load policy and reference, once; in the precision that the trainer has made the default."""
        if hasattr(self, "policy"):
            return
        if self._trainer is not None:
            check_trainer(self.trainer)
        self.policy, self.shape = self.models.load_policy()
        self.reference = self.models.load_reference(self.policy)
        if self.mixing.window:
            units = 1 if self._step_is_unit else self.accumulate
            if not (self._step_is_unit or is_sharded(self.policy)):  # each rank's microbatches are units of their own
                units *= ranks.count()
            dtype = torch.promote_types(self.policy.dtype, torch.float32)
            self.monitor = GradientMonitor(self.mixing, self._groups(), units, dtype)

    @property
    def models(self) -> Models:
        """How policy and reference are loaded."""
        return Models(
            self.policy_name,
            self.reference_name,
            self.reference_logps,
            self.reference_cache,
            self.lora,
            self.packing,
            self.activation_checkpointing,
            None if self._trainer is None else self.trainer.strategy,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BVPO:
        """Move buffers, but never cast them: `bf16-true` would round the rotary frequencies to 8 bits, which turns the
        angles at position 4096 by radians, away from the model that sampled the pairs. Adapters keep their fp32 too."""
        kept = {id(buffer) for buffer in self.buffers()}
        kept |= {id(parameter) for name, parameter in self.named_parameters() if "lora_" in name}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept else moved

        super()._apply(move, recurse)
        return self

    def _groups(self) -> list[Group]:
        trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        if self.mixing.per_group:
            return layer_groups(trained, self.sketch_size)
        return single_group(list(trained.values()), self.sketch_size)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]

    @property
    def _step_is_unit(self) -> bool:
        """Microbatches that were bucketed by length are no random subsets: only the whole step is."""
        return self._trainer is not None and self._data.bucket_by_length

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self.optimizer_name, self._trained(), self.learning_rate, self.weight_decay)
        return [optimizer], [scheduled(optimizer, self.total_steps, self.warmup_steps, self.schedule)]

    @property
    def total_steps(self) -> float:
        """Optimizer steps of the whole fit; inf where no number of them ends it."""
        return self._data.total_steps

    def on_fit_start(self) -> None:
        self.models.require_room(self.shape, self._data)
        self.models.choose_kernel(self.policy, self.trainer)
        if isinstance(self.reference, LiveReference):
            if not is_sharded(self.policy):
                self.reference.to(self.device)
            self.models.choose_kernel(self.reference.model, self.trainer)
        elif isinstance(self.reference, CachedReference):
            self.models.fill_cache(self.reference, self.policy, self.trainer)
        assert self.reference is not None
        self.gradients = GradientMixer(self._trained(), self._groups(), sketching=self.monitor is not None)
        self.flops = ModelFlops.of(self.shape, self.lora is not None, reference=self.reference_logps != "cached")
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self.peak = peak_flops(device, str(self.trainer.precision))
        self.passes = Passes(
            self.policy, self.reference, self.loss, self.gradients, self.manual_backward, self._data.max_tokens
        )
        order = self._data.sampler()
        self.batch_rows = min(order.step_rows, order.rows)  # an epoch may be less than a batch

    def on_train_start(self) -> None:
        """All is restored by now: sharded runs load their checkpoint behind `on_fit_start`."""
        follow_options(cast(LambdaLR, self.lr_schedulers()), self.learning_rate, self.weight_decay)
        if self.monitor is not None:
            self.monitor.resume(self.batch_rows)

    def on_fit_end(self) -> None:
        self.gradients.close()

    @property
    def _data(self) -> PairData:
        return cast(PairData, cast(Any, self.trainer).datamodule)

    # ------------------------------------------------------------------ the training step

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        if self._step is None:
            self._step = StepRecord(self._weights(batch), (batch.trace.step_pairs, batch.empty.step_pairs), self.flops)
        step, alphas = self._step, self._step.weights
        with self._unsynchronised():
            self.passes.branch(step, "trace", batch.trace, alphas)
            self.passes.branch(step, "empty", batch.empty, [1 - alpha for alpha in alphas])
            if self.monitor is not None and self.monitor.measures_anchor(self.global_step):
                self.passes.anchor(step, batch, seed=self.global_step)
        step.add_rows(batch)
        if batch.closes_step:
            self._optimize(step)
            self._step = None

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """DDP must not sum gradients: they are mixed first, and then summed once a step."""
        strategy: Any = self.trainer.strategy
        return strategy.block_backward_sync() if hasattr(strategy, "block_backward_sync") else nullcontext()

    def _weights(self, batch: PairBatch) -> list[float]:
        """α of each parameter group, from past steps only. Where a step has no pair of one estimator, the other one's
        gradient is all there is: it is taken whole, unless `mixing` gives it no weight. No parameter has a gradient
        then, and the optimizer leaves all as they are, momentum and weight decay included."""
        alphas, pairs = self._next_weights(), (batch.trace.step_pairs, batch.empty.step_pairs)
        if all(pairs):
            return alphas
        if trains(alphas, pairs):
            return [float(pairs[0] > 0)] * len(alphas)
        if not self._warned:
            kind = "trace" if pairs[0] else "empty-trace"
            rank_zero_warn(
                f"step {self.global_step}: its rows have {kind} pairs alone, to which α = {alphas[0]:g} gives no "
                "weight: it and steps like it leave the policy as it is"
            )
        self._warned = True
        return alphas

    def _next_weights(self) -> list[float]:
        if self.monitor is not None:
            return self.monitor.weights(self.global_step)
        return [self.mixing.weight(self.global_step, None)] * len(self.gradients.groups)

    def _optimize(self, step: StepRecord) -> None:
        """Clip, step, schedule; then the window of units, α̂ and the log."""
        optimizer, scheduler = cast(LightningOptimizer, self.optimizers()), cast(LambdaLR, self.lr_schedulers())
        sharded = is_sharded(self.policy)
        self.gradients.release(sum_over_ranks=not sharded and ranks.count() > 1)
        norm = torch.nn.utils.clip_grad_norm_(self._trained(), self.clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        units = step.units(self._data.batch_size, sharded)
        tensors = step.means() | {"gradient/mixed_norm": norm} | (gradient_metrics(units) if units else {})
        values = torch.stack([value.detach().double().to(self.device) for value in tensors.values()]).tolist()
        metrics = dict(zip(tensors, values, strict=True))
        metrics |= {"mixing/alpha": step.alpha, "learning_rate": scheduler.get_last_lr()[0]}
        work, number = (metrics.pop("tokens"), metrics.pop("flops")), self.global_step
        if not self.skips.may_step(metrics, number):
            optimizer.zero_grad()
            return
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if self.monitor is not None and units is not None:
            metrics |= self.monitor.update(units.merged() if self._step_is_unit else units, number, step.quality())
            metrics |= self.monitor.metrics(step.weights)
        if (memory := peak_memory(self.device)) is not None:
            metrics["memory/peak_gib"] = memory
        self._log_step(metrics | step.rates(*work, self.peak), number)

    def _log_step(self, metrics: dict[str, float], number: int) -> None:
        """Log once an optimizer step, on the number of steps taken before it: step 0 is the untrained policy."""
        # no cosine with a gradient of 0
        there = {name: value for name, value in metrics.items() if not math.isnan(value)}
        self.metrics = there | {"skipped_steps": float(self.skips.total)}
        if (every := cast(Any, self.trainer).log_every_n_steps) and number % every == 0:
            for logger in self.loggers:
                logger.log_metrics(self.metrics, step=number)

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        self._validation = ValidationRecord()

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        for branch in BRANCHES:
            self.passes.validation(self._validation, branch, cast(SequenceBatch, getattr(batch, branch)))

    def on_validation_epoch_end(self) -> None:
        """For callbacks, and for the loggers, by optimizer steps: Lightning's own axis counts microbatches."""
        means, alphas = self._validation.means(), self._next_weights()
        trace, empty = (means.get(f"validation/loss/{branch}") for branch in BRANCHES)
        if trace is not None and empty is not None:
            means["validation/loss/mixed"] = empty + sum(alphas) / len(alphas) * (trace - empty)
        self.log_dict(means, logger=False)
        for logger in [] if self.trainer.sanity_checking else self.loggers:
            logger.log_metrics({name: float(value) for name, value in means.items()}, step=self.global_step)
            logger.save()

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        lora = None if self.lora is None else asdict(self.lora)
        checkpoint["bvpo"] = {"policy": self.policy_name, "skipped": self.skips.total, "lora": lora}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The policy's weights, or its adapters alone, and the statistics."""
        state = super().state_dict(*args, **kwargs)
        return state if self.lora is None else without_base(state, "policy.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out statistics of other options. Raises UserError where the checkpoint is of another model."""
        kept, own = checkpoint.get("bvpo", {}), self.state_dict()
        check_policy(checkpoint["state_dict"], own, kept.get("policy", "another model"), self.policy_name)
        self.skips.total = kept.get("skipped", 0)
        checkpoint["state_dict"] = with_fitting_statistics(checkpoint["state_dict"], own)
