"""A trained policy as a Hugging Face folder: `python -m bvpo.export runs/version_0 my-model`."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from bvpo import __version__
from bvpo.checkpoints import LAST
from bvpo.commands import exit_code
from bvpo.errors import UserError
from bvpo.lora import LoRA, add_adapters, merge_adapters, without_base
from bvpo.model_card import model_card
from bvpo.policy import load_policy, load_tokenizer, resolve_model
from bvpo.run_log import read_table
from bvpo.runs import read_config
from bvpo.sharded_checkpoints import MANIFEST, read_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Trained:
    """What a checkpoint and its run folder say.

    Attributes:
        weights: The policy's tensors, by their names in the model; its adapters' alone where there is a `lora`.
        settings: The run's resolved options; {} where the checkpoint does not lie in a run folder.
        rows: Of metrics.csv, up to the checkpoint's step.
    """

    checkpoint: Path
    policy: str
    step: int
    weights: Mapping[str, Tensor]
    lora: LoRA | None
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, str]]


def read_trained(run: Path) -> Trained:
    """A run folder's last checkpoint, or the one given. Raises UserError where there is none that can be exported."""
    path = run / "checkpoints" / LAST if run.is_dir() and not (run / MANIFEST).exists() else run
    if not path.exists():
        raise UserError(f"{run}: no {path.relative_to(run)} in this folder; give a run folder or a checkpoint file")
    state = read_whole(path)
    weights = {
        name.removeprefix("policy."): value for name, value in state["state_dict"].items() if name.startswith("policy.")
    }
    policy, lora = state.get("bvpo", {}).get("policy"), state.get("bvpo", {}).get("lora")
    if not weights or policy is None:
        raise UserError(f"{path}: is no checkpoint of bvpo.fit: it names no policy")
    step, folder = int(state["global_step"]), path.parent.parent
    table = folder / "metrics.csv"
    rows = [row for row in (read_table(table)[1] if table.exists() else []) if int(row["step"]) <= step]
    return Trained(path, policy, step, weights, lora and LoRA(**lora), _settings(folder, step), rows)


def _settings(folder: Path, step: int) -> Mapping[str, Any]:
    """The options in force at a step: a resumed run has saved them anew. Raises UserError where they are damaged."""
    resumed = {int(p.stem.rpartition("_")[2]): p for p in folder.glob("config_resumed_at_[0-9]*.yaml")}
    newest = max((start for start in resumed if start < step), default=None)
    path = folder / "config.yaml" if newest is None else resumed[newest]
    return read_config(path) if path.exists() else {}


def trained_model(trained: Trained, dtype: torch.dtype | None) -> PreTrainedModel:
    """The policy with the checkpoint's weights, adapters merged into them, in evaluation mode.

    Args:
        dtype: Of the weights; None leaves those of the run.

    Raises:
        UserError: The policy cannot be loaded, or is another model than the checkpoint's.
    """
    own = _base_dtype(trained)
    model = load_policy(trained.policy, own)
    if trained.lora is not None:
        add_adapters(model, trained.lora)
    found = {name: tuple(value.shape) for name, value in trained.weights.items()}
    state = model.state_dict() if trained.lora is None else without_base(model.state_dict(), "")
    expected = {name: tuple(value.shape) for name, value in state.items()}
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UserError(
            f"{trained.checkpoint}: is of another model than {trained.policy} is now: {len(differing)} tensors differ, "
            f"the first is {differing[0]}. Put the model that was trained back in its place, or give another checkpoint"
        )
    model.load_state_dict(dict(trained.weights), strict=trained.lora is None)
    merge_adapters(model)
    config = AutoConfig.from_pretrained(resolve_model(trained.policy))  # its dropout is on again, for who trains on
    config.architectures, config.dtype = [type(model).__name__], dtype or own
    model.config = config
    return model.to(dtype or own).eval()  # type: ignore[no-any-return,arg-type]


def _base_dtype(trained: Trained) -> torch.dtype:
    """The weights' dtype: a checkpoint of adapters does not have it, but the run's precision says it."""
    if trained.lora is None:
        return next(iter(trained.weights.values())).dtype
    precision = str(trained.settings.get("trainer", {}).get("precision"))
    return {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)


def export(run: Path, out: Path, dtype: torch.dtype | None = None) -> Trained:
    """Write the folder: weights, config, tokenizer, chat template, generation config and model card; all or nothing.

    Raises:
        UserError: `out` exists or cannot be written, or the run cannot be exported.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; give the name of a new folder")
    trained = read_trained(run)
    model, tokenizer = trained_model(trained, dtype), load_tokenizer(trained.policy)
    partial = lock = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(out)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        lock = _lock(partial)
        partial.chmod(0o755)
        _save_model(model, trained.policy, partial)
        tokenizer.save_pretrained(partial)
        card = model_card(trained.policy, trained.step, trained.settings, trained.rows, str(model.dtype))
        (partial / "README.md").write_text(card, encoding="utf-8")
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        os.rename(partial, out)  # fails where a folder with files has come to be there meanwhile
    except (OSError, SafetensorError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        raise UserError(f"{out}: cannot be written: {cause}. It needs about {size / 1e6:,.1f} MB") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    return trained


def _remove_left(out: Path) -> None:
    """Remove what killed exports to the same folder have left: a model's size each."""
    for partial in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        if (lock := _lock(partial)) is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A handle that keeps others from removing a folder until it is closed, or its process is gone.

    None where another process has it, or the file system has no locks.
    """
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
        else:
            return handle
    return None


def _save_model(model: PreTrainedModel, policy: str, folder: Path) -> None:
    """Weights and config; the generation config is the policy's own, to the byte."""
    model.save_pretrained(folder)
    (folder / GENERATION).unlink(missing_ok=True)
    own = cached_file(resolve_model(policy), GENERATION, _raise_exceptions_for_missing_entries=False)
    if own is not None:
        shutil.copyfile(own, folder / GENERATION)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0; 2 after an error that the user can mend; 130 when interrupted."""
    parser = ArgumentParser(prog="python -m bvpo.export", description=__doc__)
    parser.add_argument("run", type=str, help="A run folder such as runs/version_0, or a checkpoint file.")
    parser.add_argument("out", type=str, help="The folder to write; it must not exist.")
    names = Literal["float32", "bfloat16", "float16", "float64"]
    parser.add_argument("--dtype", type=names | None, default=None, help="Of the weights; null: the checkpoint's.")
    options = parser.parse_args(args)

    def work() -> None:
        trained = export(Path(options.run), Path(options.out), options.dtype and DTYPES[options.dtype])
        print(f"{options.out}: {trained.policy} after {trained.step} optimizer steps, bvpo {__version__}")

    return exit_code(work, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
