"""ArmoRM, a reward model of K objectives that the prompt weighs (arXiv 2406.12845), read from its safetensors.

Its own code ships with the checkpoint and does not import on transformers 5. The body is transformers' Llama, and the
head is written here. It computes in fp32 whatever the body does: the original rounds the head to the body's dtype.

Shapes: S sequences, T tokens, H hidden size, K objectives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, LlamaModel, PreTrainedConfig

from bvpo.errors import UserError

ARCHITECTURE = "LlamaForRewardModelWithGating"
GATING_PATTERN = [128009, 128006, 78191, 128007, 271]  # <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n


class Gating(nn.Module):
    """The objectives' weights, s · softmax(MLP(h) / τ)."""

    def __init__(self, widths: Sequence[int], temperature: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature

    def forward(self, hidden: Tensor) -> Tensor:
        """(S, H) hidden states of the prompts → (S, K)."""
        for layer in self.layers[:-1]:
            hidden = layer(hidden).relu()
        logits: Tensor = self.layers[-1](hidden)
        return (logits / self.temperature).softmax(-1) * self.logit_scale


class Head(nn.Module):
    """score = Σ_k g_k(h_x) (W h_y T)_k, with h_x where the prompt ends and h_y at the last token of the answer.

    Its parameters are named as in the checkpoint.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        objectives = getattr(config, "num_objectives", 19)
        hidden = [getattr(config, "gating_hidden_dim", 1024)] * getattr(config, "gating_n_hidden", 3)
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(objectives))
        temperature = getattr(config, "gating_temperature", 10)
        self.gating = Gating([config.hidden_size, *hidden, objectives], temperature)

    def forward(self, prompt_state: Tensor, answer_state: Tensor) -> Tensor:
        """(S, H), (S, H) → (S,)."""
        rewards = self.regression_layer(answer_state) @ self.reward_transform_matrix  # (S, K)
        scores: Tensor = (self.gating(prompt_state) * rewards).sum(-1)
        return scores


class Body(LlamaModel):
    """Llama, which takes `model.*` of the checkpoint and leaves the rest to the head."""

    _keys_to_ignore_on_load_unexpected = [r"^regression_layer\.", r"^reward_tr", r"^gating\."]  # noqa: RUF012


class ArmoRM(nn.Module):
    """Body and head."""

    def __init__(self, body: Body, head: Head) -> None:
        super().__init__()
        self.body, self.head = body, head

    @torch.no_grad()
    def forward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of whole conversations → (S,) fp32 scores. Raises UserError as `gating_position` does."""
        input_ids, mask = right_padded(sequences, 0, self.body.device)
        rows = torch.arange(len(sequences), device=self.body.device)
        gates = torch.tensor([gating_position(ids) for ids in sequences], device=self.body.device)
        output = self.body(input_ids=input_ids, attention_mask=mask, use_cache=False)
        hidden = output.last_hidden_state  # (S, T, H)
        scores: Tensor = self.head(hidden[rows, gates].float(), hidden[rows, mask.sum(1) - 1].float())
        return scores


def gating_position(ids: Sequence[int]) -> int:
    """Where the prompt ends: at the `<|eot_id|>` before the last assistant header.

    Raises:
        UserError: There is no such header in Llama 3's token ids.
    """
    width = len(GATING_PATTERN)
    for start in range(len(ids) - width, -1, -1):
        if list(ids[start : start + width]) == GATING_PATTERN:
            return start
    raise UserError(
        f"ArmoRM: a conversation does not hold the token ids {GATING_PATTERN} that open an answer: this tokenizer or "
        "chat template isn't Llama 3's; restore the checkpoint's own tokenizer files"
    )


def right_padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(S, T) ids and their (S, T) attention mask, which comes from the lengths."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    rows = [torch.tensor(ids) for ids in sequences]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return padded.to(device), mask.long().to(device)


def load_armorm(name: str, dtype: torch.dtype) -> ArmoRM:
    """The model of a folder or Hub id, its body in `dtype`.

    Raises:
        UserError: A tensor is missing, unknown or of another shape.
        OSError, SafetensorError: The files cannot be read.
    """
    folder = Path(name if Path(name).is_dir() else _download(name))
    config = AutoConfig.from_pretrained(folder)
    head, files = Head(config), _tensor_files(folder)
    own = head.state_dict()
    _refuse(name, "missing", own.keys() - files.keys())
    _refuse(name, "unknown", {key for key in files.keys() - own.keys() if not key.startswith("model.")})
    tensors = {key: _read(files[key], key) for key in own}
    _refuse(name, "of another shape", {key for key in own if tensors[key].shape != own[key].shape})
    head.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    body, loading = cast(Any, Body).from_pretrained(
        folder, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    _refuse(name, "missing", loading["missing_keys"])
    _refuse(name, "of another shape", {key for key, *_ in loading["mismatched_keys"]})
    _refuse(name, "unknown", loading["unexpected_keys"])
    return ArmoRM(body, head).eval().requires_grad_(False)


def _refuse(name: str, fault: str, tensors: set[str]) -> None:
    if tensors:
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        raise UserError(
            f"{name}: not a complete ArmoRM: the tensor {min(tensors)}{more} is {fault}; was the checkpoint copied "
            "completely?"
        )


def _download(name: str) -> str:
    return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"])


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint, of one file or of several with an index."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {key: folder / file for key, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _read(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return cast(Tensor, file.get_tensor(key))
