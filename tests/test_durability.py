"""What a kill, a signal, a full disk and broken storage do to a fit: nothing that `--ckpt_path last` does not mend."""

from __future__ import annotations

import csv
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bvpo import checkpoints, fit
from bvpo.checkpoints import AtomicCheckpointIO, read_checkpoint
from bvpo.data import Microbatches
from bvpo.errors import UserError
from bvpo.module import BVPO
from bvpo.run_log import MetricsLogger
from bvpo.runs import changed_options, lock_run
from bvpo.stopping import PARENT, Stopped, die_with_parent, outside_cause, own_processes

STEPS = 13  # of 4 rows in 2 microbatches; 8 an epoch, so that validation comes in the middle
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def command(llama_folder: Path, pairs_file: Path) -> Command:
    """The arguments of a fit under a root; α̂ is in use, so that the window's state matters."""

    def arguments(root: Path, *options: str) -> list[str]:
        given = {
            "model.policy": llama_folder,
            "model.mixing": "bvpo.mixing.Optimal",
            "model.accumulate": 2,
            "model.learning_rate": 1e-2,
            "data.train": pairs_file,
            "data.validation": pairs_file,
            "data.batch_size": 2,
            "trainer.default_root_dir": root,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": "false",
            "trainer.max_steps": STEPS,
            "checkpoint.every_n_train_steps": 4,
        }
        return [*(f"--{key}={value}" for key, value in given.items()), *options]

    return arguments


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run's folder."""
    root = tmp_path_factory.mktemp("whole")
    assert fit.main(command(root)) == 0
    return root / "version_0"


def in_child(work: Callable[[], int]) -> int:
    """The exit code of `work` in a forked process, or the number of its signal, negative: nothing is loaded anew."""
    child = os.fork()
    if not child:
        code = 99
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def table(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv, wall-clock columns apart."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def curve(run: Path, key: str) -> list[tuple[int, float]]:
    """Steps and values of TensorBoard's events."""
    files = sorted(run.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)
    for number, path in enumerate(files):  # TensorBoard goes by their names: by the second, then by the process
        path.rename(path.with_name(f"events.out.tfevents.{number:010}"))
    return [(event.step, event.value) for event in EventAccumulator(str(run)).Reload().Scalars(key)]


def assert_equal_runs(run: Path, whole: Path) -> None:
    """Weights, optimizer and statistics bit for bit; curves row by row, in metrics.csv and in the events."""
    assert table(run) == table(whole)
    states = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, whole)]
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert same(states[0][key], states[1][key]), key
    for key in ("loss/mixed", "validation/loss/trace"):
        assert curve(run, key) == curve(whole, key), key
    assert not list(run.rglob("*.partial"))


MOMENTS = ("microbatch", "checkpoint write", "rename", "fsync", "row", "epoch's validation")


def arm(moment: str, number: int, rng: random.Random) -> None:
    """Let this process die at the `number`-th such moment: in the middle of a write, before or behind a call."""
    left = number

    def strike(before: Callable[[], object], call: Callable[[], Any]) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            return call()
        before()
        die()

    def patched(owner: Any, name: str, half: Callable[..., object] | None = None) -> None:
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            whole_call = lambda: original(*args, **kwargs)  # noqa: E731
            before = (lambda: half(*args)) if half is not None else rng.choice((lambda: None, whole_call))
            return strike(before, whole_call)

        setattr(owner, name, replacement)

    def half_record(sink: Any, data: Any) -> None:
        view = memoryview(data).cast("B")
        sink._file.write(view[: rng.randrange(len(view) + 1)])

    def half_row(logger: MetricsLogger, line: bytes) -> None:
        with logger.path.open("ab", buffering=0) as file:
            file.write(line[: rng.randrange(len(line) + 1)])

    if moment == "microbatch":
        patched(BVPO, "training_step")
    elif moment == "checkpoint write":
        patched(checkpoints._Sink, "write", half_record)
    elif moment == "rename":
        patched(os, "replace")
    elif moment == "fsync":
        patched(os, "fsync")
    elif moment == "row":
        patched(MetricsLogger, "_append", half_row)
    else:
        patched(BVPO, "validation_step")


WITHIN = {  # of how many moments of a kind, from its start or resumption, a run is killed at one
    "microbatch": 10,
    "checkpoint write": 130,
    "rename": 6,
    "fsync": 8,
    "row": 5,
    "epoch's validation": 16,
}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 7))])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(
    command: Command, whole: Path, tmp_path: Path, seed: int
) -> None:
    """SIGKILL three times in a row, then to the end: 3 kills a seed, at every kind of moment."""
    rng, kills = random.Random(seed), 0
    while kills < 3:
        moment = MOMENTS[(seed + kills) % len(MOMENTS)]
        number = rng.randrange(WITHIN[moment])

        def work(moment: str = moment, number: int = number) -> int:
            arm(moment, number, rng)
            return fit.main(command(tmp_path, "--ckpt_path=last"))

        code = in_child(work)
        assert code in (0, -signal.SIGKILL), moment
        if code == 0:  # came to its end before that many such moments
            break
        kills += 1
    assert kills == 3
    assert fit.main(command(tmp_path, "--ckpt_path=last")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]
    assert_equal_runs(tmp_path / "version_0", whole)


def test_a_run_killed_behind_its_last_step_makes_up_for_what_follows(
    command: Command, whole: Path, tmp_path: Path
) -> None:
    """The last step's checkpoint comes before its measurements: without them the run is not finished."""

    def work() -> int:
        patch = pytest.MonkeyPatch()
        patch.setattr(checkpoints.StepCheckpoint, "on_train_end", lambda *_: die())
        return fit.main(command(tmp_path, "--ckpt_path=last"))

    folder = tmp_path / "version_0" / "checkpoints"
    for _ in range(2):
        assert in_child(work) == -signal.SIGKILL
        steps = [read_checkpoint(folder / name)["global_step"] for name in ("previous.ckpt", "last.ckpt")]
        assert steps == [STEPS - 1, STEPS]
    assert fit.main(command(tmp_path, "--ckpt_path=last")) == 0
    assert_equal_runs(tmp_path / "version_0", whole)


# ---------------------------------------------------------------------- --ckpt_path last


def test_last_without_a_run_and_with_a_finished_one(
    command: Command, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit.main(command(tmp_path, "--ckpt_path=last")) == 0
    assert "there is no run under" in capsys.readouterr().out
    run = tmp_path / "version_0"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert fit.main(command(tmp_path, "--ckpt_path=last")) == 0
    assert f"finished, {STEPS} optimizer steps" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert_equal_runs(run, whole)


def test_changed_options_are_listed_and_more_steps_go_on(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit.main(command(tmp_path, "--trainer.max_steps=2")) == 0
    capsys.readouterr()
    options = ["--trainer.max_steps=3", "--model.loss.beta=0.2", "--ckpt_path=last"]
    assert fit.main(command(tmp_path, *options)) == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("options that changed since this run was started:")
    assert "goes on behind optimizer step 2 (last.ckpt)" in lines[place - 1]
    assert lines[place + 1 : place + 3] == ["  trainer.max_steps: 2 → 3", "  model.loss.init_args.beta: 0.1 → 0.2"]
    assert not lines[place + 3].startswith("  ") or "→" not in lines[place + 3]
    assert [row["step"] for row in table(tmp_path / "version_0")] == ["0", "1", "2"]
    assert changed_options(tmp_path / "none.yaml", "a: 1") == []


# ---------------------------------------------------------------------- broken files, full disks


def test_a_truncated_or_altered_checkpoint_is_never_loaded(whole: Path, tmp_path: Path) -> None:
    """200 flipped bits: each is found, or lies where it changes nothing (padding, dates)."""
    data, rng, path, found = (whole / "checkpoints/last.ckpt").read_bytes(), random.Random(0), tmp_path / "last.ckpt", 0
    content = read_checkpoint(whole / "checkpoints/last.ckpt")
    for _ in range(200):
        flipped, place = bytearray(data), rng.randrange(len(data))
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(read_checkpoint(path), content), place
        except UserError as error:
            assert str(path) in str(error) and "Give another one" in str(error)
            found += 1
    assert found > 100
    for size in (0, 1, 100, *(rng.randrange(len(data)) for _ in range(20)), len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"last\.ckpt: cannot be read"):
            read_checkpoint(path)


def test_the_code_in_a_strangers_file_is_not_run(tmp_path: Path) -> None:
    class Stranger:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    for content in ({"state_dict": {}, "global_step": Stranger()}, [1], {"a": torch.zeros(1)}):
        torch.save(content, tmp_path / "stranger.ckpt")
        with pytest.raises(UserError, match="cannot be read"):
            read_checkpoint(tmp_path / "stranger.ckpt")
    torch.save({"state_dict": {}, "global_step": 1}, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match="weights alone"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match="folder of a sharded run"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_broken_last_checkpoint_leaves_the_one_before(
    command: Command, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "version_0")
    folder = tmp_path / "version_0" / "checkpoints"
    data = bytearray((folder / "last.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "last.ckpt").write_bytes(data)
    assert fit.main(command(tmp_path, "--ckpt_path=last")) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"--ckpt_path {folder / 'previous.ckpt'}" in error
    assert fit.main(command(tmp_path, f"--ckpt_path={folder / 'previous.ckpt'}")) == 0
    states = [read_checkpoint(run / "checkpoints/last.ckpt") for run in (whole, tmp_path / "version_1")]
    assert same(states[0]["state_dict"], states[1]["state_dict"])


def limit_file_size(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_said_and_the_last_good_checkpoint_remains(
    command: Command, whole: Path, tmp_path: Path
) -> None:
    """In a child no file may grow beyond 100 kB: a checkpoint is larger."""
    run = tmp_path / "version_0"

    def work() -> int:
        patch, take = pytest.MonkeyPatch(), BVPO.training_step

        def step(module: BVPO, batch: Any, batch_idx: int) -> None:
            if module.global_step == 5:
                limit_file_size(100_000)
            take(module, batch, batch_idx)

        patch.setattr(BVPO, "training_step", step)
        with (tmp_path / "error.txt").open("w") as sys.stderr:
            return fit.main(command(tmp_path))

    assert in_child(work) == 2
    (error,) = [line for line in (tmp_path / "error.txt").read_text().splitlines() if line.startswith("error: ")]
    assert "last.ckpt: the checkpoint cannot be written: File too large. It needs about" in error
    assert "last.ckpt is the last good one" in error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert fit.main(command(tmp_path, "--ckpt_path=last")) == 0
    assert_equal_runs(run, whole)


def test_the_table_of_metrics_survives_a_full_disk_and_a_torn_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"

    def work() -> int:
        limit_file_size(300)
        log = MetricsLogger(path)
        try:
            for step in range(100):
                log.log_metrics({"loss": step / 3} | ({"late": 1.0} if step > 3 else {}), step)
        except UserError as error:
            return int("cannot be logged: File too large" in str(error))
        return 0

    assert in_child(work) == 1
    data = path.read_bytes()
    assert data.startswith(b"late,loss,step\r\n") and data.endswith(b"\r\n") and 200 < len(data) <= 300
    path.write_bytes(data + b"1.0,0.3")
    rows = data.decode().splitlines()[1:]
    log = MetricsLogger(path, resumed_at=len(rows) - 1)
    assert path.read_bytes() == data[: -len(rows[-1]) - 2]
    log.log_metrics({"loss": torch.tensor(0.5)}, len(rows) - 1)  # type: ignore[dict-item]
    assert path.read_text().splitlines()[-1] == f",0.5,{len(rows) - 1}"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


# ---------------------------------------------------------------------- signals, dead processes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    command: Command, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """It comes in the first microbatch of step 6, whose second one is still taken."""

    def work() -> int:
        patch, take, left = pytest.MonkeyPatch(), BVPO.training_step, 10

        def step(module: BVPO, batch: Any, batch_idx: int) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                os.kill(os.getpid(), number)
            take(module, batch, batch_idx)

        patch.setattr(BVPO, "training_step", step)
        with (tmp_path / "error.txt").open("w") as sys.stderr:
            return fit.main(command(tmp_path))

    assert in_child(work) == 128 + number
    error = (tmp_path / "error.txt").read_text()
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"stopped by {name} behind optimizer step 6, with a checkpoint" in error and "Traceback" not in error
    assert read_checkpoint(tmp_path / "version_0/checkpoints/last.ckpt")["global_step"] == 6
    assert fit.main(command(tmp_path, "--ckpt_path=last")) == 0
    assert_equal_runs(tmp_path / "version_0", whole)


@pytest.mark.parametrize("moment", ["on_fit_start", "validation_step"])
def test_a_signal_outside_of_steps_stops_at_once(command: Command, whole: Path, tmp_path: Path, moment: str) -> None:
    def work() -> int:
        take = getattr(BVPO, moment)

        def struck(*args: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            take(*args)

        pytest.MonkeyPatch().setattr(BVPO, moment, struck)
        with (tmp_path / "error.txt").open("w") as sys.stderr:
            return fit.main(command(tmp_path))

    assert in_child(work) == 143
    error = (tmp_path / "error.txt").read_text()
    assert "stopped by SIGTERM;" in error and "Traceback" not in error
    assert fit.main(command(tmp_path, "--ckpt_path=last")) == 0
    assert_equal_runs(tmp_path / "version_0", whole)


def test_a_process_that_prepares_batches_may_die(command: Command, whole: Path, tmp_path: Path) -> None:
    """The one that prepares batches dies at its 11th; the next start takes no such process, and ends the same."""

    def work() -> int:
        take, main, left = Microbatches.__getitem__, os.getpid(), 11

        def fetch(rows: Microbatches, index: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and os.getpid() != main:
                die()
            return take(rows, index)

        pytest.MonkeyPatch().setattr(Microbatches, "__getitem__", fetch)
        with (tmp_path / "error.txt").open("w") as sys.stderr:
            try:
                return fit.main(command(tmp_path, "--data.workers=1"))
            except BaseException:
                traceback.print_exc()
                raise

    code, error = in_child(work), (tmp_path / "error.txt").read_text()
    assert code == 2, error
    assert "error: a process that prepares rows has died" in error and "Traceback" not in error
    assert fit.main(command(tmp_path, "--ckpt_path=last")) == 0
    assert_equal_runs(tmp_path / "version_0", whole)


@pytest.mark.slow
def test_the_command_killed_at_ten_random_moments(command: Command, tmp_path: Path) -> None:
    """Real processes, each killed up to a second after it has begun to train, then one that comes to its end."""
    options = ["--trainer.max_steps=400", "--threads=1", "--ckpt_path=last"]
    rng, run = random.Random(0), tmp_path / "killed" / "version_0"
    for _ in range(10):
        before = read_time(run / "metrics.csv")
        process = subprocess.Popen(
            [sys.executable, "-m", "bvpo.fit", *command(run.parent, *options)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and read_time(run / "metrics.csv") == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert fit.main(command(run.parent, *options)) == 0
    assert fit.main(command(tmp_path / "whole", *options)) == 0
    assert_equal_runs(run, tmp_path / "whole" / "version_0")


def read_time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def test_a_batch_of_a_dead_process_is_no_traceback() -> None:
    """Its tensors come through a connection to the process that made them, which may be gone by then."""
    program = "def rebuild():\n    raise ConnectionRefusedError(111, 'Connection refused')"
    exec(program, own := {"__name__": "torch.multiprocessing.reductions"})
    with pytest.raises(ConnectionRefusedError) as caught:
        own["rebuild"]()
    assert "a process that prepares rows has died" in str(outside_cause(caught.value))
    assert outside_cause(ConnectionRefusedError(111, "Connection refused")) is None


# ---------------------------------------------------------------------- stops between microbatches, schedules


class AskToStop(L.Callback):
    """What a time limit does: asks to stop behind a microbatch (from 1), or in a validation, and does so once."""

    def __init__(self, microbatch: int = 0, validation: int = 0) -> None:
        self.microbatches, self.validations = microbatch, validation

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.microbatches -= 1
        trainer.should_stop |= self.microbatches == 0

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.validations -= 1
        trainer.should_stop |= self.validations == 0


LEFT_AT = {  # what asks to stop, and options; 16 microbatches of 2 an epoch, 4 a step: the steps that are then taken
    "in a step": ("microbatch=6", [], 2),
    "at a step's end": ("microbatch=8", [], 2),
    "in a validation inside a step": ("validation=1", ["--trainer.val_check_interval=6"], 2),
    "in a validation behind a step": ("validation=1", ["--trainer.val_check_interval=8"], 2),
    "in an epoch's validation": ("validation=1", [], 4),
}


@pytest.mark.parametrize(
    "moment", [m if " a step" in m and "behind" not in m else pytest.param(m, marks=pytest.mark.slow) for m in LEFT_AT]
)
def test_a_stop_that_is_asked_for_waits_for_the_steps_end(
    command: Command, tmp_path: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`max_time` and EarlyStopping set `should_stop` between microbatches: no row may be lost, no curve differ."""
    asks, options, steps = LEFT_AT[moment]
    options = [*options, "--model.accumulate=4", "--trainer.max_steps=7"]
    assert fit.main(command(tmp_path / "whole", *options)) == 0
    callback, _, value = asks.partition("=")
    stop = [f"--trainer.callbacks+={__name__}.AskToStop", f"--trainer.callbacks.{callback}={value}"]
    stop += ["--trainer.max_time=09:00:00:00"]  # what asks is beside the point; a limit that was met is finished
    assert fit.main(command(tmp_path / "stopped", *options, *stop)) == 0
    run = tmp_path / "stopped" / "version_0"
    state = read_checkpoint(run / "checkpoints/last.ckpt")
    (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state["global_step"] == steps and loader["epoch"] * 16 + loader["served"] == 4 * steps
    capsys.readouterr()
    assert fit.main(command(tmp_path / "stopped", *options, "--ckpt_path=last")) == 0
    assert f"goes on behind optimizer step {steps}" in capsys.readouterr().out
    assert_equal_runs(run, tmp_path / "whole" / "version_0")


def test_an_epoch_that_ends_in_a_step_is_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit.main(command(tmp_path, "--trainer.limit_train_batches=3")) == 2
    assert "behind microbatch 3, in the middle of an optimizer step of 2" in capsys.readouterr().err
    assert fit.main(command(tmp_path, "--trainer.limit_train_batches=4", "--trainer.max_steps=3")) == 0


def saves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Steps and names of the checkpoints that are written from here on."""
    seen: list[tuple[int, str]] = []
    save = AtomicCheckpointIO.save_checkpoint

    def watched(io: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Any, **options: Any) -> None:
        seen.append((checkpoint["global_step"], Path(path).name))
        save(io, checkpoint, path, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", watched)
    return seen


def test_checkpoints_by_epochs_and_by_time(
    command: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 steps an epoch; at an interval of no time, every step has its checkpoint."""
    seen = saves(monkeypatch)
    options = ["--checkpoint.every_n_train_steps=null", "--checkpoint.every_n_epochs=1"]
    assert fit.main(command(tmp_path / "epochs", *options)) == 0
    assert seen == [(8, "last.ckpt"), (STEPS, "last.ckpt")]
    assert_equal_runs(tmp_path / "epochs" / "version_0", whole)
    seen.clear()
    options = ["--checkpoint.every_n_train_steps=null", "--checkpoint.train_time_interval=00:00:00:00"]
    assert fit.main(command(tmp_path / "time", *options, "--trainer.max_steps=3", "--checkpoint.save_top_k=-1")) == 0
    assert sorted(seen) == [(s, n) for s in (1, 2, 3) for n in (f"epoch=0-step={s}.ckpt", "last.ckpt")]
    seen.clear()
    options = ["--checkpoint.every_n_train_steps=null", "--checkpoint.train_time_interval=01:00:00:00"]
    assert fit.main(command(tmp_path / "late", *options, "--trainer.max_steps=3")) == 0
    assert seen == [(3, "last.ckpt")]


def test_the_best_checkpoints_hold_what_they_are_named_and_scored_by(command: Command, tmp_path: Path) -> None:
    options = ["--checkpoint.monitor=validation/loss/trace", "--checkpoint.save_top_k=-1", "--trainer.max_steps=9"]
    options += ["--trainer.val_check_interval=4", "--model.schedule=constant"]
    assert fit.main(command(tmp_path / "whole", *options)) == 0
    run = tmp_path / "whole" / "version_0"
    scores = {int(row["step"]): row["validation/loss/trace"] for row in table(run) if row["validation/loss/trace"]}
    assert list(scores) == [2, 4, 6, 8]
    for step, score in scores.items():
        state = read_checkpoint(run / f"checkpoints/epoch=0-step={step}.ckpt")
        (own,) = [value for key, value in state["callbacks"].items() if "StepCheckpoint" in key]
        assert state["global_step"] == step and float(own["current_score"]) == pytest.approx(float(score), rel=1e-6)
    assert len(list((run / "checkpoints").iterdir())) == 4 + 2
    best = run / "checkpoints/epoch=0-step=4.ckpt"  # a run of its own goes on from it as from any other
    assert fit.main(command(tmp_path / "best", *options, f"--ckpt_path={best}")) == 0
    assert table(tmp_path / "best" / "version_0") == [row for row in table(run) if int(row["step"]) >= 4]


def test_a_monitor_without_scores_or_with_scores_inside_a_step_is_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint.monitor=validation/loss/trace", "--checkpoint.save_top_k=1"]
    assert fit.main(command(tmp_path, *options, "--trainer.val_check_interval=3")) == 2
    assert "validates in the middle of an optimizer step of 2 microbatches" in capsys.readouterr().err
    assert fit.main(command(tmp_path, *options, "--data.validation=null")) == 2
    assert "give --data.validation" in capsys.readouterr().err


# ---------------------------------------------------------------------- going on where there is little to go on from


def test_more_epochs_go_on(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.max_steps=-1", "--data.batch_size=8", "--model.schedule=constant"]  # 2 steps an epoch
    assert fit.main(command(tmp_path / "whole", *options, "--trainer.max_epochs=3")) == 0
    assert fit.main(command(tmp_path / "more", *options, "--trainer.max_epochs=1")) == 0
    capsys.readouterr()
    assert fit.main(command(tmp_path / "more", *options, "--trainer.max_epochs=3", "--ckpt_path=last")) == 0
    assert "goes on behind optimizer step 2 (last.ckpt)" in capsys.readouterr().out
    assert_equal_runs(tmp_path / "more" / "version_0", tmp_path / "whole" / "version_0")


def test_a_log_without_a_checkpoint_is_kept(
    command: Command, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "version_0")
    shutil.rmtree(tmp_path / "version_0" / "checkpoints")
    log = (tmp_path / "version_0" / "metrics.csv").read_bytes()
    assert fit.main(command(tmp_path, "--ckpt_path=last", "--trainer.max_steps=1")) == 0
    assert "it starts from the start; its log so far is kept in metrics_1.csv" in capsys.readouterr().out
    assert (tmp_path / "version_0" / "metrics_1.csv").read_bytes() == log
    assert [row["step"] for row in table(tmp_path / "version_0")] == ["0"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "a: [1"])
def test_torn_notes_in_a_runs_folder_count_as_absent(
    command: Command, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    shutil.copytree(whole, tmp_path / "version_0")
    for name in ("finished.json", "config.yaml"):
        (tmp_path / "version_0" / name).write_text(content)
    assert fit.main(command(tmp_path, "--ckpt_path=last")) == 0
    out = capsys.readouterr().out
    assert f"goes on behind optimizer step {STEPS - 1} (previous.ckpt); finished.json in it cannot be read" in out
    assert not content or f"not known: {tmp_path / 'version_0' / 'config.yaml'} cannot be read" in out
    assert table(tmp_path / "version_0") == table(whole)


def test_the_saved_config_is_whole_or_not_there(command: Command, tmp_path: Path) -> None:
    """No file may grow beyond 1 kB in the child: the config is longer, and its start is no config."""

    def work() -> int:
        write = checkpoints.write_whole

        def limited(file: Any, data: Any) -> None:
            if "config" in file.name:
                limit_file_size(1000)
            write(file, data)

        pytest.MonkeyPatch().setattr("bvpo.runs.write_whole", limited)
        with (tmp_path / "error.txt").open("w") as sys.stderr:
            return fit.main(command(tmp_path))

    assert in_child(work) == 2
    assert not list((tmp_path / "version_0").glob("config*"))


def test_a_file_that_is_written_anew_is_not_cut_by_a_full_disk(tmp_path: Path) -> None:
    """The disk takes a part of a write before it takes nothing: 200 of 250 bytes would be a table, too."""
    log = MetricsLogger(tmp_path / "metrics.csv")
    for step in range(10):
        log.log_metrics({"loss": step / 8}, step)
    before = log.path.read_bytes()

    def work() -> int:
        limit_file_size(len(before) - 10)
        try:
            log.log_metrics({"loss": 1.0, "late": 1.0}, 10)
        except UserError:
            return 0
        return 1

    assert in_child(work) == 0
    assert log.path.read_bytes() == before


def test_a_lock_is_not_inherited(tmp_path: Path) -> None:
    """Processes that prepare batches are forked; they outlive a killed fit by seconds."""
    lock, (begun, begin) = lock_run(tmp_path), os.pipe()
    child = os.fork()
    if not child:
        os.write(begin, b".")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(begun, 1)
        lock.close()  # as a kill would: only this process's share goes
        lock_run(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_signal_without_checkpoints_says_so(command: Command, tmp_path: Path) -> None:
    def work() -> int:
        take = BVPO.training_step

        def step(module: BVPO, batch: Any, batch_idx: int) -> None:
            if module.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            take(module, batch, batch_idx)

        pytest.MonkeyPatch().setattr(BVPO, "training_step", step)
        with (tmp_path / "error.txt").open("w") as sys.stderr:
            return fit.main(command(tmp_path, "--checkpoint.save_last=false", "--model.accumulate=1"))

    assert in_child(work) == 143
    error = (tmp_path / "error.txt").read_text()
    assert "stopped by SIGTERM behind optimizer step 3, without a checkpoint; --checkpoint.save_last is false" in error
    assert not list(tmp_path.rglob("*.ckpt"))


# ---------------------------------------------------------------------- the end, and what comes behind it


class Measure(L.Callback):
    """What is measured behind a fit's end: a row of its own; in it, the process may get a signal.

    Args:
        number: Of the signal; 0: none.
    """

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.number:
            os.kill(os.getpid(), self.number)
            time.sleep(0.1)
        for logger in trainer.loggers:
            logger.log_metrics({"measured": 1.0}, trainer.global_step)


def measured(number: int = 0) -> list[str]:
    return [f"--trainer.callbacks+={__name__}.Measure", f"--trainer.callbacks.number={number}"]


def measurements(run: Path) -> list[str]:
    """Steps that have one."""
    path = run / "metrics.csv"
    return [row["step"] for row in table(run) if row.get("measured")] if path.exists() else []


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_measurements_behind_a_stop_that_was_asked_for_are_made_up_for(
    command: Command, tmp_path: Path, number: signal.Signals
) -> None:
    """`max_time` and EarlyStopping end a fit as its last step does: here in step 3."""
    stop = [f"--trainer.callbacks+={__name__}.AskToStop", "--trainer.callbacks.microbatch=5"]
    options = [*stop, "--checkpoint.every_n_train_steps=1", "--data.validation=null"]
    run = tmp_path / "version_0"
    code = in_child(lambda: fit.main(command(tmp_path, *options, *measured(number))))
    assert code == (143 if number == signal.SIGTERM else -number)
    assert not measurements(run) and not (run / "finished.json").exists()
    steps = [read_checkpoint(run / f"checkpoints/{name}.ckpt")["global_step"] for name in ("previous", "last")]
    assert steps == [2, 3]
    options = [option.replace("microbatch=5", "microbatch=1") for option in options]  # of what is left
    assert fit.main(command(tmp_path, *options, *measured(), "--ckpt_path=last")) == 0
    assert measurements(run) == ["3"] and (run / "finished.json").exists()
    assert [row["step"] for row in table(run)] == ["0", "1", "2", "3"]


def test_fewer_steps_than_were_asked_for_end_in_measurements(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left behind step 3 of 13: `max_steps` 3 makes this the end, and 2 is less than there is."""
    options = ["--checkpoint.every_n_train_steps=1", "--data.validation=null"]

    def work() -> int:
        take = BVPO.training_step

        def step(module: BVPO, batch: Any, batch_idx: int) -> None:
            if module.global_step == 3:
                die()
            take(module, batch, batch_idx)

        pytest.MonkeyPatch().setattr(BVPO, "training_step", step)
        return fit.main(command(tmp_path, *options))

    run = tmp_path / "version_0"
    assert in_child(work) == -signal.SIGKILL
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert fit.main(command(tmp_path, *options, "--trainer.max_steps=2", "--ckpt_path=last")) == 0
    assert "has taken 3 optimizer steps, and max_steps is 2: nothing is done" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert fit.main(command(tmp_path, *options, "--trainer.max_steps=3", "--ckpt_path=last", *measured())) == 0
    assert "goes on behind optimizer step 2 (previous.ckpt)" in capsys.readouterr().out
    assert measurements(run) == ["3"] and (run / "finished.json").exists()


def test_a_start_that_takes_no_step_is_refused_and_not_finished(
    command: Command, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = whole / "checkpoints" / "last.ckpt"
    assert fit.main(command(tmp_path, f"--ckpt_path={last}")) == 2
    assert f"has taken {STEPS} optimizer steps: raise max_steps, now {STEPS}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    epochs = ["--trainer.max_steps=-1", "--trainer.max_epochs=1"]  # of 8 steps
    assert fit.main(command(tmp_path, *epochs, f"--ckpt_path={last}")) == 2
    assert f"no optimizer step was taken: the {STEPS} that are behind this start" in capsys.readouterr().err
    assert not list(tmp_path.rglob("finished.json"))
    assert fit.main(command(tmp_path, "--ckpt_path=" + "x" * 300)) == 2
    assert "there is no such checkpoint" in capsys.readouterr().err


def test_a_run_that_has_gone_on_meanwhile_is_left_alone(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two starts find step 1; while one reads its rows, the other trains to step 2 and ends: its rows stay."""
    given = ["--data.validation=null", "--ckpt_path=last"]
    assert fit.main(command(tmp_path, *given, "--trainer.max_steps=1")) == 0
    late, check = command(tmp_path, *given, "--trainer.max_steps=3"), fit.quick_checks

    def slow(data: Any) -> Any:
        monkeypatch.setattr(fit, "quick_checks", check)
        assert fit.main(command(tmp_path, *given, "--trainer.max_steps=2")) == 0
        return check(data)

    monkeypatch.setattr(fit, "quick_checks", slow)
    assert fit.main(late) == 2
    assert "version_0: has gone on, or is not the newest run any more, meanwhile" in capsys.readouterr().err
    assert [row["step"] for row in table(tmp_path / "version_0")] == ["0", "1"]
    assert fit.main(late) == 0
    assert [row["step"] for row in table(tmp_path / "version_0")] == ["0", "1", "2"]


# ---------------------------------------------------------------------- processes that this one has started


@pytest.mark.parametrize("error", [Stopped(signal.SIGTERM), RuntimeError("planted")])
def test_whatever_ends_the_first_process_ends_the_others(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A signal between steps too, which is no Exception."""
    killed: list[int] = []

    def struck(trainer: L.Trainer, *_: Any, **__: Any) -> None:
        assert os.environ[PARENT] == str(os.getpid())
        trainer.strategy._launcher = SimpleNamespace(kill=killed.append)  # type: ignore[assignment]
        raise error

    monkeypatch.setattr(L.Trainer, "fit", struck)
    if isinstance(error, Stopped):
        assert fit.main(command(tmp_path)) == 143
    else:
        with pytest.raises(RuntimeError, match="planted"):
            fit.main(command(tmp_path))
    assert killed == [signal.SIGKILL] and PARENT not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells of a parent's death on Linux alone")
def test_a_process_ends_with_the_one_that_started_it() -> None:
    ready, begun = os.pipe()
    parent = os.fork()
    if not parent:
        with own_processes():
            if not os.fork():
                die_with_parent()
                os.write(begun, str(os.getpid()).encode())
            time.sleep(60)
            os._exit(0)
    child = int(os.read(ready, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_whose_parent_is_gone_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PARENT, "1")
    monkeypatch.setattr("bvpo.stopping.ctypes.CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    assert fit.main(["--help"]) == 2
    assert "process 1, which has started this one, is gone" in capsys.readouterr().err
    assert PARENT not in os.environ
