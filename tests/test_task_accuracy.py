"""A policy that cannot be asked does not stop its fit."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from bvpo.policy import load_tokenizer
from bvpo.task_accuracy import TaskAccuracy

POLICY = "builtin:tiny_reasoner"


def test_a_model_without_cached_steps_is_not_measured_and_that_is_said_once() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(load_tokenizer(POLICY)), hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3
    )
    module: Any = SimpleNamespace(policy_name=POLICY, policy=AutoModelForCausalLM.from_config(config))
    trainer: Any = SimpleNamespace(global_step=0, datamodule=None, progress_bar_callback=None, loggers=[])
    accuracy = TaskAccuracy(questions=2, max_new_tokens=4)
    with pytest.warns(UserWarning, match="accuracy is not measured: Mamba.* its cached steps are not those of a plain"):
        accuracy.on_train_start(trainer, module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accuracy.on_train_end(trainer, module)
    assert (accuracy.before, accuracy.after) == ({}, {})
    late = TaskAccuracy(questions=2, max_new_tokens=4, before=False)
    late.on_train_start(trainer, module)
    with pytest.warns(UserWarning, match="accuracy is not measured"):
        late.on_train_end(trainer, module)
