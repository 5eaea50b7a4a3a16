"""The command: what it writes, what it refuses, and that it is tied to no model."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bvpo import fit
from tests.conftest import make_rows, write_rows

Fit = Callable[..., Path]
ALPACA = Path(__file__).parent.parent / "experiments" / "alpaca.yaml"


def read_metrics(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_a_model_of_another_architecture_trains_and_logs_every_key(fit_llama: Fit) -> None:
    run = fit_llama("--model.accumulate=2")
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    branches = ("trace", "empty")
    expected = {"loss/trace", "loss/empty", "loss/mixed", "learning_rate", "tokens_per_second"}
    expected |= {f"reward/{b}_{what}" for b in branches for what in ("chosen", "rejected", "margin", "accuracy")}
    expected |= {f"logp/{b}_{s}_{how}" for b in branches for s in ("chosen", "rejected") for how in ("sum", "mean")}
    expected |= {f"gradient/{what}" for what in ("trace_norm", "empty_norm", "mixed_norm", "cosine")}
    expected |= {"gradient/noise_scale_trace", "gradient/noise_scale_empty"}
    expected |= {"variance/trace", "variance/empty", "variance/covariance", "variance/mixed", "bias/empty_sq"}
    expected |= {f"mixing/{what}" for what in ("alpha", "alpha_estimate", "alpha_standard_error", "mse_ratio")}
    assert expected <= rows[-1].keys()
    events = EventAccumulator(str(run)).Reload()
    assert expected <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/trace")] == [0, 1, 2, 3, 4]


def test_the_default_config_trains_another_model(
    llama_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names and a length change; the held-out questions cannot be asked without a chat template, which is said."""
    options = [f"--model.policy={llama_folder}", f"--data.train={pairs_file}", "--trainer.max_steps=2"]
    with pytest.warns(UserWarning, match="accuracy is not measured: the tokenizer has no chat template"):
        code = fit.main([f"--config={ALPACA}", *options, f"--trainer.default_root_dir={tmp_path}"])
    assert code == 0 and "Gradients, optimizer batch of 16 rows" in capsys.readouterr().out


def test_the_run_folder_holds_the_resolved_config_and_is_never_overwritten(fit_llama: Fit) -> None:
    first = fit_llama("--trainer.max_steps=1")
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    second = fit_llama("--trainer.max_steps=1", "--model.beta=0.2")
    assert (first.name, second.name) == ("version_0", "version_1")
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    saved = yaml.safe_load((second / "config.yaml").read_text())["model"]
    assert saved["beta"] == saved["loss"]["init_args"]["beta"] == 0.2
    assert fit.main([f"--config={second / 'config.yaml'}"]) == 0  # a saved config is a config
    assert (second.parent / "version_2" / "metrics.csv").exists()


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(fit_llama: Fit) -> None:
    losses = [[row["loss/mixed"] for row in read_metrics(fit_llama(f"--seed_everything={seed}"))] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("mixing", ["bvpo.mixing.Fixed", "bvpo.mixing.Optimal"])
def test_a_resumed_run_equals_the_uninterrupted_one(fit_llama: Fit, tmp_path: Path, mixing: str) -> None:
    """10 steps of 4 rows, 8 steps an epoch: the run is cut in the middle of the first epoch."""
    options = [f"--model.mixing={mixing}", "--model.accumulate=2", "--data.batch_size=2", "--model.schedule=constant"]
    whole = fit_llama(*options, "--trainer.max_steps=10", root=tmp_path / "whole")
    fit_llama(*options, "--trainer.max_steps=5", root=tmp_path / "cut")
    resumed = fit_llama(*options, "--trainer.max_steps=10", "--ckpt_path=last", root=tmp_path / "cut")
    assert resumed.name == "version_0"
    for before, after in zip(read_metrics(whole), read_metrics(resumed), strict=True):
        before.pop("tokens_per_second"), after.pop("tokens_per_second")
        assert before == after
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, resumed)]
    for key, value in states[0]["state_dict"].items():
        other = states[1]["state_dict"][key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key


def test_the_reference_is_in_no_checkpoint(fit_llama: Fit) -> None:
    checkpoint = torch.load(fit_llama("--trainer.max_steps=1") / "checkpoints" / "last.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"policy", "monitor"}


def test_validation_rows_are_logged_and_leave_the_weights_alone(fit_llama: Fit, pairs_file: Path) -> None:
    run = fit_llama(f"--data.validation={pairs_file}", "--trainer.check_val_every_n_epoch=1", "--trainer.max_steps=8")
    plain = fit_llama("--trainer.max_steps=8")
    logged = [row for row in read_metrics(run) if "validation/loss/trace" in row]
    assert logged and logged[0]["step"] == 8
    weights = [torch.load(r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in (run, plain)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items() if key.startswith("policy."))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train(fit_llama: Fit, precision: str) -> None:
    rows = read_metrics(fit_llama(f"--trainer.precision={precision}", "--model.learning_rate=1e-3"))
    assert rows[0]["loss/trace"] == pytest.approx(0.6931, abs=1e-4)
    assert rows[-1]["loss/mixed"] < rows[0]["loss/mixed"]


def test_bucketing_by_length_changes_neither_rows_nor_gradient(fit_llama: Fit) -> None:
    plain = read_metrics(fit_llama("--model.accumulate=4", "--data.batch_size=2"))
    bucketed = read_metrics(fit_llama("--model.accumulate=4", "--data.batch_size=2", "--data.bucket_by_length=true"))
    for before, after in zip(plain, bucketed, strict=True):
        for key in ("loss/mixed", "gradient/mixed_norm", "reward/trace_margin"):
            assert after[key] == pytest.approx(before[key], rel=1e-4, abs=1e-6)


BAD_INPUT = {  # an option that a user may get wrong, and what the message must hold
    "missing file": ("--data.train={folder}/none.jsonl", "no such file"),
    "empty file": ("--data.train={folder}/empty.jsonl", "the file is empty"),
    "missing column": ("--data.train={folder}/unknown.jsonl", "no column empty_chosen"),
    "null field": ("--data.train={folder}/null.jsonl", "row 2: field rejected: expected text"),
    "a number for a text": ("--data.train={folder}/number.jsonl", "row 1: field chosen: expected text"),
    "chosen = rejected": ("--data.train={folder}/same.jsonl", "row 3: chosen equals rejected"),
    "broken JSON": ("--data.train={folder}/broken.jsonl", "broken.jsonl: cannot be read"),
    "no rows": ("--data.train={folder}/none.parquet", "no rows"),
    "a folder for a file": ("--data.train={folder}", "not a data set"),
    "unknown built-in data": ("--data.train=builtin:nothing", "builtin:nothing"),
    "too long": ("--data.max_length=3", "row 1: longest sequence has"),
    "α above 1": ("--model.mixing.alpha=1.5", "[0, 1]"),
    "α below 0": ("--model.mixing.alpha=-0.1", "[0, 1]"),
    "FlexAttention on a CPU": ("--model.packing=flex", "--model.packing auto"),
    "β = 0": ("--model.beta=0", "beta must be > 0"),
    "β of the loss": ("--model.loss.beta=-1", "beta must be > 0"),
    "no weights": ("--model.policy={folder}/hollow", "no weights"),
    "no such folder": ("--model.policy={folder}/nothing", "no such folder"),
    "unknown built-in model": ("--model.policy=builtin:nothing", "builtin:nothing"),
    "no such checkpoint": ("--ckpt_path={folder}/none.ckpt", "no such checkpoint"),
    "a torn checkpoint": ("--ckpt_path={folder}/torn.ckpt", "cannot be read"),
    "batch of 0": ("--data.batch_size=0", "batch_size must be ≥ 1"),
    "fp16": ("--trainer.precision=16-true", "use bf16-mixed"),
    "another strategy": ("--trainer.strategy=deepspeed", "--trainer.strategy fsdp2, which"),
    "FSDP1": ("--trainer.strategy=fsdp", "--trainer.strategy fsdp2, which"),
    "the trainer's clipping": ("--trainer.gradient_clip_val=1.0", "--model.clip"),
    "no GPU": ("--trainer.accelerator=gpu", "No supported gpu backend found"),
    "no threads": ("--threads=0", "threads must be ≥ 1"),
    "a file for a root": ("--trainer.default_root_dir={folder}/empty.jsonl", "Give another --trainer.default_root_dir"),
    "a root in a file": ("--trainer.default_root_dir={folder}/empty.jsonl/runs", "Give another --trainer.default_"),
    "no run at all": ("--trainer.barebones=true", "leaves out logs and checkpoints"),
    "a few batches again and again": ("--trainer.overfit_batches=2", "a file of a few rows"),
    "fp8": ("--trainer.precision=transformer-engine", "use bf16-mixed"),
    "checkpoints elsewhere": ("--checkpoint.dirpath={folder}/checkpoints", "--trainer.default_root_dir a place"),
    "a link for a checkpoint": ("--checkpoint.save_last=link", "files of their own"),
    "a fast run": ("--trainer.fast_dev_run=true", "--trainer.max_steps 1 instead"),
    "a seed that is to be drawn": ("--seed_everything=true", "give a number"),
    "another encoding": ("--config={folder}/latin.yaml", "byte 0xfc at 14 is no utf-8"),
    "negative learning rate": ("--model.learning_rate=-1", "learning_rate must be ≥ 0"),
}


@pytest.fixture
def broken_folder(tmp_path: Path, llama_folder: Path) -> Path:
    """The files that `BAD_INPUT` names."""
    rows = make_rows(4)
    (tmp_path / "empty.jsonl").write_text("")
    write_rows(tmp_path / "unknown.jsonl", [{k: v for k, v in row.items() if k != "empty_chosen"} for row in rows])
    write_rows(tmp_path / "null.jsonl", [rows[0], {**rows[1], "rejected": None}])
    write_rows(tmp_path / "number.jsonl", [{**row, "chosen": 7} for row in rows])
    write_rows(tmp_path / "same.jsonl", [*rows[:2], {**rows[2], "rejected": rows[2]["chosen"]}])
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": ')
    datasets.Dataset.from_list(rows).select([]).to_parquet(tmp_path / "none.parquet")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text((llama_folder / "config.json").read_text())
    (tmp_path / "latin.yaml").write_bytes("threads: 1 # für".encode("latin-1"))
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    return tmp_path


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_that_says_what_to_do(
    case: str, llama_folder: Path, pairs_file: Path, broken_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option, expected = BAD_INPUT[case]
    options = {
        "--model.policy": str(llama_folder),
        "--data.train": str(pairs_file),
        "--trainer.accelerator": "cpu",
        "--trainer.default_root_dir": str(broken_folder / "runs"),
    }
    key, value = option.format(folder=broken_folder).split("=", 1)
    code = fit.main([f"{key}={value}" for key, value in {**options, key: value}.items()])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(error) == 1
    assert expected in error[0]
    assert not list(broken_folder.glob("runs/version_*/metrics.csv"))


def test_going_on_without_run_folders_is_refused(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main([f"--model.policy={llama_folder}", "--trainer.logger=false", "--ckpt_path=last"]) == 2
    assert "and --trainer.logger false makes none" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(
    fit_llama: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit_llama("--trainer.max_steps=1")
    options = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=2"]
    assert fit.main([f"--ckpt_path={run / 'checkpoints/last.ckpt'}", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the checkpoint is of") and "--model.policy" in error


@pytest.mark.parametrize(
    ("option", "package"),
    [
        (f"--config={ALPACA.parent / 'scale' / 'wandb.yaml'}", "wandb"),
        ("--trainer.accelerator=tpu", "torch_xla"),
    ],
)
def test_a_package_that_is_not_installed_is_named(
    option: str, package: str, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    assert fit.main([f"--model.policy={llama_folder}", f"--trainer.default_root_dir={tmp_path}", option]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: an option needs a package that is not installed: Requirement '{package}")
    assert "pip install" in error


def test_a_score_that_is_not_logged_ends_the_fit_with_one_line(
    llama_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "model.policy": llama_folder,
        "data.train": pairs_file,
        "data.validation": pairs_file,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": tmp_path,
        "trainer.callbacks": "lightning.pytorch.callbacks.EarlyStopping",
        "trainer.callbacks.monitor": "val_loss",
    }
    assert fit.main([f"--{key}={value}" for key, value in options.items()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: Early stopping conditioned on metric `val_loss` which is not available")
    assert "validation/loss/mixed" in error


def test_a_stdout_that_is_not_utf_8_takes_the_report(fit_llama: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    run = fit_llama("--trainer.max_steps=1")
    shown = written.getvalue().decode("ascii")
    assert "? in use" in shown and f"run folder   {run}" in shown


def test_the_command_itself_ends_without_a_traceback(tmp_path: Path) -> None:
    for options in (["--model.no_such_option", "1"], ["--model.beta", "-1"], ["--config", "none.yaml"]):
        done = subprocess.run(
            [sys.executable, "-m", "bvpo.fit", *options], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr and "error: " in done.stderr
        assert len(done.stderr.splitlines()) <= 4
