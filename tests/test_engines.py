"""How a generating model is started, and how much it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bvpo.engines import ServerEngine, TransformersEngine, VLLMEngine
from bvpo.errors import UserError
from bvpo.policy import context_length


def test_a_device_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's words, whatever its build raises."""

    def none(*_: object) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled\nand more")

    monkeypatch.setattr(torch.nn.Module, "to", none)
    with pytest.raises(UserError, match=r"cannot be moved to cuda: Torch not compiled with CUDA enabled$"):
        TransformersEngine(device="cuda").start("builtin:tiny_reasoner")


def test_an_engine_says_its_positions(llama_folder: Path) -> None:
    policy, server = str(llama_folder), ServerEngine("http://localhost/v1")
    own = context_length(policy)
    assert own is not None
    assert [engine.positions(policy) for engine in (TransformersEngine(), VLLMEngine(), server)] == [own] * 3
    assert VLLMEngine(max_model_len=160).positions(policy) == 160
