"""Train a policy: `python -m bvpo.fit --config experiments/alpaca.yaml`."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import datasets
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.utils.logging import disable_progress_bar

from bvpo.checkpoints import LAST, AtomicCheckpointIO, StepCheckpoint
from bvpo.checks import quick_checks, require
from bvpo.commands import begin, undecoded_options
from bvpo.compatibility import check_trainer
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.module import BVPO
from bvpo.report import StepProgress, print_report
from bvpo.runs import (
    ConfigSaver,
    changed_options,
    claim_version,
    find_start,
    lock_run,
    mark_finished,
    note_ranks,
    run_loggers,
)
from bvpo.sharding import FSDP2
from bvpo.stopping import Stopped, StopSignals, die_with_parent, outside_cause, own_processes

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs",
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the sampler cuts optimizer batches over ranks itself
}
CHECKPOINT_DEFAULTS = {
    "checkpoint.save_last": True,
    "checkpoint.save_top_k": 0,
    "checkpoint.every_n_train_steps": 25,
    "checkpoint.enable_version_counter": False,  # one last.ckpt a run, also where the run's folder was moved
}

USAGE = "python -m bvpo.fit --config FILE [--config FILE ...] [--OPTION VALUE ...]"


class FitCLI(LightningCLI):
    """The trainer's, the module's and the data's options; what two of them share is linked."""

    lock: TextIO | None = None  # of the run's folder

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Go on from this checkpoint; `last`: from the newest run's, in its folder.",
        )
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; null: torch's own choice.")
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")  # type: ignore[arg-type]
        parser.set_defaults(CHECKPOINT_DEFAULTS | {"seed_everything": 0})
        parser.link_arguments("model.policy", "data.tokenizer")
        parser.link_arguments("model.accumulate", "data.accumulate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        if self.config.seed_everything is True:  # Lightning would take 0 then, and the order of rows that of 1
            raise UserError("--seed_everything true: no seed is drawn here; give a number, such as 1")

    def before_instantiate_classes(self) -> None:
        trainer = self.config.trainer
        if trainer.max_steps == -1 and trainer.max_epochs is None:
            trainer.max_epochs = 1
        if trainer.enable_progress_bar is not False and not getattr(rank_zero_only, "rank", 0):
            self.trainer_defaults.setdefault("callbacks", []).append(StepProgress())
        else:
            datasets.disable_progress_bars()
            disable_progress_bar()  # of transformers
        refuse_trainer_options(trainer)
        refuse_checkpoint_options(self.config)
        if self.config.threads is not None:
            if self.config.threads < 1:
                raise UserError(f"threads must be ≥ 1, got {self.config.threads}")
            torch.set_num_threads(self.config.threads)
        if self.config.model.beta is not None:  # the saved config then names one beta
            self.config.model.loss.init_args.beta = self.config.model.beta
        self.root = Path(trainer.default_root_dir)
        self.limits = {name: trainer[name] and str(trainer[name]) for name in ("max_epochs", "max_time")}
        self.limits["max_steps"] = trainer.max_steps
        self.start = find_start(self.root, self.config.ckpt_path, self.limits)
        self.changed: list[str] = []
        if self.start.version is not None:  # the folder may have a config.yaml already
            config = self.root / f"version_{self.start.version}" / "config.yaml"
            self.changed = changed_options(config, self.parser.dump(self.config, skip_none=False))
            name = config.name if self.start.checkpoint is None else f"config_resumed_at_{self.start.step}.yaml"
            self.save_config_kwargs["config_filename"] = name

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ModuleNotFoundError, ValueError) as error:
            if (message := missing_package(error)) is None:
                raise
            raise UserError(message) from error

    def fit(self) -> None:
        check_trainer(self.trainer)  # before it starts further processes
        require(quick_checks(self.datamodule), str(self.datamodule.sources["train"]))
        start, folder = self.start, None
        if self.changed:
            rank_zero_print("options that changed since this run was started:", *self.changed, sep="\n  ")
        given = [] if self.config.trainer.logger in (None, True) else self.trainer.loggers  # beside our own
        if self.config.trainer.logger is not False:
            version = claim_version(self.root) if start.version is None else start.version
            folder = self.root / f"version_{version}"
            zero = self.trainer.is_global_zero
            self.lock = lock_run(folder) if zero else None
            if zero and start.version is not None and find_start(self.root, "last", self.limits) != start:
                raise UserError(f"{folder}: has gone on, or is not the newest run any more, meanwhile: start again")
            resumed_at = None if start.version is None else start.step
            if zero and (start.version is None or start.checkpoint is None):  # else another number is refused later
                note_ranks(folder, self.trainer.world_size)
            self.trainer.loggers = [*run_loggers(self.root, version, resumed_at), *given] if zero else []
        path = start.checkpoint
        if path is not None and start.version is not None:
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, StepCheckpoint):
                    callback.goes_on_from = path
            path = path.with_name(LAST)
        if not isinstance(self.trainer.strategy, FSDP2):
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        try:
            with own_processes():
                options: dict[str, Any] = {"ckpt_path": path and str(path), "weights_only": True}
                self.trainer.fit(self.model, datamodule=self.datamodule, **options)
        except BaseException:  # a signal, too
            launcher: Any = self.trainer.strategy.launcher
            if hasattr(launcher, "kill"):  # they would wait for this process
                launcher.kill(signal.SIGKILL)
            raise
        if not self.trainer.is_global_zero:
            return
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        ended = any(isinstance(callback, StopSignals) and callback.ended for callback in callbacks)
        if self.trainer.state.finished and not ended:
            raise UserError(
                f"no optimizer step was taken: the {self.trainer.global_step} that are behind this start are all that "
                "max_steps, max_epochs or max_time allow; raise them"
            )
        if folder is not None and self.trainer.state.finished:
            mark_finished(folder, self.trainer.global_step, self.limits)


def refuse_trainer_options(trainer: Any) -> None:
    """Raises UserError for options of the trainer that would train otherwise than is meant, or end in a traceback."""
    if trainer.accumulate_grad_batches != 1 or trainer.gradient_clip_val is not None:
        raise UserError(
            "the module accumulates and clips itself: give --model.accumulate and --model.clip instead of "
            "--trainer.accumulate_grad_batches and --trainer.gradient_clip_val"
        )
    if str(trainer.strategy).startswith(("fsdp", "deepspeed")) and trainer.strategy != "fsdp2":
        raise UserError(
            f"strategy {trainer.strategy}: gradients are mixed and summed for one device, ddp and fsdp2 only; set "
            "--trainer.strategy fsdp2, which divides parameters over all processes and runs on CPUs too"
        )
    if trainer.fast_dev_run:
        raise UserError("--trainer.fast_dev_run leaves out logs and checkpoints: give --trainer.max_steps 1 instead")
    if trainer.barebones:
        raise UserError("--trainer.barebones leaves out logs and checkpoints, which a run consists of: leave it out")
    if trainer.overfit_batches:
        raise UserError(
            "--trainer.overfit_batches would replace the order of rows: give --data.train a file of a few rows, and "
            "--trainer.max_epochs"
        )
    if str(trainer.precision).startswith("transformer-engine"):
        raise UserError(
            f"precision {trainer.precision}: layers are those of transformers; use bf16-mixed, bf16-true or 32-true"
        )


def refuse_checkpoint_options(config: Any) -> None:
    """Raises UserError for options of checkpoints that `--ckpt_path last` could not go on with, or that do nothing."""
    checkpoint = config.checkpoint
    if checkpoint.dirpath is not None:
        raise UserError(
            "--checkpoint.dirpath: checkpoints stand in their run's folder, where --ckpt_path last looks for them; "
            "give --trainer.default_root_dir a place that has room"
        )
    if checkpoint.save_last == "link" or checkpoint.save_on_train_epoch_end is not None:
        raise UserError(
            "--checkpoint.save_last link and --checkpoint.save_on_train_epoch_end: checkpoints are files of their own, "
            "and written at the end of optimizer steps; leave them out"
        )
    if checkpoint.monitor is not None and config.data.validation is None:
        raise UserError(
            f"--checkpoint.monitor {checkpoint.monitor}: scores come from validation rows: give --data.validation"
        )
    if config.ckpt_path == "last" and config.trainer.logger is False:
        raise UserError("--ckpt_path last goes on in a run's folder, and --trainer.logger false makes none")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0; 2 after an error that the user can mend; 130 and 143 when stopped
    by Ctrl-C and SIGTERM."""
    begin()
    try:
        die_with_parent()
        with StopSignals() as signals:
            return _run(args, signals)
    except (UserError, MisconfigurationException) as error:
        print(f"error{_process()}: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        rank_zero_print(stop, file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        if (message := outside_cause(error) or undecoded_options(error) or missing_score(error)) is None:
            raise
        print(f"error{_process()}: {message}", file=sys.stderr)
        return 2


def missing_package(error: Exception) -> str | None:
    """What Lightning says of a package that an option needs and that is not installed; None for other errors.

    jsonargparse hides the error in one of its own, and its words in the midst of a list of types.
    """
    found = re.search(r"Requirement '[^']*' not met\.[^\n]*", str(error))
    return found and f"an option needs a package that is not installed: {found[0]}"


def missing_score(error: Exception) -> str | None:
    """What Lightning says where EarlyStopping waits for a score that is not logged; None for other errors."""
    text = str(error)
    return text if isinstance(error, RuntimeError) and text.startswith("Early stopping conditioned on metric") else None


@rank_zero_only
def rank_zero_print(*values: Any, **options: Any) -> None:
    """Print, on the first of several processes."""
    print(*values, **options)


def _process() -> str:
    """Which process speaks, where it is not the first."""
    rank = getattr(rank_zero_only, "rank", 0)
    return f" (process {rank})" if rank else ""


def _run(args: Sequence[str] | None, signals: StopSignals) -> int:
    cli = FitCLI(
        BVPO,
        PairData,
        run=False,
        args=None if args is None else list(args),
        trainer_defaults=TRAINER_DEFAULTS | {"callbacks": [signals]},
        save_config_callback=ConfigSaver,
        parser_kwargs={"prog": "python -m bvpo.fit", "description": __doc__, "usage": USAGE},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
    if cli.start.said:
        rank_zero_print(cli.start.said)
    if cli.start.finished:
        return 0
    try:
        cli.fit()
    finally:
        if cli.lock is not None:
            cli.lock.close()
    if cli.trainer.is_global_zero:
        print_report(cli.trainer, cli.model, str(cli.root))
    return 0 if cli.trainer.state.finished else 1


if __name__ == "__main__":
    sys.exit(main())
