"""Several processes give what one gives: DDP and FSDP2 on two CPU processes beside one, on the same batches."""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from bvpo.batches import SequenceBatch
from bvpo.errors import UserError
from bvpo.export import read_trained, trained_model
from bvpo.policy import completion_logps
from bvpo.runs import lock_run
from bvpo.sharded_checkpoints import read_common, read_whole
from tests.conftest import make_rows, write_rows
from tests.rank_program import ALONE, EIGHT_BITS, FAULTS, ONE_RANK, TWO_RANKS, flip

Found = dict[str, Any]


def launch(folder: Path, ranks: int, names: list[str], timeout: float = 400) -> str:
    """Run fits in so many processes, as torchrun starts them; their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    if ranks > 1:
        shared["TORCHELASTIC_RUN_ID"] = "test"
    command = [sys.executable, "-m", "tests.rank_program", str(folder), *names]
    processes = [
        subprocess.Popen(
            command,
            env=shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-1500:] for output in outputs)
    return "\n".join(outputs)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Models and rows."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "llama").symlink_to(llama_folder)
    config = AutoConfig.from_pretrained(llama_folder)
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "tied")
    tokenizer.save_pretrained(folder / "tied")
    config.hidden_size, config.head_dim = 128, 32  # moments of 4,096 numbers and more take 8 bits
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "wide")
    tokenizer.save_pretrained(folder / "wide")
    rows = make_rows(40)
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "uneven.jsonl", rows[:17])  # two optimizer batches of eight, and one of a single row
    one_sided = [
        {key: value for key, value in row.items() if index % 3 or not key.startswith("empty_")}
        if index % 2
        else {key: value for key, value in row.items() if index % 3 or key not in ("prompt", "chosen", "rejected")}
        for index, row in enumerate(rows)
    ]
    write_rows(folder / "one_sided.jsonl", one_sided)
    drawn = [
        {**row, "anchor_traces": [{"trace": f" w{k} w{k + 1} ", "logprob": -4.0 - 0.1 * k} for k in range(4)]}
        for row in rows
    ]
    write_rows(folder / "anchors.jsonl", drawn)
    return folder


@pytest.fixture(scope="module")
def folder(parts: Path) -> Path:
    """The same with what all fits came to, of one process and of two."""
    folder = parts
    launch(folder, 1, list(ONE_RANK))
    launch(folder, 2, [*TWO_RANKS, *FAULTS])
    launch(folder, 1, list(ALONE))
    return folder


def read(folder: Path, name: str) -> Found:
    return torch.load(folder / f"{name}.pt", weights_only=False)  # type: ignore[no-any-return]


def distance(a: Found, b: Found) -> float:
    """‖Δ‖/‖·‖ of the final weights."""
    joined = [torch.cat([value.flatten().double() for value in found["weights"].values()]) for found in (a, b)]
    return float((joined[0] - joined[1]).norm() / joined[0].norm())


def agree(a: Found, b: Found, keys: list[str], tolerance: float) -> None:
    assert len(a["metrics"]) == len(b["metrics"])
    for key in keys:
        for step, (one, other) in enumerate(zip(a["metrics"], b["metrics"], strict=True)):
            assert (key in one) == (key in other), (key, step)
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), (key, step)


LOSSES = [
    "loss/trace",
    "loss/empty",
    "loss/mixed",
    "gradient/mixed_norm",
    "logp/trace_chosen_sum",
    "logp/empty_chosen_sum",
]
STATISTICS = ["gradient/trace_norm", "gradient/cosine", "variance/trace", "variance/empty", "variance/covariance"]
ESTIMATE = ["mixing/alpha_estimate", "mixing/alpha_standard_error"]
ON_BOTH = ["2x2", "1x4", "parts", "cached", "bucketed"]
WITH_ONE_RANK = [
    *((f"{strategy}, {split}", "8") for strategy in ("ddp", "fsdp2") for split in ON_BOTH),
    *((f"{strategy}, {kind}", kind) for strategy in ("ddp", "fsdp2") for kind in ("uneven", "one-sided", "lora")),
    *(
        (name, "8")
        for name in ("4x2", "1x8", "parts", "fsdp2, 4", "fsdp2, offloaded", "fsdp2, checkpointing", "fsdp2, padded")
    ),
    ("fsdp2, tied", "tied"),
]


@pytest.mark.parametrize(("split", "whole"), WITH_ONE_RANK)
def test_every_split_of_an_optimizer_batch_gives_the_same(folder: Path, split: str, whole: str) -> None:
    """Losses, mixed gradient and weights after five steps; fp32 sums in another order."""
    a, b = read(folder, whole), read(folder, split)
    agree(a, b, LOSSES, 1e-5)
    assert distance(a, b) <= 1e-5


@pytest.mark.parametrize(
    ("split", "units"),
    [
        ("ddp, 2x2", "units of 2"),  # each rank's microbatches of two rows
        ("ddp, 1x4", "1x8"),
        ("fsdp2, 2x2", "4x2"),  # two rows of either rank are a unit of four
        ("fsdp2, 1x4", "units of 2"),
        ("ddp, uneven", "uneven"),
        ("ddp, one-sided", "one-sided"),
        ("parts", "8"),  # a token budget cuts a unit's rows by length: the unit, α̂ and its interval remain
        ("fsdp2, parts", "8"),
        ("fsdp2, padded", "8"),
        ("fsdp2, tied", "tied"),
        ("fsdp2, lora", "lora"),
        ("ddp, marginal of 2", "marginal"),
        ("fsdp2, marginal", "marginal, wide"),
    ],
)
def test_the_same_units_give_the_same_statistics(folder: Path, split: str, units: str) -> None:
    a, b = read(folder, units), read(folder, split)
    agree(a, b, STATISTICS, 1e-4)
    agree(a, b, ESTIMATE, 1e-4)
    if "marginal" in units:
        keys = ["anchor/effective_size", "anchor/half_difference", "anchor/refused"]
        agree(a, b, keys, 1e-4)
        assert any("anchor/effective_size" in metrics for metrics in a["metrics"])


def test_validation_averages_over_all_ranks_rows(folder: Path) -> None:
    whole = read(folder, "uneven")["validation"]
    assert whole["validation/loss/trace"] > 0
    for name in ("ddp, uneven", "fsdp2, uneven"):
        assert read(folder, name)["validation"] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in TWO_RANKS if "lora" not in name and "from 5" not in name])
def test_ranks_see_disjoint_rows_and_log_the_same(folder: Path, name: str) -> None:
    (one, _, metrics), (other, _, theirs) = read(folder, name)["seen"]
    assert len(one) == len(other) and one != other
    first_epoch = [key for prompts in (*one[:2], *other[:2]) for key in prompts]
    assert len(set(first_epoch)) == len(first_epoch)
    timeless = [[{k: v for k, v in m.items() if k != "tokens_per_second"} for m in own] for own in (metrics, theirs)]
    assert str(timeless[0]) == str(timeless[1])  # NaN is not NaN


def test_a_sharded_rank_holds_its_share_of_everything(folder: Path) -> None:
    whole = read(folder, "ddp, 2x2")["seen"][0][1]
    for _, held, _ in read(folder, "fsdp2, 2x2")["seen"]:
        for kind in ("parameters", "gradients", "optimizer", "reference"):
            assert held[kind] == pytest.approx(whole[kind] / 2, rel=0.02), kind
        assert held["reference gradients"] == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_nan_on_one_rank_skips_the_step_on_all(folder: Path, strategy: str) -> None:
    for _, _, metrics in read(folder, f"{strategy}, broken")["seen"]:
        assert [m["skipped"] for m in metrics][-1] == 1
        assert metrics[-1]["step"] == 5 and metrics[-1]["loss/mixed"] < 0.7


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(folder: Path, strategy: str) -> None:
    whole, part = read(folder, f"{strategy}, optimal"), read(folder, f"{strategy}, optimal from 5")
    assert [m["step"] for m in part["metrics"]] == [6, 7, 8]
    whole["metrics"] = whole["metrics"][5:]
    agree(whole, part, [*LOSSES, *STATISTICS, *ESTIMATE, "mixing/alpha", "learning_rate"], 1e-6)
    assert len({m["mixing/alpha"] for m in part["metrics"]}) == 3
    assert distance(whole, part) <= 1e-7


@pytest.mark.slow
def test_moments_of_8_bits_are_sharded_and_resumed(parts: Path) -> None:
    """Slow because torchao compiles its steps."""
    folder = parts
    launch(folder, 2, list(EIGHT_BITS))
    whole, part = read(folder, "8 bits"), read(folder, "8 bits from 2")
    whole["metrics"] = whole["metrics"][2:]
    agree(whole, part, LOSSES, 1e-6)
    place = read_common(folder / "8 bits to 2 checkpoints" / "last.ckpt")["optimizer_states"][0]["state"]
    assert any("parts" in moment for own in place.values() for moment in own.values() if isinstance(moment, dict))


def test_bf16_mixed_is_the_same_to_its_rounding(folder: Path) -> None:
    """At the first step: AdamW makes of it little more than the gradient's signs, which rounding turns."""
    one, sharded = (read(folder, name)["metrics"][0] for name in ("bf16-mixed", "fsdp2, bf16-mixed"))
    assert sharded["loss/mixed"] == pytest.approx(0.6931472, abs=1e-6)
    for key in ("logp/trace_chosen_sum", "gradient/trace_norm", "gradient/empty_norm", "gradient/mixed_norm"):
        assert sharded[key] == pytest.approx(one[key], rel=2e-2), key


def test_adapters_keep_fp32_in_bf16(folder: Path) -> None:
    for name in ("lora bf16", "fsdp2, lora bf16"):
        weights = read(folder, name)["weights"]
        assert {value.dtype for key, value in weights.items() if "lora_" in key} == {torch.float32}
        assert {value.dtype for key, value in weights.items() if "lora_" not in key} == {torch.bfloat16}
    one, sharded = (read(folder, name)["metrics"][0] for name in ("lora bf16", "fsdp2, lora bf16"))
    assert sharded["gradient/mixed_norm"] == pytest.approx(one["gradient/mixed_norm"], rel=2e-2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fsdp2, from broken", "rank_00001.safetensors is not what was written"),
        ("fsdp2, full disk", "No space left on device; last.ckpt is the last good one and is still there"),
        ("fsdp2, lora from base", "tensors differ"),
        ("fsdp2, another cut", "batch_size 2 → 1, accumulate 2 → 4"),
        ("ddp, apart", "the processes found different checkpoints to go on from"),
        ("one rank from two", "was written by 2 processes, this run has 1"),
    ],
)
def test_a_fault_of_one_rank_ends_all_with_a_message(folder: Path, name: str, expected: str) -> None:
    for error in read(folder, name)["errors"]:
        assert expected in error
    if "full" in name:
        assert read_common(folder / f"{name} checkpoints" / "last.ckpt")["global_step"] == 2


def test_a_sharded_checkpoint_becomes_a_hugging_face_model(folder: Path, tmp_path: Path) -> None:
    """Whole again, and with the log-probabilities that the run's own weights give."""
    trained = read_trained(folder / "fsdp2, optimal to 5 checkpoints" / "last.ckpt")
    model = trained_model(trained, None)
    assert trained.step == 5
    one = read_whole(folder / "ddp, optimal to 5 checkpoints" / "last.ckpt")["state_dict"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, one[f"policy.{name}"], rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = SequenceBatch(torch.arange(4, 24).view(2, 10), torch.tensor([3, 4]), torch.tensor([10, 8]), 1)
    assert torch.equal(completion_logps(model, batch), completion_logps(again, batch))


def test_sharded_adapters_become_one_model(folder: Path) -> None:
    """Merged into the base: the log-probabilities are those of the adapters that every rank held whole."""
    batch = SequenceBatch(torch.arange(4, 24).view(2, 10), torch.tensor([3, 4]), torch.tensor([10, 8]), 1)
    merged = []
    for strategy in ("ddp", "fsdp2"):
        model = trained_model(read_trained(folder / f"{strategy}, lora checkpoints" / "last.ckpt"), None)
        assert not any("lora_" in name for name in model.state_dict())
        merged.append(completion_logps(model, batch))
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    torch.testing.assert_close(*merged, rtol=1e-5, atol=1e-5)
    assert (merged[0] - completion_logps(base, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("fault", ["missing", "cut", "flipped", "no manifest", "strange manifest"])
def test_a_broken_sharded_checkpoint_is_refused(folder: Path, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "last.ckpt"
    shutil.copytree(folder / "fsdp2, optimal to 5 checkpoints" / "last.ckpt", path)
    slices = path / "rank_00001.safetensors"
    if fault == "missing":
        slices.unlink()
    elif fault == "cut":
        slices.write_bytes(slices.read_bytes()[:-10])
    elif fault == "flipped":
        flip(slices)
    elif fault == "no manifest":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text('["a"]')
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_whole(path)


def test_nothing_but_tensors_and_plain_values_is_read(folder: Path) -> None:
    path = folder / "fsdp2, optimal to 5 checkpoints" / "last.ckpt"
    assert sorted(p.suffix for p in path.iterdir()) == [".ckpt", ".json", ".safetensors", ".safetensors"]
    torch.load(path / "common.ckpt", weights_only=True)


# ---------------------------------------------------------------------- the command, with real kills


def command(folder: Path, root: Path, strategy: str, *options: str) -> list[str]:
    given = {
        "--model.policy": folder / "llama",
        "--data.train": folder / "rows.jsonl",
        "--data.batch_size": 2,
        "--model.mixing": "{class_path: bvpo.mixing.Optimal, init_args: {warmup_steps: 2}}",
        "--model.learning_rate": 1e-3,
        "--checkpoint.every_n_train_steps": 2,
        "--trainer.strategy": strategy,
        "--trainer.devices": 2,
        "--trainer.accelerator": "cpu",
        "--trainer.max_steps": 30,
        "--trainer.enable_progress_bar": "false",
        "--trainer.default_root_dir": root,
    }
    return [sys.executable, "-m", "bvpo.fit", *(f"{key}={value}" for key, value in given.items()), *options]


def start(folder: Path, root: Path, strategy: str, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    return subprocess.Popen(
        command(folder, root, strategy, *options),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(run: Path, step: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        table = run / "metrics.csv"
        if table.exists() and table.read_text().count("\n") > step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {run}")


def curves(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v and k != "tokens_per_second"} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_run_goes_on_as_the_uninterrupted_one(parts: Path, tmp_path: Path, strategy: str) -> None:
    """Kill -9 of all processes at random moments, then SIGTERM to the first one alone; the α curve is the same."""
    done = start(parts, tmp_path / "whole", strategy)
    assert done.wait(300) == 0, done.stdout
    rng, run = random.Random(0), tmp_path / "killed" / "version_0"
    for least in (1, 9, 15):
        process = start(parts, tmp_path / "killed", strategy, "--ckpt_path=last")
        wait_for_step(run, least)
        time.sleep(rng.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    process = start(parts, tmp_path / "killed", strategy, "--ckpt_path=last")
    wait_for_step(run, 18)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143 and "stopped by SIGTERM behind optimizer step" in output
    other = start(parts, tmp_path / "killed", strategy, "--ckpt_path=last")
    assert other.wait(300) == 0
    whole, killed = curves(tmp_path / "whole" / "version_0"), curves(run)
    assert [row["step"] for row in killed] == list(range(30))
    for one, two in zip(whole, killed, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), (key, one["step"])


@pytest.mark.slow
def test_the_death_of_one_process_ends_the_other(parts: Path, tmp_path: Path) -> None:
    process = start(parts, tmp_path, "fsdp2", "--trainer.max_steps=3000")
    wait_for_step(tmp_path / "version_0", 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if "LOCAL_RANK" in Path(f"/proc/{child}/environ").read_text(errors="replace"):
            os.kill(int(child), signal.SIGKILL)
    assert process.wait(120) != 0


def test_a_second_process_in_a_runs_folder_is_refused(tmp_path: Path) -> None:
    first = lock_run(tmp_path)
    with pytest.raises(UserError, match=f"another process is training in this folder .process {os.getpid()} on"):
        lock_run(tmp_path)
    first.close()
    lock_run(tmp_path).close()
