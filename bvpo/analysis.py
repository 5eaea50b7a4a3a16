"""Run folders, grids of fits and the oracle → data frames and numbers: what the notebooks look at.

`plots` draws what is read here. Both need the `notebooks` extra.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student_t

from bvpo.errors import UserError
from bvpo.mixing import ErrorTerms
from bvpo.oracle import Oracle
from bvpo.run_log import read_table, whole_lines
from bvpo.runs import noted_ranks, read_config

# ---------------------------------------------------------------------- run folders


@dataclass(frozen=True)
class Run:
    """A run's log, and what of its configuration the plots need.

    Attributes:
        log: One row an optimizer step, one column a log key (docs/method.md); nan where a step did not log a key.
        batch_size: B, rows of the optimizer batch over all processes.
        window: Optimizer steps that the statistics are taken over; with the marginal anchor, measurements of it.
        anchor: What stands for μ in α̂: `trace` or `marginal`.
        anchor_every: Steps between two measurements of the marginal anchor.
    """

    log: pd.DataFrame
    batch_size: int
    window: int
    anchor: str
    anchor_every: int

    def __len__(self) -> int:
        """Optimizer steps that are logged, of which `trainer.log_every_n_steps` leaves out some.

        The log may have a row more, of what was measured after the last one.
        """
        return int(self.series("mixing/alpha").count())

    def series(self, key: str) -> pd.Series[float]:
        """A log key by step; all nan where the run has not logged it."""
        return self.log[key] if key in self.log else pd.Series(np.nan, self.log.index, name=key)

    def overlap(self) -> pd.DataFrame:
        """Columns `trace`, `empty` and `covariance` by step: what trΣ / B of one pair's gradients is times in a batch.

        `GradientMoments.overlap`, from the logged pairs of a row; 1 where every row has both pairs.
        """
        trace, empty, both = (self.series(f"pairs/{of}").fillna(1.0) for of in ("trace", "empty", "both"))
        return pd.DataFrame({"trace": 1 / trace, "empty": 1 / empty, "covariance": both / (trace * empty)})

    def batch_variance(self, estimator: str, key: str | None = None) -> pd.Series[float]:
        """trΣ of one optimizer batch's `trace` or `empty` gradient, from that of one pair.

        Args:
            key: Log key of a part of that variance; without it, all of it.
        """
        return self.series(key or f"variance/{estimator}") * self.overlap()[estimator] / self.batch_size

    def logged(self, *keys: str) -> bool:
        """Whether each of the keys has a value at some step."""
        return all(bool(self.series(key).notna().any()) for key in keys)


def read_run(folder: str | Path, ranks: int | None = None) -> Run:
    """A run folder, such as runs/version_0.

    Args:
        ranks: Processes of the run; without it, as the run noted them or, where it did not, as config.yaml has them.

    Raises:
        UserError: The folder is no run's, a file in it is damaged, nothing is logged yet, or nothing in it says how
            many processes it had.
    """
    path = Path(folder) / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{folder}: no metrics.csv in this folder; give a run folder such as runs/version_0")
    rows, log = read_table(path)[1], pd.DataFrame()
    try:
        if rows:
            log = pd.read_csv(io.StringIO(whole_lines(path))).groupby("step").first()
            config = read_config(path.parent / "config.yaml")
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no config.yaml beside metrics.csv; give a run folder as bvpo.fit wrote it"
        ) from error
    if log.empty:
        raise UserError(f"{path}: nothing is logged yet; wait for the run's first optimizer step")
    try:
        model, data = config["model"], config["data"]
        mixing = model["mixing"]["init_args"]
        ranks = ranks or noted_ranks(path.parent) or _ranks(config["trainer"], folder)
        batch_size = model["accumulate"] * data["batch_size"] * ranks
        return Run(log, batch_size, mixing["window"], mixing["anchor"], mixing["anchor_every"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/config.yaml: does not hold a run's options ({type(error).__name__}: {error}): the file is "
            "damaged; put a copy of it there"
        ) from error


def _ranks(trainer: Mapping[str, Any], folder: str | Path) -> int:
    devices = trainer["devices"]
    if devices == "auto" and trainer["accelerator"] == "cpu":
        devices = 1
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        raise UserError(
            f"{folder}/config.yaml: trainer.devices is {devices!r}, which does not say how many processes the run had, "
            "and the optimizer batch depends on it: give it, as in read_run(RUN, ranks=8)"
        )
    return devices * int(trainer["num_nodes"])


def newest_run(root: str | Path = "runs") -> Path:
    """The `version_N` folder with the highest N. Raises UserError where there is none."""
    names = [path.name.removeprefix("version_") for path in Path(root).glob("version_*") if path.is_dir()]
    versions = [int(name) for name in names if name.isdigit()]
    if not versions:
        raise UserError(f"{root}: no run in this folder; start one with python -m bvpo.fit")
    return Path(root) / f"version_{max(versions)}"


def alpha_interval(run: Run, level: float = 0.95) -> pd.DataFrame:
    """Columns `low` and `high` of α̂ by step: Student's t with one degree of freedom less than the window has steps.

    As `AlphaEstimate.interval`, but around the logged α̂, which is cut to [0, 1]. nan where prompts were met again.
    """
    steps = pd.Series(run.log.index, run.log.index)
    if run.anchor == "marginal":
        steps = steps // run.anchor_every - run.series("anchor/refused").ffill().fillna(0)
    freedom = np.minimum(steps + 1, run.window) - 1
    half = student_t.ppf((1 + level) / 2, freedom.clip(lower=1)) * run.series("mixing/alpha_standard_error")
    half = half.where(~(run.series("mixing/reused_fraction") > 0))
    value = run.series("mixing/alpha_estimate")
    return pd.DataFrame({"low": (value - half).clip(0, 1), "high": (value + half).clip(0, 1)})


def running_mean(values: pd.Series[float], window: int, weights: pd.Series[float] | None = None) -> pd.DataFrame:
    """Columns `mean` and `standard_error` over the last `window` values that are there, taken as independent draws.

    The weighted mean's error is √(n/(n−1) Σ w²(x−m)²) / Σ w; nan for a single value.
    """
    own = pd.DataFrame({"x": values, "w": 1.0 if weights is None else weights}).dropna()
    found = []
    for end in range(1, len(own) + 1):
        x, w = own.iloc[max(0, end - window) : end].to_numpy().T
        mean, n = float(w @ x / w.sum()), len(x)
        error = float(np.sqrt(n / (n - 1) * (w**2 @ (x - mean) ** 2)) / w.sum()) if n > 1 else np.nan
        found.append((mean, error))
    return pd.DataFrame(found, own.index, ["mean", "standard_error"], dtype=float)


def last_error_terms(run: Run) -> ErrorTerms | None:
    """What the window's last estimate of MSE_B(α) is made of.

    None where the log does not hold it: with the marginal anchor ⟨b_t, b_e⟩ is not logged.
    """
    if run.anchor != "trace":
        return None
    overlap = run.overlap()
    terms = pd.DataFrame(
        {
            "bias": run.series("bias/empty_sq"),
            **{of: run.series(f"variance/{of}") * overlap[of] for of in ("trace", "empty", "covariance")},
            "estimate": run.series("mixing/alpha_estimate"),
        }
    )
    terms["covariance"] = terms["covariance"].where(overlap["covariance"] > 0, 0.0)  # of no row in common
    last = terms.dropna()
    if last.empty:
        return None
    bias, trace, empty, covariance, _ = (torch.tensor(value) for value in last.iloc[-1])
    none = torch.zeros_like(bias)
    return ErrorTerms(none, bias, none, trace, empty, covariance)


# ---------------------------------------------------------------------- grids of fits


@dataclass(frozen=True)
class GridResults:
    """What `python -m bvpo.ablate` has written: docs/ablations.md describes the columns.

    Attributes:
        table: table.csv: a line a cell and metric that has a fit.
        fits: fits.csv: a line a cell, seed and metric.
    """

    table: pd.DataFrame
    fits: pd.DataFrame

    @property
    def metrics(self) -> list[str]:
        return list(self.table["metric"].unique())

    @property
    def cells(self) -> list[str]:
        return list(self.table["cell"].unique())

    def of(self, metric: str) -> pd.DataFrame:
        """The table's lines of one metric, by cell.

        Raises:
            UserError: There is no such metric.
        """
        if metric not in self.metrics:
            raise UserError(f"there is no metric {metric!r} in this grid; it has {', '.join(self.metrics)}")
        return self.table[self.table["metric"] == metric].set_index("cell")

    def by_seed(self, metric: str) -> pd.DataFrame:
        """One metric of every fit: cells × seeds, nan where a fit is missing."""
        own = self.fits[self.fits["metric"] == metric]
        return own.pivot(index="cell", columns="seed", values="value").reindex(self.of(metric).index)


def read_grid(folder: str | Path) -> GridResults:
    """The output folder of a grid, such as runs/ablations/alpha. Raises UserError where it holds no tables."""
    tables = [Path(folder) / name for name in ("table.csv", "fits.csv")]
    for path in tables:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; python -m bvpo.ablate GRID.yaml --report writes it")
    texts = {"cell": str, "metric": str, "baseline": str}
    table, fits = (pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=["", "nan"]) for path in tables)
    return GridResults(table[table["seeds"] > 0], fits)


# ---------------------------------------------------------------------- the oracle


def measured_trace_variance(oracle: Oracle, alpha: float, rows: int, seed: int) -> tuple[float, float]:
    """Var over traces of one row's g_c, and its standard error, by drawing.

    Half the squared distance of two rows' mixed gradients that differ in the traces only: both are draws from the
    population given prompt, answers and empty-trace pair.
    """
    generator, p = torch.Generator().manual_seed(seed), oracle.population
    given = [p.trace.prompt, p.trace.chosen, p.trace.rejected, p.empty.chosen, p.empty.rejected]
    _, group = torch.stack(given).unique(dim=1, return_inverse=True)
    first = p.draw(rows, generator)
    second = (p.probability * (group == group[first, None])).multinomial(1, generator=generator)[:, 0]
    trace, empty, _ = oracle.row_gradients
    mixed = alpha * trace + (1 - alpha) * empty
    half = (mixed[first] - mixed[second]).square().sum(-1) / 2
    return float(half.mean()), float(half.std() / rows**0.5)
