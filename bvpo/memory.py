"""What a fit needs of each rank's memory, from the configuration alone: no weights are read, nothing is run.

The peak comes in a backward pass: while the head's is computed with all activations alive, while a layer's is, or,
sharded, while gradients of embedding and head are reduced at its end. The fused AdamW has no temporaries, and the
reference's forward pass needs less than the policy's backward pass. Left out: the CUDA context and the allocator's
fragments, about a gibibyte. With one microbatch a step the mixed gradient is not there yet when the trace branch runs:
it is then counted too much.

Shapes: S sequences of a branch's microbatch, T tokens, N completion tokens, R tokens through the layers (S·T padded, or
those of the packed row), V vocabulary, P parameters, D numbers of a sketch. All figures are bytes, on one rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from bvpo import head
from bvpo.gradients import CHUNK, KEPT
from bvpo.shapes import BatchShape, ModelShape

WEIGHT_BYTES = {"bf16-true": 2, "16-true": 2, "64-true": 8}  # else 4
MATRIX_BYTES = WEIGHT_BYTES | {"bf16-mixed": 2, "16-mixed": 2}  # of what a matrix product takes and gives
# An RMS norm keeps its input, the normalised input and the next product's input: fp32 where it is computed in fp32.
NORM_BYTES = {"bf16-true": 8, "16-true": 8, "bf16-mixed": 10, "16-mixed": 10, "64-true": 24}  # else 12
MLP_WIDTHS = 4  # kept by a gated MLP: gate, activated gate, up, their product
MLP_GRADIENTS = 3  # alive at once in its backward pass: the product's, the activated gate's, up's
EIGHT_BIT = 2 * (1 + 4 / 256)  # bytes a parameter of two moments: a byte each, and an fp32 scale for 256 of them
PRODUCT_BYTES = 8  # of an inner product of two sketches
SKETCHING_BYTES = 20  # scratch an element of a gradient's chunk, see `gradients.CHUNK`


@dataclass(frozen=True)
class MemoryFacts:
    """A configuration, as far as memory depends on it.

    Attributes:
        precision: Lightning's name: 32-true, bf16-mixed, bf16-true, 64-true.
        reference: Whether a frozen copy of the reference is in memory.
        sketches, sketch_width: Sketches kept, of the windows and of the running step, and D; 0 without statistics.
        products: Inner products of the windows' sketches, in float64.
        ranks: Processes that share the work.
        sharded: Whether they share parameters, gradients and optimizer state, too; else each has all (DDP).
        reshard: Whether a layer is given back between its forward and its backward pass.
        offload: Whether each rank's slices are in the host's memory.
        checkpointing: Whether a layer's activations are computed again for its backward pass.
        adapter: Rank of LoRA adapters, in fp32, on every matrix but the head; None trains all parameters.
        eight_bit: Whether AdamW keeps its moments in 8 bits.
        gpu: Chunks of logits are larger there.
    """

    model: ModelShape
    batch: BatchShape
    precision: str = "32-true"
    reference: bool = True
    sketches: int = 0
    sketch_width: int = 32_768
    products: int = 0
    ranks: int = 1
    sharded: bool = False
    reshard: bool = True
    offload: bool = False
    checkpointing: bool = False
    adapter: int | None = None
    eight_bit: bool = False
    gpu: bool = True

    @property
    def weight(self) -> int:
        """Bytes of a parameter that is kept."""
        return WEIGHT_BYTES.get(self.precision, 4)

    @property
    def matrix(self) -> int:
        """Bytes of a number in a matrix product."""
        return MATRIX_BYTES.get(self.precision, 4)

    @property
    def exact(self) -> int:
        """Bytes of a number in a log-softmax, a sketch, and a sum over ranks."""
        return max(4, self.matrix)

    @property
    def casts(self) -> bool:
        """Whether autocast makes copies of the weights; shards are gathered in the products' dtype."""
        return self.matrix < self.weight and not self.sharded

    @property
    def trained(self) -> int:
        """Parameters that have a gradient."""
        return self.model.parameters if self.adapter is None else self.adapter * self.model.borders


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank, by what holds them; of parts that are not there at the same time, the larger one counts.

    Attributes:
        parameters, reference, gradients, optimizer: This rank's share. Gradients: the mixed one, and one parameter's
            own on its way into it.
        buckets: DDP's copy of the gradients.
        statistics: Sketches of gradients, their inner products, signs and scratch.
        gathered: Of sharded parameters, those that are whole at a time: embedding, norm, head, and two layers.
        casts: bf16 copies of the weights under autocast.
        activations: What one branch's microbatch keeps for its backward pass; the other branch comes after it.
        logits, layer: At work on top of those: the head's backward pass, or one layer's.
        reduction: At work when activations are gone: gradients of embedding and head, before they are divided.
        host: In the host's memory instead, by offloading.
    """

    parameters: int
    reference: int
    gradients: int
    buckets: int
    optimizer: int
    statistics: int
    gathered: int
    casts: int
    activations: int
    logits: int
    layer: int
    reduction: int
    host: int = 0

    @property
    def total(self) -> int:
        """The device's peak."""
        held = self.parameters + self.reference + self.gradients + self.buckets + self.optimizer + self.statistics
        return held + self.gathered + self.casts + max(self.activations + max(self.logits, self.layer), self.reduction)

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def memory_estimate(facts: MemoryFacts) -> MemoryEstimate:
    """The peak of a fit, in parts."""
    model, trained = facts.model, facts.trained
    weight, own = facts.weight, facts.weight if facts.adapter is None else facts.exact  # of what is trained
    shards = facts.ranks if facts.sharded else 1
    one_gradient = min(model.largest, trained) * (facts.matrix if facts.sharded else own)
    adapters = 0 if facts.adapter is None else _share(trained, shards) * own
    held = {
        "parameters": _share(model.parameters, shards) * weight + adapters,
        "reference": _share(model.parameters, shards) * weight * facts.reference,
        "gradients": _share(trained, shards) * own,
        "optimizer": round(_share(trained, shards) * (EIGHT_BIT if facts.eight_bit else 2 * own)),
    }
    host = sum(held.values()) if facts.offload else 0
    held = dict.fromkeys(held, 0) if facts.offload else held
    held["gradients"] += one_gradient
    in_layers = trained if facts.adapter is not None else model.layer * model.layers
    root = model.root if facts.adapter is None else 0
    tokens, scored = _activations(facts), _logits(facts)
    return MemoryEstimate(
        **held,
        buckets=trained * own if facts.ranks > 1 and not facts.sharded else 0,
        statistics=_statistics(facts, shards),
        gathered=_gathered(facts),
        casts=(model.parameters - (0 if model.tied else model.head)) * facts.matrix if facts.casts else 0,
        activations=tokens.kept,
        logits=scored,
        layer=tokens.at_work + (in_layers // model.layers * (facts.matrix + facts.exact) if facts.sharded else 0),
        reduction=root * (facts.matrix + facts.exact) - min(one_gradient, root * facts.matrix) if facts.sharded else 0,
        host=host,
    )


def _share(numbers: int, shards: int) -> int:
    return -(-numbers // shards)


def _gathered(facts: MemoryFacts) -> int:
    model = facts.model
    if not facts.sharded:
        return 0
    return min(model.root + 2 * model.layer if facts.reshard else model.parameters, model.parameters) * facts.matrix


def _statistics(facts: MemoryFacts, shards: int) -> int:
    """Sketches, their products, and what one is made with: signs where they are kept, else the scratch of a chunk."""
    if not facts.sketches:
        return 0
    trained = facts.trained
    if trained > KEPT:
        making = min(CHUNK, facts.model.largest) * SKETCHING_BYTES
    else:
        making = _share(trained, shards) * (facts.exact if trained <= CHUNK else 1)
    return facts.sketches * facts.sketch_width * facts.exact + facts.products * PRODUCT_BYTES + making


@dataclass(frozen=True)
class _Tokens:
    """Activations: kept for the backward pass, and those that one layer's adds while it is computed."""

    kept: int
    at_work: int


def _activations(facts: MemoryFacts) -> _Tokens:
    """
    a layer's = R · (2 · norm · hidden + bytes · (query, key and value + attention's output, twice + 4 · intermediate))

    The output is kept as the kernel gives it and as the next product takes it. In a packed row, sequences behind a
    shared prompt attend with copies of their queries, keys and values: half of them more. Padded, keys and values are
    repeated to all heads.
    """
    model, batch, width = facts.model, facts.batch, facts.matrix
    rows = batch.sequences * batch.tokens if batch.row is None else batch.row
    norm = NORM_BYTES.get("bf16-true" if facts.sharded and width == 2 else facts.precision, 12)
    wide_inputs = facts.adapter is not None and facts.precision == "bf16-true"  # an adapter takes its input in fp32
    if facts.adapter is not None:  # the norm's own weight has no gradient that would need the normalised input
        norm = facts.exact + (0 if wide_inputs else width)
    norm *= model.hidden
    if batch.row is None:
        attention, square = 5 * model.attention_width, batch.sequences * batch.tokens**2
    else:
        attention, square = (7 * model.attention_width + 6 * model.key_width) // 2, 0
    layer = rows * (2 * norm + width * (attention + MLP_WIDTHS * model.intermediate))
    if facts.casts:  # autocast gives each product a copy of its own: query, key and value; gate and up
        layer += rows * 3 * model.hidden * width
    if wide_inputs:  # for each adapter, in the place of its matrix's input
        inner = model.attention_width + model.intermediate
        layer += rows * (facts.exact * (5 * model.hidden + inner) - width * inner)
    if model.eager_attention:
        layer += square * model.heads * (4 + width)
    backward = rows * (MLP_GRADIENTS * model.intermediate * width + 2 * facts.exact * model.hidden)
    ends = rows * norm + square  # the final norm, and a mask
    if not facts.checkpointing:
        return _Tokens(model.layers * layer + ends, backward)
    residual = facts.exact if facts.casts else width
    return _Tokens(model.layers * rows * model.hidden * residual + ends, layer + backward)


def _logits(facts: MemoryFacts) -> int:
    """
    packed: N · V · bytes of softmax, unless computed again, and the larger of: a chunk's logits, their cast and its
        log-softmax; its gradient, and that of the head's weight, summed in fp32, beyond what `gradients` counts of it.
    padded: V · (S · scored · bytes + N · (8, or 12 where logits are cast to fp32) + N · bytes): the log-softmax that
        the policy's graph keeps, and the reference's logits, their completion part, its cast and its log-softmax.
    """
    model, batch, width, exact = facts.model, facts.batch, facts.matrix, facts.exact
    if batch.row is None:
        cast = exact if width < exact else 0
        completion = batch.completion_tokens * (exact + width + cast + exact)
        return model.vocabulary * (batch.sequences * batch.scored * width + completion)
    numbers = batch.completion_tokens * model.vocabulary
    chunk = min(numbers, max(head.CHUNK["cuda" if facts.gpu else "cpu"], head.BACKWARD_ROWS * model.vocabulary))
    cast = exact if width < exact else 0
    forward = chunk * (width + cast + exact)
    backward = chunk * (exact + width * (1 + (chunk < numbers)))
    if facts.adapter is None:
        summed = exact + (width if cast else 0)
        backward += model.head * max(summed - (width if facts.sharded else facts.weight), 0)
    states = 2 * batch.completion_tokens * model.hidden * width  # hidden states of the scored tokens, their gradient
    softmax = numbers * width
    return (softmax if softmax <= head.KEPT else 0) + states + max(forward, backward)
