"""Cached log-probabilities are the live ones, are computed once, and survive what happens to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bvpo import reference_cache
from bvpo.batches import SequenceBatch, collate
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.losses import DPO
from bvpo.mixing import Fixed
from bvpo.module import BVPO
from bvpo.pairs import tokenize_row
from bvpo.policy import load_policy
from bvpo.reference_cache import row_values, weights_fingerprint
from tests.conftest import make_rows, write_rows


class Curve(L.Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.closes_step:
            self.metrics.append(module.metrics)


Train = Callable[..., tuple[BVPO, list[dict[str, float]]]]


@pytest.fixture
def train(llama_folder: Path, tmp_path: Path) -> Train:
    def run(
        rows: list[dict[str, Any]], mode: str = "cached", precision: Any = "32-true", steps: int = 4, **options: Any
    ) -> tuple[BVPO, list[dict[str, float]]]:
        source = write_rows(tmp_path / "rows.jsonl", rows)
        curve, data_options = Curve(), options.pop("data", {})
        module = BVPO(
            policy=str(llama_folder),
            reference_logps=mode,  # type: ignore[arg-type]
            reference_cache=str(tmp_path / "cache"),
            **{"learning_rate": 1e-2, "beta": 0.5, "accumulate": 2, **options},
        )
        data = PairData(str(source), str(source), 3, 2, str(llama_folder), **data_options)
        L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[curve],
        ).fit(module, datamodule=data)
        return module, curve.metrics

    return run


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows' values were computed, batch by batch."""
    counts: list[int] = []
    row_values = reference_cache.row_values

    def counted(model: Any, rows: list[dict[str, Any]], batch: Any, max_tokens: int | None) -> Any:
        counts.append(len(rows))
        return row_values(model, rows, batch, max_tokens)

    monkeypatch.setattr(reference_cache, "row_values", counted)
    yield counts


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_cached_reference_trains_as_a_live_one(train: Train, precision: str) -> None:
    """Padding differs between the two, so sums round differently: 1e-6 of |log π| in fp32, bf16's rounding else."""
    rows = make_rows(24)
    (_, live), (_, cached) = (train(rows, mode, precision) for mode in ("live", "cached"))
    tolerance = 1e-4 if precision == "32-true" else 5e-2
    first = 4 if precision == "32-true" else 1  # steps of a large rate drive roundings apart
    for a, b in zip(live[:first], cached[:first], strict=True):
        assert a.keys() == b.keys()
        for key in ("loss/trace", "loss/empty", "gradient/mixed_norm"):
            assert b[key] == pytest.approx(a[key], rel=tolerance)
    size = abs(cached[0]["logp/trace_chosen_sum"])
    for branch in ("trace", "empty"):
        margin = abs(cached[0][f"reward/{branch}_margin"]) / 0.5
        assert margin <= (1e-6 if precision == "32-true" else 1e-2) * size


def test_margins_at_step_0_are_nil(train: Train) -> None:
    for mode in ("live", "cached"):
        _, metrics = train(make_rows(24), mode, steps=1)
        for branch in ("trace", "empty"):
            for side in ("chosen", "rejected"):
                reward = abs(metrics[0][f"reward/{branch}_{side}"]) / 0.5
                assert reward <= 1e-6 * abs(metrics[0][f"logp/{branch}_{side}_sum"])


def test_values_are_computed_once(train: Train, computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and validation rows are the same here, and one folder serves both; a second fit computes nothing."""
    train(make_rows(24))
    assert sum(computed) == 24
    train(make_rows(24), mixing=Fixed(0.2), learning_rate=1e-3)
    assert sum(computed) == 24
    train(make_rows(25))
    assert sum(computed) == 24 + 25  # other rows
    train(make_rows(24), precision="bf16-mixed")
    assert sum(computed) == 24 + 25 + 24  # another precision


def test_an_interrupted_computation_goes_on(
    train: Train, computed: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reference_cache, "ROWS_A_FILE", 10)
    row_values = reference_cache.row_values
    calls: list[int] = []

    def interrupted(model: Any, rows: list[dict[str, Any]], batch: Any, max_tokens: int | None) -> Any:
        calls.append(1)
        if len(calls) == 6:  # in the second file
            raise KeyboardInterrupt
        return row_values(model, rows, batch, max_tokens)

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "row_values", interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(make_rows(24))
    files = list((tmp_path / "cache").rglob("*.arrow"))
    assert len(files) == 1
    computed.clear()
    _, metrics = train(make_rows(24))
    assert sum(computed) == 14
    _, live = train(make_rows(24), "live")
    assert metrics[-1]["loss/trace"] == pytest.approx(live[-1]["loss/trace"], rel=1e-4)


def test_a_damaged_file_is_named(train: Train, tmp_path: Path) -> None:
    train(make_rows(8))
    path = next((tmp_path / "cache").rglob("*.arrow"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot be read .* delete it"):
        train(make_rows(8))


def test_a_cache_that_is_a_file_is_said(train: Train, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"cache/.*\.arrow: cannot be written: Not a directory"):
        train(make_rows(4), steps=1)
    assert (tmp_path / "cache").read_text() == ""


def test_another_reference_is_loaded_to_compute_and_then_let_go(
    train: Train, llama_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    model = load_policy(str(llama_folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    other = tmp_path / "other"
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    (_, live), (module, cached) = (train(make_rows(12), mode, reference=str(other)) for mode in ("live", "cached"))
    assert not hasattr(module.reference, "model")
    for a, b in zip(live, cached, strict=True):
        assert b["loss/trace"] == pytest.approx(a["loss/trace"], rel=1e-4)
    assert live[0]["reward/trace_margin"] != 0


def test_anchors_and_one_sided_rows_have_values_too(train: Train) -> None:
    anchors = [{"trace": f" w{k} w{k + 1} ", "logprob": -4.0 - k} for k in range(4)]
    rows: list[dict[str, Any]] = [{**row, "anchor_traces": anchors} for row in make_rows(12)]
    rows[3] |= {"empty_chosen": None, "empty_rejected": None}
    rows[7] |= {"chosen": None, "rejected": None}
    options = {"mixing": Fixed(anchor="marginal", anchor_every=1), "data": {"on_one_sided": "keep"}}
    (_, live), (_, cached) = (train(rows, mode, steps=3, **options) for mode in ("live", "cached"))
    for a, b in zip(live, cached, strict=True):
        assert a.keys() == b.keys()
        for key in ("loss/trace", "loss/empty", "anchor/effective_size", "anchor/half_difference"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6)


def test_the_fingerprint_sees_a_single_changed_tensor(llama_folder: Path) -> None:
    model = load_policy(str(llama_folder))
    before = weights_fingerprint(model)
    assert weights_fingerprint(load_policy(str(llama_folder))) == before
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    assert weights_fingerprint(model) != before
    assert weights_fingerprint(model.bfloat16()) != before


def test_cached_rows_are_memory_mapped(train: Train, tmp_path: Path) -> None:
    train(make_rows(8))
    path = next((tmp_path / "cache").rglob("*.arrow"))
    assert datasets.Dataset.from_file(str(path)).column_names == list(reference_cache.FEATURES)
    assert isinstance(BVPO().loss, DPO)


@torch.no_grad()
def test_a_token_budget_bounds_each_pass_and_changes_no_value(
    llama_folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One-sided rows and anchors among them; sums are rounded in another order: 1e-5 of some 100 nats."""
    ids = {"anchor_log_q": [], "anchor_rejected": [[9, 1], [8, 8, 1]], "anchor_chosen": [[9, 9, 1]]}
    rows = [{**tokenize_row(row, tokenizer), **ids} for row in make_rows(9)]
    rows[2] |= {"empty_prompt": [], "empty_chosen": [], "empty_rejected": []}
    rows[5] |= {"prompt": [], "chosen": [], "rejected": [], "anchor_chosen": [], "anchor_rejected": []}
    model, batch = load_policy(str(llama_folder)), collate(rows, 0)
    sizes: list[int] = []
    completion_logps = reference_cache.completion_logps

    def watched(model: Any, part: SequenceBatch) -> torch.Tensor:
        sizes.append(part.input_ids.numel())
        return completion_logps(model, part)

    monkeypatch.setattr(reference_cache, "completion_logps", watched)
    whole = row_values(model, rows, batch, None)
    longest = 2 * batch.trace.input_ids.shape[1]
    assert len(sizes) == 4 and max(sizes) > 4 * longest
    for most in (1, 120):
        sizes.clear()
        cut = row_values(model, rows, batch, most)
        assert max(sizes) <= max(most, longest)
        for a, b in zip(whole, cut, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-5)
