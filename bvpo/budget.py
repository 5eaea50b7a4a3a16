"""From the options of a fit to what its memory depends on: rows as they are, or the longest that may come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.gradients import Sketch
from bvpo.inspection import Inspection, batch_shape
from bvpo.machine import Machine
from bvpo.memory import MemoryFacts
from bvpo.module import BVPO
from bvpo.selection import SEQUENCES
from bvpo.shapes import BatchShape, ModelShape


def memory_facts(options: Any, module: BVPO, shape: ModelShape, batch: BatchShape, machine: Machine) -> MemoryFacts:
    """
    Args:
        options: The parsed ones, with those of the trainer and of the model.
        batch: The largest microbatch.
    """
    model = options.model
    units = units_of(module, options.data.bucket_by_length, machine)
    facts = MemoryFacts(
        shape,
        batch,
        str(options.trainer.precision or "32-true"),
        reference=model.reference_logps == "live",
        sketches=sketches_of(module, units),
        products=products_of(module, units, shape),
        ranks=machine.ranks,
        sharded=machine.sharded,
        reshard=machine.reshard,
        offload=machine.offload,
        checkpointing=model.activation_checkpointing,
        adapter=None if model.lora is None else model.lora.rank,
        eight_bit=model.optimizer == "adamw_8bit",
        gpu=machine.gpu,
    )
    return replace(facts, sketch_width=Sketch(facts.trained, module.sketch_size).width)


def units_of(module: BVPO, bucketed: bool, machine: Machine) -> int:
    """Units that an optimizer step brings to the statistics: a step whose microbatches are sorted by length is one.

    Ranks that share no parameters (DDP) have units of their own; of ranks that do, a gradient is of all their rows.
    """
    if bucketed:
        return 1
    return module.accumulate * (1 if machine.sharded else machine.ranks)


def sketches_of(module: BVPO, units: int) -> int:
    """Sketches that the statistics keep: the windows' units, and those of the running step.

    Args:
        units: Of a step, as `units_of`.
    """
    windows, window = _windows(module), module.mixing.window
    return sum(windows) * window * units + max(windows) * module.accumulate + 2 if window else 0


def products_of(module: BVPO, units: int, shape: ModelShape) -> int:
    """Inner products that the windows keep: of every two sketches, in each group of parameters.

    Args:
        units: Of a step, as `units_of`.
    """
    groups = shape.layers + 2 * (module.lora is None) if module.mixing.per_group else 1  # embedding and head
    return groups * sum((estimators * module.mixing.window * units) ** 2 for estimators in _windows(module))


def _windows(module: BVPO) -> tuple[int, ...]:
    """Estimators of each window: trace and empty; and with an anchor those and it, in a window of their own."""
    return (2, 3) if module.mixing.anchor == "marginal" else (2,)


def largest_batch(found: Inspection, kept: Sequence[int], data: PairData, packed: bool) -> BatchShape:
    """The largest microbatch that the rows can make, or the largest part that `data.max_tokens` leaves of one."""
    padded = batch_shape(found, kept, data.batch_size, data.max_tokens)
    if not packed:
        return padded
    pairs = np.concatenate([_pairs(found, kept, branch) for branch in ("trace", "empty")], axis=1)
    rows, completions = (int(np.sort(own)[:, -data.batch_size :].sum(1).max()) for own in pairs)
    if data.max_tokens is not None:
        rows = max(int(pairs[0].max()), min(rows, data.max_tokens))
    return replace(padded, row=rows, completion_tokens=min(rows, completions))


def _pairs(found: Inspection, kept: Sequence[int], branch: str) -> Any:
    """(2, 1, rows) tokens of each pair in a packed row, and of its completions."""
    (prompt, chosen), (_, rejected) = (SEQUENCES[f"{branch} {side}"] for side in ("chosen", "rejected"))
    columns = [found.tokenized.data.column(name) for name in (prompt, chosen, rejected)]
    counts = [pc.list_value_length(column).to_numpy()[list(kept)] for column in columns]
    completions = counts[1] + counts[2]
    return np.stack([np.where(counts[1] > 0, counts[0], 0) + completions, completions])[:, None]


def planned_batch(data: PairData, packed: bool) -> BatchShape:
    """The largest microbatch that any rows can make. Raises UserError where nothing limits them."""
    if data.max_length is None:
        raise UserError("--plan needs data.max_length: the most tokens that a sequence may have")
    return BatchShape.full(data.max_length, data.batch_size, data.max_tokens, packed)
