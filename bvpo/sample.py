"""Sample preference pairs from a model: `python -m bvpo.sample --config experiments/sample/tiny_reasoner.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_warn

from bvpo.commands import exit_code, options_parser, read_options
from bvpo.sample_report import Summary, print_summary
from bvpo.sampled_rows import SampledRows, check_start
from bvpo.sampler import Sampler
from bvpo.sampling import Sampling


def run(options: Sampling, progress: bool = True) -> Summary | None:
    """Do the stages asked for. The rows' summary, or None where no rows were made."""
    sampler = Sampler(options, progress)
    check_start(sampler)
    if not sampler.mine:
        size = options.backend.block or 1
        rank_zero_warn(
            f"shard {options.shard} has no prompt: the {len(sampler.prompts)} prompts are fewer blocks of {size} than "
            "there are shards, and blocks stay whole: give fewer shards or, to all of them, a smaller backend.block"
        )
    with sampler.journal() as journal:
        rows = SampledRows(sampler, journal)
        if options.stage in ("all", "generate"):
            sampler.generate(journal)
        if options.stage in ("all", "score"):
            rows.score()
        if options.stage in ("all", "anchors"):
            rows.draw_anchors()
        return rows.write() if options.stage in ("all", "pairs") and options.shard is None else None


def parser() -> ArgumentParser:
    """The command line: the fields of `Sampling`."""
    own = options_parser("sample", __doc__)
    own.add_class_arguments(Sampling)
    return own


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0; 2 after an error that the user can mend; 130 when interrupted."""

    def work() -> None:
        options, progress = read_options(parser(), Sampling, args)
        summary = run(options, progress)
        if summary is not None:
            print_summary(summary, options.output, options.work)
            return
        print(
            f"done: {options.work}. The rows are made by the same command with --stage pairs, once all shards are done"
        )

    return exit_code(work, "what has been sampled is kept; the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
