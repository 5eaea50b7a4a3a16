"""A trained policy becomes a Hugging Face folder: the same numbers, and every part that a user expects."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bvpo import __version__, export, fit
from bvpo.checkpoints import read_checkpoint
from bvpo.policy import load_policy
from bvpo.run_log import read_table
from tests.test_durability import in_child, limit_file_size

Fit = Callable[..., Path]
IDS = torch.arange(4, 30)[None]


@pytest.fixture
def run(fit_llama: Fit) -> Path:
    return fit_llama()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.log_softmax(-1)


def refused(run: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one-line error; nothing is left behind."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert export.main([str(run), str(out), *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sorted(out.parent.iterdir()) == before
    return errors[0]


def test_the_folder_gives_the_trained_policys_log_probabilities_bit_for_bit(
    run: Path, llama_folder: Path, tmp_path: Path, fit_llama: Fit
) -> None:
    out = tmp_path / "models" / "out"
    assert export.main([str(run), str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    trained = load_policy(str(llama_folder))
    before = logits(trained)
    trained.load_state_dict({k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")})
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert exported.dtype == torch.float32 and torch.equal(logits(exported), logits(trained))
    assert not torch.equal(logits(exported), before)
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"} <= names
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, llama_folder)]
    assert configs[0] == configs[1]  # its dropout, too
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(llama_folder).get_vocab()
    again = fit_llama(f"--model.policy={out}", "--trainer.max_steps=1", root=tmp_path / "again")
    assert (again / "metrics.csv").exists()


def test_the_card_names_settings_and_results(run: Path, llama_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    for text in (str(llama_folder), str(pairs_file), "bvpo.losses.DPO", "bvpo.mixing.Fixed", "alpha: 0.5", __version__):
        assert text in body
    assert "| optimizer steps | 5 |" in body and "| learning rate, peak | 0.01 |" in body and "| seed | 0 |" in body
    estimate = float(read_table(run / "metrics.csv")[1][-1]["mixing/alpha_estimate"])
    assert f"| {estimate:.3f} ± " in body


def test_the_built_in_model_keeps_its_chat_template_and_accuracies(tmp_path: Path) -> None:
    config = Path(__file__).parent.parent / "experiments" / "alpaca.yaml"
    accuracy = [{"class_path": "bvpo.task_accuracy.TaskAccuracy", "init_args": {"questions": 4, "max_new_tokens": 4}}]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": accuracy, "max_steps": 1}}))
    options = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    assert fit.main([f"--config={config}", f"--config={tmp_path / 'short.yaml'}", *options]) == 0
    last, out = tmp_path / "version_0" / "checkpoints" / "last.ckpt", tmp_path / "out"
    assert export.main([str(last), str(out), "--dtype=bfloat16"]) == 0
    assert AutoTokenizer.from_pretrained(out).chat_template
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16
    assert (out / "generation_config.json").exists()
    card = (out / "README.md").read_text()
    assert "accuracy, thinking, at step 0" in card and "accuracy, no_thinking, at step 1" in card
    shutil.copy(last, tmp_path / "alone.ckpt")  # without its run folder's settings
    assert export.main([str(tmp_path / "alone.ckpt"), str(tmp_path / "alone")]) == 0


def test_what_cannot_be_exported_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = run / "checkpoints" / "last.ckpt"
    state = read_checkpoint(last)
    (tmp_path / "exists").mkdir()
    assert "exists already" in refused(run, tmp_path / "exists", capsys)
    assert "no checkpoints/last.ckpt" in refused(tmp_path / "exists", tmp_path / "out", capsys)
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "manifest.json").write_text("{}")
    assert "manifest.json" in refused(tmp_path / "sharded", tmp_path / "out", capsys)
    (tmp_path / "torn.ckpt").write_bytes(last.read_bytes()[:1000])
    assert "torn.ckpt: cannot be read" in refused(tmp_path / "torn.ckpt", tmp_path / "out", capsys)
    for name, change, expected in (
        ("adapters", {"state_dict": {"policy.q.lora_A": torch.zeros(1)}}, "tensors differ"),
        ("stranger", {"bvpo": {}}, "names no policy"),
        ("gone", {"bvpo": {"policy": str(tmp_path / "gone")}}, "no such folder"),
    ):
        torch.save(state | change, tmp_path / f"{name}.ckpt")
        assert expected in refused(tmp_path / f"{name}.ckpt", tmp_path / "out", capsys)


def test_a_checkpoint_of_another_model_is_refused(
    run: Path, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama_folder, other)
    LlamaForCausalLM(LlamaConfig.from_pretrained(llama_folder, num_hidden_layers=1)).save_pretrained(other)
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")
    torch.save(state | {"bvpo": {"policy": str(other)}}, tmp_path / "moved.ckpt")
    error = refused(tmp_path / "moved.ckpt", tmp_path / "out", capsys)
    assert "is of another model" in error and "model.layers.1" in error


def test_a_full_disk_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    """In a child no file may grow beyond 20 kB: the weights are larger."""

    def work() -> int:
        limit_file_size(20_000)
        with (tmp_path / "error.txt").open("w") as sys.stderr:
            return export.main([str(run), str(tmp_path / "models" / "out")])

    assert in_child(work) == 2
    error = (tmp_path / "error.txt").read_text().splitlines()[-1]
    assert error.startswith("error: ") and "cannot be written" in error and "It needs about 0." in error
    assert not list((tmp_path / "models").iterdir())


def test_what_killed_exports_have_left_is_removed(run: Path, tmp_path: Path) -> None:
    """A model's size each; another export's folder that is still written, and other names, stay."""
    folder = tmp_path / "models"

    def work() -> int:
        pytest.MonkeyPatch().setattr(export, "_save_model", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return export.main([str(run), str(folder / "out[1]")])

    for _ in range(2):
        assert in_child(work) == -signal.SIGKILL
        (left,) = folder.iterdir()
        assert left.name.startswith(".out[1].") and left.name.endswith(".partial")
    for name in (".out1.a.partial", ".out[1].b.partial"):
        (folder / name).mkdir()
    lock = export._lock(folder / ".out[1].b.partial")
    assert lock is not None
    assert export.main([str(run), str(folder / "out[1]")]) == 0
    os.close(lock)
    assert sorted(path.name for path in folder.iterdir()) == [".out1.a.partial", ".out[1].b.partial", "out[1]"]
