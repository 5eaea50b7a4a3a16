"""The policy: loading it, and the log-probabilities of a batch.

Shapes: S sequences (2B: the chosen ones, then the rejected ones), T tokens, N completion tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bvpo import ranks
from bvpo.batches import SequenceBatch
from bvpo.errors import UserError
from bvpo.losses import PairLogps, token_logps
from bvpo.packed import is_packed, packed_logps, sees_ahead
from bvpo.slices import is_sharded

BUILTIN = {"builtin:tiny_reasoner": Path(__file__).parent / "assets" / "tiny_reasoner"}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
# what the libraries raise at files that are not what they take them for, and where a package is missing
UNREADABLE = (OSError, ValueError, TypeError, KeyError, ImportError, StrictDataclassError, SafetensorError)


def resolve_model(name: str) -> str:
    """The folder or Hub id behind `--model.policy`.

    Raises:
        UserError: An unknown built-in name, a folder without configuration or weights, or a path that does not exist.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise UserError(f"there is no built-in model {name!r}; there is {', '.join(BUILTIN)}")
        return str(BUILTIN[name])
    folder = Path(name)
    try:
        folder.exists()
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{name}: no config.json in this folder; give a folder saved by `save_pretrained`")
        if not any(match for pattern in WEIGHTS for match in folder.glob(pattern)):
            raise UserError(f"{name}: no weights in this folder (expected *.safetensors); was it copied completely?")
    elif folder.exists():
        raise UserError(f"{name}: is a file; give the model's folder, a Hub id, or {', '.join(BUILTIN)}")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: there is no such folder; give a model's folder, a Hub id, or {', '.join(BUILTIN)}")
    return name


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a policy. Raises UserError where it cannot be loaded."""
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(resolve_model(name)))
    except UNREADABLE as error:
        raise _cannot_load(name, "tokenizer", error) from error


def context_length(name: str) -> int | None:
    """Positions that a model has, by its configuration; None where that does not say. Raises UserError as others do."""
    try:
        config = AutoConfig.from_pretrained(resolve_model(name))
    except UNREADABLE as error:
        raise _cannot_load(name, "configuration", error) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def stop_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts that end a model's completions: the tokenizer's EOS, then those of the generation config."""
    stops = [tokenizer.eos_token_id]
    try:
        named = GenerationConfig.from_pretrained(resolve_model(name)).eos_token_id or []
        stops += named if isinstance(named, list) else [named]
    except UNREADABLE:  # a model need not have one
        pass
    ids = [token for token in stops if isinstance(token, int) and token >= 0]  # −1 stands for none
    texts = tokenizer.convert_ids_to_tokens(ids)
    return tuple(dict.fromkeys(text for text in texts if text))


def load_policy(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model with every dropout set to 0.

    Raises:
        UserError: It cannot be loaded, is part of an encoder-decoder, or is a bidirectional encoder.
    """
    try:
        config = _config(name)
        model, loading = cast(Any, AutoModelForCausalLM).from_pretrained(
            resolve_model(name), config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except UNREADABLE as error:
        raise _cannot_load(name, "model", error) from error
    unfilled = sorted([*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])])
    if unfilled:  # transformers has filled them with random numbers
        raise UserError(f"{name}: {len(unfilled)} tensors are missing or of another shape, the first is {unfilled[0]}")
    model.train()
    _turn_noise_off(model)
    check_causal(model, name)
    return cast(PreTrainedModel, model)


def check_causal(model: PreTrainedModel, name: str) -> None:
    """Raises UserError where a token's log-probability would depend on what follows it. The model itself is asked."""
    if sees_ahead(model):
        raise UserError(
            f"{name}: its logits depend on later tokens, so it is no causal language model ({type(model).__name__}): "
            "give a decoder; encoders as BERT have no log-probability of a completion"
        )


def empty_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same with its parameters not filled in, so that `check_causal` is left to do. Raises UserError where its
    configuration cannot be loaded, or is an encoder-decoder's."""
    try:
        model = cast(Any, AutoModelForCausalLM).from_config(_config(name), dtype=dtype)
    except UNREADABLE as error:
        raise _cannot_load(name, "configuration", error) from error
    model.train()
    _turn_noise_off(model)
    return cast(PreTrainedModel, model)


def _config(name: str) -> Any:
    config = AutoConfig.from_pretrained(resolve_model(name))
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name}: an encoder-decoder ({config.model_type}), whose decoder alone is no language model: give a "
            "decoder-only model"
        )
    _turn_dropout_off(config)
    return config


def _cannot_load(name: str, part: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, TypeError | KeyError):
        cause = f"{type(error).__name__}: {cause}; its files do not hold what they should, was it copied completely?"
    if isinstance(error, ImportError) and "quantization" in cause:
        cause = f"{cause}. Quantized weights cannot be trained: give the model that they were made from"
    return UserError(f"{name}: the {part} cannot be loaded: {cause}")


def _turn_dropout_off(config: Any) -> None:
    """Dropout would make policy and reference differ at step 0, and the gradient noisier than the data makes it."""
    for key, value in vars(config).items():
        if isinstance(value, float) and ("drop" in key or key.endswith("_pdrop")):
            setattr(config, key, 0.0)
        elif hasattr(value, "to_dict"):
            _turn_dropout_off(value)


def _turn_noise_off(model: nn.Module) -> None:
    """Routers with jitter, which choose experts at random in training, choose as they do when the model is sampled.

    Their jitter is left as it is configured: Phi-MoE's is also the width of what it takes for a tie, outside training.
    """
    for module in model.modules():
        if any("jitter" in name for name in vars(module)):
            module.register_forward_pre_hook(_as_in_evaluation)


def _as_in_evaluation(module: nn.Module, _: Any) -> None:
    module.training = False


def sequence_logps(model: nn.Module, batch: SequenceBatch) -> PairLogps:
    """Log-probabilities of a branch's pairs: one forward pass over all sequences of the batch."""
    return by_side(completion_logps(model, batch), batch)


def by_side(sums: Tensor, batch: SequenceBatch) -> PairLogps:
    """(S,) sums as those of the chosen and the rejected completions."""
    tokens = batch.lengths - batch.prompt_lengths
    return PairLogps(*sums.chunk(2), *tokens.chunk(2))


def completion_logps(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """(S,) log π(completion | prompt), in nats: in one packed row where the model has `use_packed_attention`."""
    of_shards = getattr(model, "completion_logps", None)  # where `sharding.shard` has made it a forward pass
    return direct_logps(model, batch) if of_shards is None else cast(Tensor, of_shards(batch))


def direct_logps(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """The same by a model whose parameters are at hand."""
    if is_packed(model):
        return packed_logps(cast(PreTrainedModel, model), batch)
    return padded_logps(model, batch)


def in_step(model: nn.Module, parts: Sequence[SequenceBatch]) -> list[tuple[SequenceBatch, float]]:
    """Each part with weight 1; where the model is sharded, dummies of weight 0 follow, up to the number of parts that
    the rank with the most has."""
    own = [(part, 1.0) for part in parts]
    if not is_sharded(model):
        return own
    (most,) = ranks.largest([len(parts)])
    device = next(model.buffers(), next(model.parameters())).device
    return own + [(SequenceBatch.dummy(device), 0.0)] * (most - len(parts))


def padded_logps(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """(S,) the same of padded sequences, by the model's own forward pass: what packing is measured against.

    Logits are computed from the shortest prompt's end on only, where the model can do so.
    """
    first = int(batch.prompt_lengths.min()) - 1  # logits at t score the token at t + 1
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if _keeps_logits(model):
        inputs["logits_to_keep"] = batch.input_ids.shape[1] - first
    logits = model(**inputs).logits[:, -(batch.input_ids.shape[1] - first) : -1]  # (S, T − first − 1, V)
    scored = batch.completion_mask[:, first + 1 :]
    targets = batch.input_ids[:, first + 1 :]
    sums = torch.zeros(scored.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    sums[scored] = token_logps(logits[scored], targets[scored])  # (N, V), (N,)
    return sums.sum(1)


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
