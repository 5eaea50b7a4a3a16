"""Train a policy: `python -m bvpo.fit --config experiments/alpaca.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from bvpo.checks import quick_checks, require
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.module import BVPO, check_trainer
from bvpo.report import StepProgress, print_report
from bvpo.runs import checkpoint_step, claim_version, find_checkpoint, quiet_lightning, run_loggers

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs",
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the sampler cuts optimizer batches over ranks itself
}
CHECKPOINT_DEFAULTS = {"checkpoint.save_last": True, "checkpoint.save_top_k": 0, "checkpoint.every_n_train_steps": 25}


USAGE = "python -m bvpo.fit --config FILE [--config FILE ...] [--OPTION VALUE ...]"


class FitCLI(LightningCLI):
    """The trainer's, the module's and the data's options; what two of them share is linked."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Go on from this checkpoint; `last`: from the newest run's, in its folder.",
        )
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; null: torch's own choice.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")  # type: ignore[arg-type]
        parser.set_defaults(CHECKPOINT_DEFAULTS)
        parser.link_arguments("model.policy", "data.tokenizer")
        parser.link_arguments("model.accumulate", "data.accumulate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        trainer = self.config.trainer
        if trainer.max_steps == -1 and trainer.max_epochs is None:
            trainer.max_epochs = 1
        if trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"] = [StepProgress()]
        else:
            datasets.disable_progress_bars()
        if trainer.accumulate_grad_batches != 1 or trainer.gradient_clip_val is not None:
            raise UserError(
                "the module accumulates and clips itself: give --model.accumulate and --model.clip instead of "
                "--trainer.accumulate_grad_batches and --trainer.gradient_clip_val"
            )
        if self.config.threads is not None:
            if self.config.threads < 1:
                raise UserError(f"threads must be ≥ 1, got {self.config.threads}")
            torch.set_num_threads(self.config.threads)
        if self.config.model.beta is not None:  # the saved config then names one beta
            self.config.model.loss.init_args.beta = self.config.model.beta
        self.root = Path(trainer.default_root_dir)
        self.checkpoint, self.version, self.resumed_at = None, None, None
        if self.config.ckpt_path is not None:
            self.checkpoint, self.version = find_checkpoint(self.root, self.config.ckpt_path)
            self.resumed_at = checkpoint_step(self.checkpoint)
            if self.version is not None:  # the folder has a config.yaml already
                self.save_config_kwargs = {"config_filename": f"config_resumed_at_{self.resumed_at}.yaml"}
                self.save_config_kwargs["overwrite"] = True

    def fit(self) -> None:
        check_trainer(self.trainer)  # before it starts further processes
        require(quick_checks(self.datamodule), str(self.datamodule.sources["train"]))
        if self.config.trainer.logger in (None, True):
            version = claim_version(self.root) if self.version is None else self.version
            resumed_at = None if self.version is None else self.resumed_at
            self.trainer.loggers = run_loggers(self.root, version, resumed_at)
        path = None if self.checkpoint is None else str(self.checkpoint)
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 after an error that the user can mend."""
    quiet_lightning()
    try:
        cli = FitCLI(
            BVPO,
            PairData,
            run=False,
            args=None if args is None else list(args),
            seed_everything_default=0,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            parser_kwargs={"prog": "python -m bvpo.fit", "description": __doc__, "usage": USAGE},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
        cli.fit()
    except (UserError, MisconfigurationException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(cli.trainer, cli.model, str(cli.root))
    return 0 if cli.trainer.state.finished else 1


if __name__ == "__main__":
    sys.exit(main())
