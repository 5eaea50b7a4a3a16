"""What a fit needs of a device's memory, from the configuration alone: no weights are read, nothing is run.

The peak is that of one microbatch's forward pass of the reference, while the policy's graph is alive, or that of the
optimizer step, whichever is larger. Left out: the CUDA context and the allocator's fragments, about a gibibyte. With
one microbatch a step the mixed gradient is not there yet when the trace branch runs: it is then counted too much.

Shapes: S sequences of a branch's microbatch, T tokens, N completion tokens, V vocabulary, P parameters, D numbers of a
sketch. All figures are bytes, on one rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bvpo.errors import UserError
from bvpo.gradients import CHUNK
from bvpo.policy import resolve_model

WEIGHT_BYTES = {"bf16-true": 2, "16-true": 2, "64-true": 8}  # else 4
MATRIX_BYTES = WEIGHT_BYTES | {"bf16-mixed": 2, "16-mixed": 2}  # of what a matrix product takes and gives
# An RMS norm keeps its input, the normalised input and the next product's input: fp32 where it is computed in fp32.
NORM_BYTES = {"bf16-true": 8, "16-true": 8, "bf16-mixed": 10, "16-mixed": 10, "64-true": 24}  # else 12
ATTENTION_WIDTHS = 5  # kept by fused attention: query, key, value (repeated to all heads), output, and its copy in rows
MLP_WIDTHS = 4  # kept by a gated MLP: gate, activated gate, up, their product
SKETCHING_BYTES = 20  # scratch an element of a gradient's chunk, see `gradients.CHUNK`


@dataclass(frozen=True)
class ModelShape:
    """What a model's memory depends on.

    Attributes:
        parameters, largest: Numbers in all parameters, and in the largest of them.
        attention_width: Heads × numbers of a head.
        eager_attention: Whether every layer keeps its (heads, T, T) weights.
        positions: Tokens that the model was made for; None where its configuration does not say.
        rotary: Whether positions are angles, which go on behind that; learned ones end there.
    """

    parameters: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    attention_width: int
    vocabulary: int
    eager_attention: bool = False
    positions: int | None = None
    rotary: bool = True


@dataclass(frozen=True)
class BatchShape:
    """The largest microbatch of one branch.

    Attributes:
        sequences, tokens: S and T, padded to the longest.
        scored: Positions a sequence that logits are computed for: from the shortest prompt's end on.
        completion_tokens: N, over all sequences.
    """

    sequences: int
    tokens: int
    scored: int
    completion_tokens: int


@dataclass(frozen=True)
class MemoryFacts:
    """A configuration, as far as memory depends on it.

    Attributes:
        precision: Lightning's name: 32-true, bf16-mixed, bf16-true, 64-true.
        reference: Whether a frozen copy of the reference is in memory.
        sketches, sketch_width: Sketches kept, of the windows and of the running step, and D; 0 without statistics.
        ranks: Processes that share the work.
        sharded: Whether they share parameters, gradients and optimizer state, too.
        gpu: AdamW's temporaries are as large as the parameters there, and one parameter on a CPU.
    """

    model: ModelShape
    batch: BatchShape
    precision: str = "32-true"
    reference: bool = True
    sketches: int = 0
    sketch_width: int = 65_536
    ranks: int = 1
    sharded: bool = False
    gpu: bool = True


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank, by what holds them.

    Attributes:
        gradients: The mixed gradient, and one parameter's own on its way into it.
        casts: bf16 copies of the weights under mixed precision, kept while a graph is alive.
        activations, logits: Of one branch's microbatch; the other branch comes after it.
        optimizer_step: AdamW's temporaries, when no graph is alive.
    """

    parameters: int
    reference: int
    gradients: int
    optimizer: int
    statistics: int
    casts: int
    activations: int
    logits: int
    optimizer_step: int

    @property
    def total(self) -> int:
        """The peak."""
        lasting = self.parameters + self.reference + self.gradients + self.optimizer + self.statistics
        return lasting + max(self.casts + self.activations + self.logits, self.optimizer_step)

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def memory_estimate(facts: MemoryFacts) -> MemoryEstimate:
    """The peak of a fit, in parts.

    activations = layers · S · T · (2 · norm bytes · hidden + bytes · (5 · attention width + 4 · intermediate))
    logits = V · (S · scored · bytes + N · bytes + N · (8, or 12 where logits are cast to fp32)): the log-softmax that
    the policy's graph keeps, and the reference's logits, their completion part, its cast and its log-softmax.
    """
    model, batch = facts.model, facts.batch
    weight, matrix = WEIGHT_BYTES.get(facts.precision, 4), MATRIX_BYTES.get(facts.precision, 4)
    shards = facts.ranks if facts.sharded else 1
    own = -(-model.parameters // shards) * weight
    layer = (model.parameters - model.vocabulary * model.hidden) // model.layers
    whole = min(2 * model.largest + 2 * layer, model.parameters)  # gathered: a root's embedding and head, two layers
    gathered = whole * weight if facts.sharded else 0

    norms = 2 * NORM_BYTES.get(facts.precision, 12) * model.hidden
    widths = ATTENTION_WIDTHS * model.attention_width + MLP_WIDTHS * model.intermediate
    activations = model.layers * batch.sequences * batch.tokens * (norms + matrix * widths)
    square = batch.sequences * batch.tokens**2
    activations += square * model.layers * model.heads * (4 + matrix) if facts.model.eager_attention else square  # mask

    exact = max(4, matrix)  # bytes of a log-softmax
    cast = exact if matrix < exact else 0
    completion = batch.completion_tokens * (exact + matrix + cast + exact)
    scratch = min(CHUNK, model.largest) * SKETCHING_BYTES if model.parameters > CHUNK else exact * model.parameters
    return MemoryEstimate(
        parameters=own + gathered,
        reference=own * facts.reference,
        gradients=own + model.largest * weight,
        optimizer=2 * own,
        statistics=(facts.sketches * facts.sketch_width * exact + scratch) if facts.sketches else 0,
        casts=model.parameters * matrix if matrix < weight else 0,
        activations=activations,
        logits=model.vocabulary * (batch.sequences * batch.scored * matrix + completion),
        optimizer_step=own if facts.gpu else 2 * model.largest * weight,
    )


def model_shape(name: str) -> ModelShape:
    """Read a model's shape off its configuration. Raises UserError where that cannot be loaded."""
    try:
        config = AutoConfig.from_pretrained(resolve_model(name))
        with torch.device("meta"):
            model = cast(Any, AutoModelForCausalLM).from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: the model's configuration cannot be loaded: {str(error).strip()[:200]}") from error
    text = config.get_text_config()
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    sizes = [p.numel() for p in model.parameters()]
    return ModelShape(
        parameters=sum(sizes),
        largest=max(sizes),
        layers=int(text.num_hidden_layers),
        hidden=hidden,
        intermediate=int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden),
        heads=heads,
        attention_width=heads * int(getattr(text, "head_dim", None) or hidden // heads),
        vocabulary=int(text.vocab_size),
        eager_attention=model.config._attn_implementation == "eager",
        positions=getattr(text, "max_position_embeddings", None),
        rotary=any(getattr(text, name, None) for name in ("rope_parameters", "rope_theta")),
    )
