"""Loading reward models, and their networks: token ids of whole conversations → scores.

Shapes: S sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from bvpo.armorm import ARCHITECTURE, load_armorm, right_padded
from bvpo.errors import UserError
from bvpo.policy import resolve_model
from bvpo.traces import Conversation


class Classifier(nn.Module):
    """A sequence classifier of transformers with one label, its head in fp32.

    transformers takes the logit at the last token that is not the pad token. So sequences are padded with the model's
    own pad token or, where it has none, with one that occurs in no sequence of the batch.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        pad = model.config.get_text_config().pad_token_id
        self.pad = pad if pad is not None and 0 <= pad < self.vocabulary else None
        for name, module in model.named_children():
            if name != model.base_model_prefix:
                module.float().register_forward_pre_hook(_in_fp32)

    @torch.no_grad()
    def forward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Token ids → (S,) fp32 scores."""
        pad = self._unused_token(sequences) if self.pad is None else self.pad
        self.model.config.get_text_config().pad_token_id = pad
        input_ids, mask = right_padded(sequences, pad, self.model.device)
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=mask).logits  # (S, 1)
        return logits[:, 0].float()

    def _unused_token(self, sequences: Sequence[Sequence[int]]) -> int:
        used = {token for ids in sequences for token in ids}
        unused = next((token for token in range(self.vocabulary) if token not in used), None)
        if unused is None:
            raise UserError("the reward model has no pad token, and a batch holds every token: lower batch_size")
        return unused


def _in_fp32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, Tensor) else value for value in inputs)


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. Raises UserError where it cannot be loaded or has no chat template."""
    with _loading(name):
        options = {"trust_remote_code": trust_remote_code}
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(resolve_model(name), **options))
    if not tokenizer.chat_template:
        raise UserError(f"{name}: its tokenizer has no chat template; take a reward model that has one")
    return tokenizer


def render_answered(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, answer: str) -> str:
    """The text of a conversation with its answer. Raises UserError where the chat template refuses it."""
    messages = [*conversation, {"role": "assistant", "content": answer}]
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path!r} refuses the conversation: {error}") from error


def load_config(name: str, trust_remote_code: bool) -> Any:
    """The configuration of a folder or Hub id. Raises UserError where it cannot be loaded or has not one label."""
    with _loading(name):
        config = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
    if not _is_armorm(config) and config.num_labels != 1:
        raise UserError(
            f"{name}: its classifier has {config.num_labels} labels and a reward model has one; this may be a language "
            "model, or a classifier of another kind"
        )
    return config


def _is_armorm(config: Any) -> bool:
    return ARCHITECTURE in (config.architectures or [])


def on_device(network: nn.Module, device: str | None) -> nn.Module:
    """The network moved to the device; None takes the GPU where there is one.

    Raises:
        UserError: There is no such device, or its memory is too small.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return network.to(chosen)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise UserError(f"the reward model cannot be put on device {chosen!r}: {str(error).splitlines()[0]}") from error


def load_network(name: str, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """ArmoRM, or the sequence classifier of a folder or Hub id, its body in `dtype`.

    Raises:
        UserError: It cannot be loaded, or a tensor is missing or of another shape.
    """
    if _is_armorm(config):
        with _loading(name):
            return load_armorm(resolve_model(name), dtype)
    with _loading(name):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            resolve_model(name),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    unfilled = sorted([*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])])
    if unfilled:  # transformers has filled them with random numbers
        raise UserError(
            f"{name}: {len(unfilled)} tensors are missing or of another shape, the first is {unfilled[0]}: these "
            "weights are not those of a reward model"
        )
    return Classifier(model)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: the reward model cannot be loaded: {cause[:300]}") from error
