"""The models of a fit: the policy that is trained, and the reference that it is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import datasets
import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from bvpo import ranks
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.lora import LoRA, add_adapters, start_adapters
from bvpo.packed import use_attention_kernel, use_packed_attention
from bvpo.policy import check_causal, completion_logps, load_policy
from bvpo.reference import AdapterReference, CachedReference, LiveReference, Reference
from bvpo.reference_cache import ReferenceCache, weights_fingerprint
from bvpo.row_sizes import RowSizes, positions_misfit, row_misfit, tokenizer_size
from bvpo.shapes import ModelShape, model_shape
from bvpo.sharding import FSDP2
from bvpo.slices import is_sharded


@dataclass(frozen=True)
class Models:
    """How the models of a fit are loaded; the arguments are those of `module.BVPO`, and the trainer's strategy.

    Models are loaded in the precision that the trainer has made the default.
    """

    policy: str
    reference: str | None
    reference_logps: Literal["live", "cached", "adapter"]
    reference_cache: str | None
    lora: LoRA | None
    packing: Literal["auto", "flex", "off"]
    activation_checkpointing: bool
    strategy: Strategy | None = None

    def load_policy(self) -> tuple[PreTrainedModel, ModelShape]:
        """The policy, with its adapters where they are asked for, and its shape without them."""
        shapes: list[ModelShape] = []

        def prepare(model: PreTrainedModel) -> None:
            shapes.append(ModelShape.of(model))
            if self.lora is not None:
                add_adapters(model, self.lora)
            if self.activation_checkpointing:
                if not model.supports_gradient_checkpointing:
                    raise UserError(
                        f"--model.activation_checkpointing: {type(model).__name__} has none in transformers: leave it "
                        "off, and lower data.max_tokens where memory is short"
                    )
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable({"use_reentrant": False})

        model = self._load(self.policy, prepare)
        if self.lora is not None:
            start_adapters(model)
        return self._packed(model, self.policy), shapes[0]

    def load_reference(self, policy: PreTrainedModel) -> Reference:
        """Where the reference's log-probabilities come from; `policy` is as it is before training."""
        if self.reference_logps == "adapter":
            return AdapterReference(policy)
        other = self.reference if self.reference != self.policy else None
        own = None if other is None else self._frozen(other)
        if self.reference_logps == "cached":
            return CachedReference(weights_fingerprint(own or policy))
        if own is None and self.lora is None and not is_sharded(policy):
            return LiveReference.copy_of(policy)
        return LiveReference(own or self._frozen(self.policy))

    def require_room(self, shape: ModelShape, data: PairData) -> None:
        """Look at all rows' ids and lengths before a model does: a GPU would only say that an index is out of bounds.

        Args:
            shape: The policy's.

        Raises:
            UserError: Rows do not fit the policy or the reference. All ranks raise it where one does.
        """
        shapes = {self.policy: shape}
        if self.reference is not None and self.reference != self.policy:
            shapes[self.reference] = model_shape(self.reference)
        size = tokenizer_size(data.tokenizer)
        ids = any(size > own.vocabulary for own in shapes.values())
        misfits = []
        for name, rows in data.rows.items():
            sizes = RowSizes.of(rows, ids)
            for model, own in shapes.items():
                if misfit := row_misfit(own, sizes):
                    misfits.append(f"{data.sources[name]}, for {model}: {misfit.found}: {misfit.advice}")
                elif misfit := positions_misfit(own, sizes.longest):
                    rank_zero_warn(f"{data.sources[name]}, for {model}: {misfit.found}. What to do: {misfit.advice}")
        if found := [text for own in ranks.gather_objects(misfits) for text in own]:
            raise UserError(found[0])

    def fill_cache(self, reference: CachedReference, policy: PreTrainedModel, trainer: L.Trainer) -> None:
        """Give the rows their reference's log-probabilities, computed where the disk does not have them yet.

        Raises:
            UserError: The disk takes no more, or a file of the cache is damaged.
        """
        data = cast(PairData, trainer.datamodule)  # type: ignore[attr-defined]
        root = Path(self.reference_cache or Path(datasets.config.HF_DATASETS_CACHE) / "bvpo_reference")
        precision = f"{trainer.precision} {policy.dtype}"
        caches = {name: ReferenceCache(root, reference.weights, rows, precision) for name, rows in data.rows.items()}
        if ranks.of_first(any(cache.missing() for cache in caches.values())):  # a fast process may have begun to write
            model, device = policy, trainer.strategy.root_device
            if self.lora is not None or weights_fingerprint(model) != reference.weights:
                # another reference, or a resumed run
                model = self._frozen(self.reference or self.policy, policy.dtype)
                model = model if is_sharded(model) else model.to(device)  # type: ignore[arg-type]
                self.choose_kernel(model, trainer)
            bars = trainer.progress_bar_callback is not None and trainer.is_global_zero
            for name, cache in caches.items():
                cache.compute(
                    model,
                    data.batch_size,
                    data.max_tokens,
                    data.pad_token_id,
                    lambda batch: trainer.strategy.batch_to_device(batch, device),
                    trainer.precision_plugin.forward_context,
                    f"reference log-probabilities, {name} rows" if bars else None,
                )
        data.attach_reference({name: cache.attached() for name, cache in caches.items()})

    def choose_kernel(self, model: nn.Module, trainer: L.Trainer) -> None:
        """Let packed rows be attended in one call a layer, where the device that the model is on by now has a kernel.

        Raises:
            UserError: Packing is `flex`, and the device cannot train with it.
        """
        if self.packing == "off":
            return
        with trainer.precision_plugin.forward_context():
            fault = use_attention_kernel(cast(PreTrainedModel, model), self.packing, completion_logps)
        if fault is not None:
            rank_zero_warn(
                f"packed rows are attended sequence by sequence, the kernel for whole rows is wrong here: {fault}"
            )

    def _frozen(self, name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return self._packed(self._load(name, lambda _: None, dtype), name)

    def _load(
        self, name: str, prepare: Callable[[PreTrainedModel], None], dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """`prepare` is called before a model is divided over ranks, when it may have no numbers yet."""
        dtype = dtype or torch.get_default_dtype()
        if isinstance(self.strategy, FSDP2):
            sharded = self.strategy.load(name, dtype, prepare)
            check_causal(sharded, name)  # of an unsharded model, `load_policy` does
            return sharded
        model = load_policy(name, dtype)
        prepare(model)
        return model

    def _packed(self, model: PreTrainedModel, name: str) -> PreTrainedModel:
        """With the attention that packed sequences need, where it is right for the model."""
        if self.packing != "off" and (fault := use_packed_attention(model, completion_logps)):
            rank_zero_warn(f"{name}: sequences are padded, packing is not right for this model: {fault}")
        return model
