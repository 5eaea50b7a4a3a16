"""What memory and time depend on: shapes of models and of microbatches.

No weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bvpo.errors import UserError
from bvpo.policy import BUILTIN


@dataclass(frozen=True)
class Frequencies:
    """Rotary frequencies that are chosen anew in each forward pass, for the longest sequence in it.

    Attributes:
        kind: `longrope` has two sets of them, `dynamic` one for every length behind the border.
        border: Tokens up to which a sequence alone has the first set.
    """

    kind: str
    border: int

    @classmethod
    def of(cls, config: Any) -> Frequencies | None:
        """Those of a model's configuration; of several that layers have, the ones with the nearest border."""
        given = getattr(config, "rope_parameters", None) or {}
        found = []
        for own in (own for own in (given, *given.values()) if isinstance(own, dict)):
            if own.get("rope_type") == "dynamic":
                found.append(cls("dynamic", int(config.max_position_embeddings)))
            elif own.get("rope_type") == "longrope":
                found.append(cls("longrope", int(own["original_max_position_embeddings"])))
        return min(found, key=lambda own: own.border, default=None)


@dataclass(frozen=True)
class ModelShape:
    """What a model's memory and its floating-point operations depend on.

    Attributes:
        parameters, largest: Numbers in all parameters, and in the largest of them.
        heads, attention_width, key_width: Of attention: heads, and heads × numbers of a head, of queries and of keys or
            values. 0 where layers have none (Mamba, RWKV).
        eager_attention: Whether every layer keeps its (heads, T, T) weights.
        positions: Tokens that the model was made for; None where its configuration does not say.
        rotary: Whether positions are angles, or the model knows none: it goes on behind that; a table ends there.
        frequencies: Where the rotary frequencies depend on the longest sequence that is computed at the same time.
        tied: Whether the head's weight is the embedding's.
        products: Numbers in the matrices that every token is multiplied by, the head's aside; None where a router
            chooses among matrices.
        borders: Σ (inputs + outputs) over those matrices: a LoRA adapter of rank r has r times as many numbers.
        packs: Whether its sequences can be packed, as far as its architecture says.
        windows: Tokens that a query attends to at most, its own among them, of each layer with a sliding window; all
            other layers are taken to attend to all tokens.
    """

    parameters: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    attention_width: int
    key_width: int
    vocabulary: int
    eager_attention: bool = False
    positions: int | None = None
    rotary: bool = True
    frequencies: Frequencies | None = None
    tied: bool = False
    products: int | None = None
    borders: int = 0
    packs: bool = True
    windows: tuple[int, ...] = ()

    @property
    def head(self) -> int:
        """Numbers in the head's weight."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Numbers outside the layers: embedding, final norm and head."""
        return self.head * (1 if self.tied else 2) + self.hidden

    @property
    def layer(self) -> int:
        """Numbers in one layer."""
        return max(self.parameters - self.root, 0) // self.layers

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """A model's own, before adapters or sharding change it; its parameters may be on the meta device."""
        text = cast(Any, model.config.get_text_config())
        hidden, heads = int(text.hidden_size), int(getattr(text, "num_attention_heads", None) or 0)
        per_head = int(getattr(text, "head_dim", None) or hidden // max(heads, 1))
        groups = int(getattr(text, "num_key_value_heads", None) or heads)
        output = model.get_output_embeddings()
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        tied = output is not None and id(output.weight) in tables
        tables |= {id(output.weight)} if output is not None else set()
        parameters = list(model.parameters())
        matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in tables]
        routed = any(p.ndim > 2 for p in matrices) or bool(getattr(text, "num_experts", None))
        return cls(
            parameters=sum(p.numel() for p in parameters),
            largest=max(p.numel() for p in parameters),
            layers=int(text.num_hidden_layers),
            hidden=hidden,
            intermediate=_widest(text) or 4 * hidden,
            heads=heads,
            attention_width=heads * per_head,
            key_width=groups * per_head,
            vocabulary=int(text.vocab_size),
            eager_attention=model.config._attn_implementation == "eager",
            positions=getattr(text, "max_position_embeddings", None) if heads else None,
            rotary=any(getattr(text, name, None) for name in ("rope_parameters", "rope_theta"))
            or not _ends_in_a_table(model, getattr(text, "max_position_embeddings", None)),
            frequencies=Frequencies.of(text),
            tied=tied,
            products=None if routed else sum(p.numel() for p in matrices),
            borders=sum(sum(p.shape[-2:]) for p in matrices),
            packs=heads > 0 and isinstance(output, nn.Linear) and model._can_set_attn_implementation(),
            windows=sliding_windows(text),
        )


def sliding_windows(config: Any) -> tuple[int, ...]:
    """The window of each layer that has one. A configuration without `layer_types` (Mistral's) means all layers."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window:  # Qwen's is None or 0 where `use_sliding_window` is not set
        return ()
    sliding = config.num_hidden_layers if kinds is None else kinds.count("sliding_attention")
    return (int(window),) * int(sliding)


def _widest(text: Any) -> int | None:
    """Numbers inside an MLP: of the widest layer, where each has its own (Gemma 3n)."""
    given = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None)
    return max(map(int, given)) if isinstance(given, list | tuple) else given and int(given)


def _ends_in_a_table(model: PreTrainedModel, positions: int | None) -> bool:
    """Whether positions are looked up, in an embedding or a buffer that may have two rows more (OPT)."""
    tables = [own.weight for own in model.modules() if isinstance(own, nn.Embedding)]
    tables = [own for own in tables if own is not model.get_input_embeddings().weight]
    tables += [own for own in model.buffers() if own.ndim == 2]
    return positions is not None and any(positions <= len(own) <= positions + 2 for own in tables)


def model_shape(name: str) -> ModelShape:
    """Read a model's shape off its configuration, config.json alone. Raises UserError where that cannot be loaded."""
    try:
        config = AutoConfig.from_pretrained(BUILTIN.get(name, name))
        with torch.device("meta"):
            model = cast(Any, AutoModelForCausalLM).from_config(config)
    except (OSError, ValueError, StrictDataclassError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{name}: the model's configuration cannot be loaded: {cause}") from error
    return ModelShape.of(model)


@dataclass(frozen=True)
class BatchShape:
    """The most of one branch that goes through the model at once.

    Attributes:
        sequences, tokens: S and T, padded to the longest.
        scored: Positions a sequence that logits are computed for: from the shortest prompt's end on.
        completion_tokens: N, over all sequences.
        row: Tokens of the packed row, where each pair's prompt stands once; None where sequences are padded.
    """

    sequences: int
    tokens: int
    scored: int
    completion_tokens: int
    row: int | None = None

    @classmethod
    def full(cls, length: int, pairs: int, max_tokens: int | None, packed: bool) -> BatchShape:
        """Sequences that all have `length` tokens, next to none of them the prompt's: the most that rows can be."""
        if max_tokens is not None:
            pairs = min(pairs, max(1, max_tokens // (2 * length)))
        tokens = 2 * pairs * length
        return cls(2 * pairs, length, length, tokens, tokens if packed else None)
