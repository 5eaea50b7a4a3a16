"""What tests/test_ranks.py runs in one process or in several: fits of small models, each with its own settings.

    python -m tests.rank_program FOLDER NAME …      (once a rank, with torchrun's environment variables)

Each named fit is written by the first rank to FOLDER/NAME.pt: the metrics of every optimizer step, the final weights,
and what each rank has seen.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bvpo import ranks, sharded_checkpoints
from bvpo.checkpoints import AtomicCheckpointIO, StepCheckpoint
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.lora import LoRA
from bvpo.losses import DPO
from bvpo.mixing import Fixed, MixingPolicy, Optimal
from bvpo.module import BVPO
from bvpo.sharding import FSDP2
from bvpo.slices import local


@dataclass(frozen=True)
class Case:
    """A fit: how an optimizer batch is split over ranks and microbatches, and what else is special about it."""

    batch_size: int = 4
    accumulate: int = 1
    strategy: str = "auto"
    rows: str = "rows.jsonl"
    steps: int = 5
    mixing: MixingPolicy = field(default_factory=Fixed)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    precision: Any = "32-true"
    broken_at: int | None = None  # a step whose loss is NaN on the last rank
    checkpoint: bool = False
    full_at: int | None = None  # a step whose checkpoint the last rank cannot write
    resume: str | None = None  # the case whose checkpoint the fit goes on from
    apart: bool = False  # each rank has found a checkpoint of its own to go on from
    policy: str = "llama"


@dataclass(frozen=True)
class BrokenOnOneRank(DPO):
    """DPO whose loss is NaN on the last rank while `on` is set."""

    on: list[bool] = field(default_factory=lambda: [False])

    def __call__(self, policy: Any, reference: Any) -> Tensor:
        losses = super().__call__(policy, reference)
        return losses * math.nan if self.on[0] and ranks.own() == ranks.count() - 1 else losses


SPLITS = {"8": Case(8), "4x2": Case(4, 2), "1x8": Case(1, 8)}
EARLY = Optimal(window=16, warmup_steps=2)
MARGINAL = Fixed(0.5, anchor="marginal", anchor_every=1)
LORA: dict[str, Any] = {"lora": LoRA(rank=4), "reference_logps": "adapter", "learning_rate": 1e-2}
ONE_RANK = {
    **SPLITS,
    "units of 2": Case(2, 4),
    "uneven": Case(1, 8, rows="uneven.jsonl"),
    "one-sided": Case(1, 8, rows="one_sided.jsonl", data={"on_one_sided": "keep"}),
    "parts": Case(8, data={"max_tokens": 80}),
    "marginal": Case(2, 4, rows="anchors.jsonl", mixing=MARGINAL),
    "marginal, wide": Case(8, rows="anchors.jsonl", mixing=MARGINAL),
    "lora": Case(4, 2, model=LORA),
    "lora bf16": Case(4, 2, model=LORA, precision="bf16-true", policy="tied"),
    "optimal": Case(4, 2, mixing=EARLY, steps=8),
    "tied": Case(4, 2, policy="tied"),
    "bf16-mixed": Case(4, 2, precision="bf16-mixed", policy="tied"),
}


def _both(name: str, **options: Any) -> dict[str, Case]:
    return {f"{strategy}, {name}": Case(strategy=strategy, **options) for strategy in ("ddp", "fsdp2")}


TWO_RANKS = {
    "fsdp2, 4": Case(4, 1, "fsdp2"),
    **_both("2x2", batch_size=2, accumulate=2),
    **_both("1x4", batch_size=1, accumulate=4),
    "fsdp2, offloaded": Case(4, 1, "offloaded"),
    **_both("uneven", batch_size=1, accumulate=4, rows="uneven.jsonl"),
    **_both("one-sided", batch_size=1, accumulate=4, rows="one_sided.jsonl", data={"on_one_sided": "keep"}),
    **_both("parts", batch_size=4, data={"max_tokens": 80}),
    **_both("bucketed", batch_size=2, accumulate=2, data={"bucket_by_length": True}),
    **_both("cached", batch_size=4, model={"reference_logps": "cached", "reference_cache": "cache"}),
    "ddp, marginal": Case(1, 4, "ddp", rows="anchors.jsonl", mixing=MARGINAL),
    "ddp, marginal of 2": Case(2, 2, "ddp", rows="anchors.jsonl", mixing=MARGINAL),
    "fsdp2, marginal": Case(4, 1, "fsdp2", rows="anchors.jsonl", mixing=MARGINAL),
    **_both("lora", batch_size=2, accumulate=2, model=LORA, checkpoint=True),
    "fsdp2, lora bf16": Case(2, 2, "fsdp2", model=LORA, precision="bf16-true", policy="tied"),
    **_both("broken", batch_size=4, broken_at=2),
    "fsdp2, checkpointing": Case(4, 1, "fsdp2", model={"activation_checkpointing": True}),
    "fsdp2, padded": Case(4, 1, "fsdp2", model={"packing": "off"}),
    "fsdp2, tied": Case(2, 2, "fsdp2", policy="tied"),
    "fsdp2, bf16-mixed": Case(2, 2, "fsdp2", precision="bf16-mixed", policy="tied"),
    **_both("optimal", batch_size=2, accumulate=2, mixing=EARLY, steps=8),
    **_both("optimal to 5", batch_size=2, accumulate=2, mixing=EARLY, steps=8, checkpoint=True, broken_at=-5),
    "ddp, optimal from 5": Case(2, 2, "ddp", mixing=EARLY, steps=8, resume="ddp, optimal to 5"),
    "fsdp2, optimal from 5": Case(2, 2, "fsdp2", mixing=EARLY, steps=8, resume="fsdp2, optimal to 5"),
    "fsdp2, full disk": Case(2, 2, "fsdp2", checkpoint=True, full_at=3),
}
EIGHT: dict[str, Any] = {"policy": "wide", "model": {"optimizer": "adamw_8bit"}, "steps": 4}
EIGHT_BITS = {
    "8 bits": Case(2, 2, "fsdp2", **EIGHT),
    "8 bits to 2": Case(2, 2, "fsdp2", checkpoint=True, broken_at=-2, **EIGHT),
    "8 bits from 2": Case(2, 2, "fsdp2", resume="8 bits to 2", **EIGHT),
}
FAULTS = {  # run behind those whose checkpoints they go on from
    "fsdp2, from broken": Case(2, 2, "fsdp2", mixing=EARLY, steps=8, resume="broken"),
    "fsdp2, lora from base": Case(2, 2, "fsdp2", model=LORA, resume="fsdp2, optimal to 5"),
    "fsdp2, another cut": Case(1, 4, "fsdp2", mixing=EARLY, steps=8, resume="fsdp2, optimal to 5"),
    "ddp, apart": Case(2, 2, "ddp", checkpoint=True, apart=True),
}
ALONE = {"one rank from two": Case(4, 2, "fsdp2", mixing=EARLY, steps=8, resume="fsdp2, optimal to 5")}


class Watch(L.Callback):
    """Metrics by step, the prompts that this rank has seen, and the bytes that it holds."""

    def __init__(self, case: Case, broken: BrokenOnOneRank) -> None:
        self.case, self.broken = case, broken
        self.metrics: list[dict[str, float]] = []
        self.prompts: list[list[int]] = []
        self.bytes: dict[str, int] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.prompts.append(batch.prompts.tolist())
        self.broken.on[0] = self.case.broken_at is not None and len(self.metrics) == self.case.broken_at
        if self.case.broken_at is not None and trainer.global_step == -self.case.broken_at:
            raise KeyboardInterrupt  # a fit that is stopped behind its checkpoint

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.bytes["gradients"] = _bytes(p.grad for p in module.policy.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.closes_step:
            self.metrics.append({**module.metrics, "step": trainer.global_step, "skipped": module.skips.total})
            state = module.optimizers().optimizer.state
            self.bytes["optimizer"] = _bytes(t for own in state.values() for t in own.values() if t.ndim)
            self.bytes["parameters"] = _bytes(module.policy.parameters())
            reference = getattr(module.reference, "model", None)
            self.bytes["reference"] = _bytes(reference.parameters()) if reference is not None else 0
            self.bytes["reference gradients"] = (
                _bytes(p.grad for p in reference.parameters() if p.grad is not None) if reference is not None else 0
            )


def _bytes(tensors: Any) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def run(folder: Path, name: str, case: Case) -> None:
    """One fit; the first rank saves what it came to."""
    L.seed_everything(1, verbose=False)
    broken = BrokenOnOneRank(beta=0.5)
    model = {**case.model}
    if "reference_cache" in model:
        model["reference_cache"] = str(folder / f"{model['reference_cache']}_{case.strategy}")
    options = {"learning_rate": 1e-3, **model}
    policy, source = str(folder / case.policy), str(folder / case.rows)
    module = BVPO(policy, loss=broken, mixing=case.mixing, accumulate=case.accumulate, **options)
    data = PairData(source, source, case.batch_size, case.accumulate, policy, **case.data)
    watch, checkpoints = Watch(case, broken), folder / f"{name} checkpoints"
    callbacks: list[L.Callback] = [watch]
    if case.checkpoint:
        saving = StepCheckpoint(checkpoints, save_last=True, save_top_k=0, every_n_train_steps=1)
        saving.goes_on_from = folder / f"machine {os.environ['RANK']}" / "last.ckpt" if case.apart else None
        callbacks.append(saving)
    trainer = L.Trainer(
        max_steps=case.steps,
        accelerator="cpu",
        devices=ranks_wanted(),
        strategy=FSDP2(reshard_after_forward=False, cpu_offload=True)
        if case.strategy == "offloaded"
        else case.strategy,
        precision=case.precision,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=case.checkpoint,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        limit_val_batches=1.0 if name.endswith("uneven") else 0,
        num_sanity_val_steps=0,
    )
    if not isinstance(trainer.strategy, FSDP2):
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    if case.resume == "broken" and ranks.own() == 0 and not (folder / "broken checkpoints").exists():
        shutil.copytree(folder / "fsdp2, optimal to 5 checkpoints", folder / "broken checkpoints")
        flip(folder / "broken checkpoints" / "last.ckpt" / "rank_00001.safetensors")
    ranks.barrier()
    ckpt = None if case.resume is None else str(folder / f"{case.resume} checkpoints" / "last.ckpt")
    error = ""
    write = sharded_checkpoints.save_file

    def full_disk(tensors: Any, path: Path) -> None:
        if trainer.global_step == case.full_at and ranks.own() == ranks.count() - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(tensors, path)

    sharded_checkpoints.save_file = full_disk
    try:
        with suppress(KeyboardInterrupt, SystemExit):
            trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    except UserError as raised:
        error = str(raised)
    sharded_checkpoints.save_file = write
    trained = module.policy.state_dict() if hasattr(module, "policy") else {}  # a refusal may come before it is loaded
    weights = {key: full(value).clone() for key, value in trained.items()}
    validation = {key: float(value) for key, value in trainer.callback_metrics.items() if "validation" in key}
    seen = ranks.gather_objects((watch.prompts, watch.bytes, watch.metrics))
    errors = ranks.gather_objects(error)
    if ranks.own() == 0:
        found = {"weights": weights, "metrics": watch.metrics, "validation": validation, "seen": seen, "errors": errors}
        torch.save(found, folder / f"{name}.pt")


def flip(path: Path) -> None:
    """Another bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def ranks_wanted() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = ONE_RANK | TWO_RANKS | FAULTS | ALONE | EIGHT_BITS
    for chosen in sys.argv[2:]:
        run(Path(sys.argv[1]), chosen, cases[chosen])
