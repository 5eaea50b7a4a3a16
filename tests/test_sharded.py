"""Sharded runs on bad storage: all ranks end with a message. Two forked processes stand for a run's."""

from __future__ import annotations

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bvpo.errors import UserError
from bvpo.policy import empty_model, load_policy
from bvpo.sharded_checkpoints import read_common, save_sharded_checkpoint
from bvpo.sharding import _fill


def as_rank(number: int, folder: Path, path: Path) -> None:
    """Write a checkpoint as one of two ranks; what was raised goes to a file. Never returns."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=20)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", limit, rank=number, world_size=2)
    try:
        save_sharded_checkpoint({"global_step": 1, "state_dict": {}}, path)
        said = ""
    except UserError as error:
        said = str(error)
    (folder / f"said_{number}").write_text(said)
    os._exit(0)


def save_on_two(folder: Path, path: Path) -> list[str]:
    """What each of two ranks says."""
    folder.mkdir()
    children = []
    for number in range(2):
        if not (child := os.fork()):
            try:
                as_rank(number, folder, path)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    return [(folder / f"said_{number}").read_text() for number in range(2)]


def test_a_folder_that_cannot_be_made_ends_all_ranks(tmp_path: Path) -> None:
    """The first rank makes it; the other one waited for ever."""
    (tmp_path / "file").write_text("")
    said = save_on_two(tmp_path / "bad", tmp_path / "file" / "last.ckpt")
    assert all("the checkpoint cannot be written" in text and "Not a directory" in text for text in said), said
    assert save_on_two(tmp_path / "good", tmp_path / "last.ckpt") == ["", ""]
    assert read_common(tmp_path / "last.ckpt")["global_step"] == 1


DAMAGES = ["truncated", "torn index", "missing shard", "whole"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_said(llama_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    model = empty_model(str(folder))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "torn index":
        index.write_text('{"weight_map": {"a"')
    elif damage == "missing shard":
        shard = {"lm_head.weight": "model-00002-of-00002.safetensors"}
        index.write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    else:
        _fill(model, str(folder))
        whole = load_policy(str(folder)).state_dict()
        assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())
        return
    with pytest.raises(UserError, match=f"^{folder}: the model's weights cannot be read: .*was it copied completely"):
        _fill(model, str(folder))
