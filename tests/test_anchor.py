"""The marginal anchor: log-marginals by hand, its gradient by plain autograd, and when it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedTokenizerFast

from bvpo.anchor import anchor_quality, draw_two, marginal_coefficients, marginal_logps
from bvpo.batches import collate
from bvpo.data import PairData
from bvpo.errors import UserError
from bvpo.losses import DPO, PairLogps, SimPO
from bvpo.mixing import Fixed, Optimal
from bvpo.module import BVPO
from bvpo.monitor import refusal
from bvpo.pairs import tokenize_anchors, tokenize_row
from bvpo.policy import completion_logps, load_policy, sequence_logps
from bvpo.records import StepRecord
from bvpo.traces import split
from tests.conftest import EOS, make_rows, write_rows


def test_log_marginals_by_hand() -> None:
    """Completion 0: π/q = 2, 6 → mean 4. Completion 1: one trace, π/q = 5."""
    logps, proposal = torch.tensor([0.2, 0.3, 0.5]).log(), torch.tensor([0.1, 0.05, 0.1]).log()
    estimate = marginal_logps(logps, proposal, torch.tensor([0, 0, 1]), 2)
    assert estimate.exp().tolist() == pytest.approx([4.0, 5.0])


def test_far_log_probabilities_stay_finite() -> None:
    logps = torch.tensor([-9000.0, -9001.0], dtype=torch.float64)
    estimate = marginal_logps(logps, torch.zeros(2, dtype=torch.float64), torch.tensor([0, 0]), 1)
    assert float(estimate) == pytest.approx(-9000 + math.log((1 + math.exp(-1)) / 2))


def test_effective_size_and_half_difference_by_hand() -> None:
    """Weights 1, 1, 1, 1 → size 4, halves agree; weights 3, 1 → size 16/10, halves differ by log 3."""
    even = anchor_quality(torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.long), 1)
    assert float(even.effective_size) == pytest.approx(4.0) and float(even.half_difference) == 0.0
    uneven = anchor_quality(torch.tensor([3.0, 1.0]).log(), torch.zeros(2), torch.zeros(2, dtype=torch.long), 1)
    assert float(uneven.effective_size) == pytest.approx(1.6)
    assert float(uneven.half_difference) == pytest.approx(math.log(3))


def test_the_quality_is_of_all_completions_however_they_are_cut() -> None:
    """Completions of 4, 1, 2 and 1 traces, as one microbatch and as four; the halves are compared in the two that have
    any: a microbatch of one trace has a size and no halves."""
    logps = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 5.0, 1.0, 7.0]).double().log()
    proposal, completion = torch.zeros(8).double(), torch.tensor([0, 0, 0, 0, 1, 2, 2, 3])

    def quality(cut: list[list[int]]) -> tuple[float, float]:
        step = StepRecord([0.5], (2, 2))
        step.add_sketch("anchor", torch.zeros(1))
        for own in cut:
            inside = torch.isin(completion, torch.tensor(own))
            numbers = torch.searchsorted(torch.tensor(own), completion[inside])
            step.qualities.append(anchor_quality(logps[inside], proposal[inside], numbers, len(own)))
        found = step.quality()
        assert found is not None
        return float(found.effective_size), float(found.half_difference)

    size = (100 / 30 + 1 + 36 / 26 + 1) / 4
    difference = (math.log((2 + 4) / (1 + 3)) + math.log(5)) / 2
    for cut in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]]):
        assert quality(cut) == pytest.approx((size, difference), rel=1e-12)


def test_a_bad_anchor_is_refused_with_a_reason() -> None:
    assert refusal(4.0, 0.3) == ""
    assert "effective sample size 1.20" in refusal(1.2, 0.3)
    assert "halves of the traces differ by 2.50" in refusal(4.0, 2.5)
    assert refusal(math.nan, 0.3) and refusal(4.0, math.nan)
    alone = anchor_quality(torch.zeros(2), torch.zeros(2), torch.tensor([0, 1]), 2)
    assert "no completion has two traces" in refusal(float(alone.effective_size), float(alone.half_difference))


def with_anchors(rows: list[dict[str, Any]], count: int = 4) -> list[dict[str, Any]]:
    """Rows with independently drawn traces, whose log q is made up."""
    traces = [[f" w{3 * k + i} w{k + 2} " for k in range(count)] for i in range(len(rows))]
    drawn = [[{"trace": t, "logprob": -7.0 - k} for k, t in enumerate(own)] for own in traces]
    return [{**row, "anchor_traces": own} for row, own in zip(rows, drawn, strict=True)]


def test_sequences_are_prompt_trace_and_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    row = with_anchors(make_rows(1))[0]
    anchors = tokenize_anchors(row, tokenizer, "row 1")
    answer = row["chosen"].split("</think>")[1]
    texts = [tokenizer.decode(ids) for ids in anchors["anchor_chosen"]]
    assert texts == [f"<think>{t['trace']}</think>{answer}" for t in row["anchor_traces"]]
    assert anchors["anchor_log_q"] == [-7.0, -8.0, -9.0, -10.0]


def test_candidates_with_the_same_answer_are_posterior_draws(tokenizer: PreTrainedTokenizerFast) -> None:
    row = make_rows(1)[0]
    answer = row["chosen"].split("</think>")[1].removesuffix(EOS).strip()
    candidates = [{"trace": f" w{k} ", "answer": answer if k < 3 else "w9"} for k in range(5)]
    anchors = tokenize_anchors({**row, "trace_candidates": candidates}, tokenizer, "row 1")
    assert len(anchors["anchor_chosen"]) == 3 and anchors["anchor_log_q"] == []
    assert [tokenizer.decode(ids) for ids in anchors["anchor_rejected"]] == [row["rejected"]]  # its own trace alone
    with pytest.raises(UserError, match="row 1: the marginal anchor needs anchor_traces"):
        tokenize_anchors(row, tokenizer, "row 1")


@pytest.mark.parametrize("posterior", [False, True])
def test_the_gradient_is_that_of_the_marginal_loss(
    llama_folder: Path, tokenizer: PreTrainedTokenizerFast, posterior: bool
) -> None:
    """In float64, against one autograd graph over the loss −log σ(β · margin of logsumexp's), row by row."""
    rows = with_anchors(make_rows(3))
    tokenized = [tokenize_row(row, tokenizer) | tokenize_anchors(row, tokenizer, "row") for row in rows]
    policy, reference = (load_policy(str(llama_folder), torch.float64) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    anchors = collate(tokenized, 0).anchors
    assert anchors is not None and anchors.log_q is not None
    with torch.no_grad():
        before, base = (completion_logps(model, anchors.sequences) for model in (policy, reference))
    proposal = base if posterior else anchors.log_q
    coefficients, _ = marginal_coefficients(DPO(0.3), before, base, proposal, anchors.completion, 6)
    surrogate = (completion_logps(policy, anchors.sequences) * coefficients).sum()
    found = torch.autograd.grad(surrogate, list(policy.parameters()))

    live, margins = completion_logps(policy, anchors.sequences), []
    for row in range(3):
        ratio = []
        for side in (row, 3 + row):
            own = anchors.completion == side
            ratio.append(torch.logsumexp((live - proposal)[own], 0) - torch.logsumexp((base - proposal)[own], 0))
        margins.append(ratio[0] - ratio[1])
    loss = -torch.nn.functional.logsigmoid(0.3 * torch.stack(margins)).sum()
    for a, b in zip(found, torch.autograd.grad(loss, list(policy.parameters())), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_one_posterior_draw_is_the_trace_gradient() -> None:
    """K = 1: the coefficients are those of plain DPO on the pair."""
    policy, reference = torch.tensor([-3.0, -5.0]).double(), torch.tensor([-4.0, -4.5]).double()
    coefficients, _ = marginal_coefficients(DPO(0.5), policy, reference, reference, torch.tensor([0, 1]), 2)
    leaf = policy.clone().requires_grad_()
    ones = torch.ones(1)
    DPO(0.5)(PairLogps(leaf[:1], leaf[1:], ones, ones), PairLogps(reference[:1], reference[1:], ones, ones)).backward()
    assert torch.allclose(coefficients, leaf.grad)  # type: ignore[arg-type]


def test_a_fit_with_the_marginal_anchor_logs_it(fit_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Log q is made up, so that the traces of a completion differ little in weight: the anchor is trusted."""
    from tests.test_fit import read_metrics

    rows = with_anchors(make_rows(16))
    for row in rows:
        for anchor in row["anchor_traces"]:
            anchor["logprob"] = -20.0
            anchor["trace"] = " w3 w4 "
    source = write_rows(tmp_path / "rows.jsonl", rows)
    run = fit_llama(
        f"--data.train={source}",
        "--model.mixing=bvpo.mixing.Optimal",
        "--model.mixing.anchor=marginal",
        "--model.mixing.anchor_every=2",
        "--model.mixing.warmup_steps=0",
        "--model.accumulate=2",
        "--data.batch_size=2",
        "--trainer.max_steps=8",
        "--trainer.max_epochs=-1",
    )
    metrics = read_metrics(run)
    assert [row["step"] for row in metrics if "anchor/effective_size" in row] == [0, 2, 4, 6]
    assert metrics[0]["anchor/effective_size"] == pytest.approx(4.0) and metrics[-1]["step"] == 7
    assert {"bias/trace_sq", "bias/empty_sq", "mixing/alpha_estimate"} <= metrics[-1].keys()
    assert len({row["mixing/alpha"] for row in metrics}) > 2


def test_a_distrusted_anchor_gives_no_estimate(fit_llama: Callable[..., Path], tmp_path: Path) -> None:
    from tests.test_fit import read_metrics

    source = write_rows(tmp_path / "rows.jsonl", with_anchors(make_rows(16), count=1))
    with pytest.warns(UserWarning, match="the marginal anchor is refused"):
        run = fit_llama(f"--data.train={source}", "--model.mixing.anchor=marginal", "--trainer.max_steps=2")
    metrics = read_metrics(run)
    assert metrics[0]["anchor/refused"] == 1 and "mixing/alpha_estimate" not in metrics[-1]


def test_only_dpo_has_a_marginal() -> None:
    with pytest.raises(UserError, match="defined for DPO"):
        BVPO(loss=SimPO(), mixing=Optimal(anchor="marginal"))
    BVPO(loss=SimPO(), mixing=Fixed())


def test_weights_per_group_are_logged(fit_llama: Callable[..., Path]) -> None:
    from tests.test_fit import read_metrics

    options = ["--model.mixing=bvpo.mixing.Optimal", "--model.mixing.per_group=true", "--model.mixing.warmup_steps=2"]
    last = read_metrics(fit_llama(*options, "--model.accumulate=4", "--data.batch_size=2", "--trainer.max_steps=4"))[-1]
    own = {key.split("/")[-1] for key in last if key.startswith("mixing/alpha_estimate/")}
    assert own == {"embedding", "layer_0", "layer_1", "head"}
    assert last["mixing/mse_ratio_per_group"] <= 1  # a sum of minima against the minimum of the sum


def test_two_draws_are_different_traces_of_the_same_completion() -> None:
    """Weights 1 : 2 : 3 → the pairs {0,1}, {0,2}, {1,2} come as 2 : 3 : 6; completion 1 has one trace only."""
    weights, completion = torch.tensor([1.0, 2.0, 3.0, 1.0]).log(), torch.tensor([0, 0, 0, 1])
    counts = {(0, 1): 0, (0, 2): 0, (1, 2): 0}
    for seed in range(2200):
        first, second = draw_two(weights, completion, 2, seed)
        assert first[1] == second[1] == -1
        counts[min(first[0], second[0]), max(first[0], second[0])] += 1
    assert chisquare(list(counts.values()), [400, 600, 1200]).pvalue > 1e-3


def test_the_conditional_variance_is_the_spread_over_traces(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with two posterior traces a side: the four trace pairs are equally likely, and their spread is a sum.

    The step's estimate, averaged over 300 seeds of the draw, is compared with it to 4 standard errors.
    """
    rows = make_rows(2)
    for row in rows:
        row["trace_candidates"] = [
            {"trace": f" w{k} w{k + n} ", "answer": split(row[side]).answer.removesuffix(EOS).strip()}
            for n, side in enumerate(("chosen", "rejected"))
            for k in (3, 7)
        ]
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    module = BVPO(str(llama_folder), mixing=Fixed(anchor="marginal"), beta=0.5)
    data = PairData(source, batch_size=2, tokenizer=str(llama_folder))
    found: list[float] = []
    truth: list[float] = []

    class Probe(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            anchors, reference = batch.anchors, module.reference
            assert reference is not None
            weights = torch.zeros(len(anchors.completion))
            for seed in range(300):
                step = StepRecord([0.5], (1, 1))
                module.passes._conditional_variance(step, anchors, weights, 4, seed)
                found.append(float(step.conditional[0][0]))
            parameters = list(module.policy.parameters())
            for row in range(2):
                own = [(anchors.completion == side).nonzero()[:, 0].tolist() for side in (row, 2 + row)]
                gradients = []
                for chosen in own[0]:
                    for rejected in own[1]:
                        pair = anchors.sequences.part([chosen, rejected])
                        loss = module.loss(sequence_logps(module.policy, pair), reference.logps(pair)).sum()
                        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
                stacked = torch.stack(gradients)
                truth.append(float(stacked.var(0, correction=0).sum()) * 2)  # two of two traces: correction 1 − ½

    L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[Probe()]).fit(
        module, datamodule=data
    )
    values = torch.tensor(found)
    assert abs(float(values.mean()) - sum(truth) / 2) < 4 * float(values.std()) / len(values) ** 0.5
