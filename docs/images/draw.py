"""The README's two curves from a run of the default configuration.

python docs/images/draw.py runs/version_0
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

from bvpo import analysis, plots
from bvpo.commands import exit_code


def draw(folder: str) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "bvpo"  # the same run gives the same file
    run = analysis.read_run(folder)
    for name, figure in {"variance": plots.plot_variance(run), "alpha": plots.plot_alpha(run)}.items():
        figure.savefig(Path(__file__).parent / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="A run folder such as runs/version_0.")
    options = parser.parse_args()
    sys.exit(exit_code(lambda: draw(options.run), "start it again"))
