"""At α = 1 and α = 0 the method is plain DPO on one set of pairs: the same numbers as TRL's `DPOTrainer`.

One JSONL file with the documented columns feeds both packages. TRL's gradient comes from its own tokens, batch and
loss; ours from a fit, as it stands when the optimizer is about to step.

Shapes: B pairs, S = 2B sequences, T tokens, V vocabulary, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import datasets
import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from bvpo.batches import BRANCHES, Branch, PairBatch, SequenceBatch, collate
from bvpo.data import PairData
from bvpo.losses import DPO, reward_margin
from bvpo.mixing import Fixed
from bvpo.module import BVPO
from bvpo.pairs import load_rows, tokenize_row
from bvpo.policy import sequence_logps
from tests.conftest import make_rows, write_rows

BETA = 0.1
B = 8

# How far apart two right answers may be in fp32. An operation rounds by at most u = 2⁻²⁴ of its result. Both packages
# run the same transformer on the same padded ids and part at its head: from there a completion's log-probability passes
# a product of 32 terms, a log-softmax over 47 words and a sum of at most 38 tokens, all of one sign: n = 117 roundings
# in a row. Of random sign, they add up to √n u, for two packages to √(2n) u, and four times that is allowed.
U = 2.0**-24
LOGP_ERROR = 4 * math.sqrt(2 * 117) * U  # 3.6e-6, relative
# An entry of a gradient adds, further down the same chain, the terms of all S × T = 16 × 50 positions of the batch.
BACKWARD_ERROR = 4 * math.sqrt(2 * (117 + 800)) * U  # 1.0e-5, relative


def loss_error(logps: Tensor) -> float:
    """Absolute, given log-probabilities (4, B): each moves the loss of its pair by at most β times its own error."""
    return BETA * LOGP_ERROR * float(logps.norm()) / B


def gradient_error(logps: Tensor) -> float:
    """Relative: the weight of a pair's gradient is σ(−z), z = β · margin, and |d log σ(−z)| ≤ |dz|."""
    return BETA * LOGP_ERROR * float(logps.norm(dim=0).max()) + BACKWARD_ERROR


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", make_rows(B))


@pytest.fixture(scope="module")
def policy_folder(llama_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's weights plus noise: margins of several nats, so that no loss is ln 2."""
    folder = tmp_path_factory.mktemp("models") / "policy"
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trl(
    file: Path, policy_folder: Path, llama_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[[Branch], DPOTrainer]:
    """TRL's trainer on one branch: on the file as it is, or with its `empty_*` columns renamed."""

    def trainer(branch: Branch) -> DPOTrainer:
        rows = datasets.load_dataset("json", data_files=str(file), split="train")
        if branch == "empty":
            columns = ["prompt", "chosen", "rejected"]
            rows = rows.remove_columns(columns).rename_columns({f"empty_{column}": column for column in columns})
        # TRL turns dropout modules off; Llama's attention dropout is a number in its configuration and would stay on.
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.0)
            for folder in (policy_folder, llama_folder)
        )
        arguments = DPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=BETA,
            max_length=None,
            pad_to_multiple_of=None,
            bf16=False,
            use_cpu=True,
            report_to="none",
        )
        return DPOTrainer(policy, reference, args=arguments, train_dataset=rows, processing_class=tokenizer)

    return trainer


def trl_batch(trainer: DPOTrainer) -> dict[str, Tensor]:
    """All rows, in the file's order."""
    return cast(dict[str, Tensor], trainer.data_collator(list(trainer.train_dataset)))


def trl_logps(trainer: DPOTrainer) -> Tensor:
    """(4, B): the policy's chosen and rejected, the reference's chosen and rejected."""
    batch = trl_batch(trainer)  # TRL's method for the reference takes any model
    return torch.stack(
        [side for model in (trainer.model, trainer.ref_model) for side in trainer.compute_ref_log_probs(model, batch)]
    )


def trl_loss_and_gradient(trainer: DPOTrainer) -> tuple[float, Tensor]:
    """The mean loss of all rows and its gradient, (P,)."""
    model = cast(nn.Module, trainer.model).train()
    loss = trainer.compute_loss(model, trl_batch(trainer))
    return loss.item(), flat(torch.autograd.grad(loss, list(model.parameters())))


# --- Ours -------------------------------------------------------------------------------------------------------------


class GradientBeforeTheStep(L.Callback):
    """Keeps what the optimizer is given, (P,)."""

    gradient: Tensor

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.gradient = flat(cast(Tensor, parameter.grad).clone() for parameter in module.parameters())


@pytest.fixture
def fit(file: Path, policy_folder: Path, llama_folder: Path) -> Callable[[float], tuple[BVPO, Tensor]]:
    """One optimizer step on all rows at a given α: the module after it, and the mixed gradient, (P,), before it."""

    def run(alpha: float) -> tuple[BVPO, Tensor]:
        module = BVPO(str(policy_folder), str(llama_folder), loss=DPO(BETA), mixing=Fixed(alpha), clip=0.0)
        seen = GradientBeforeTheStep()
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=1,
            callbacks=[seen],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, PairData(str(file), batch_size=B, tokenizer=str(policy_folder)))
        return module, seen.gradient

    return run


@pytest.fixture
def untrained(policy_folder: Path, llama_folder: Path) -> BVPO:
    module = BVPO(str(policy_folder), str(llama_folder), loss=DPO(BETA), mixing=Fixed(window=0))
    module.configure_model()
    return module


@pytest.fixture
def batch(file: Path, tokenizer: PreTrainedTokenizerFast) -> PairBatch:
    """All rows, in the file's order."""
    return collate([tokenize_row(row, tokenizer) for row in load_rows(str(file))], cast(int, tokenizer.pad_token_id))


def sequences_of(batch: PairBatch, branch: Branch) -> SequenceBatch:
    return cast(SequenceBatch, getattr(batch, branch))


def flat(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


# --- The comparison ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_ids_are_those_of_trl(
    branch: Branch, trl: Callable[[Branch], DPOTrainer], batch: PairBatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    """TRL tokenizes prompt and completion together; here no token spans their border.

    It appends an EOS only where a completion does not end in one, and the documented columns do.
    """
    theirs, ours = trl_batch(trl(branch)), sequences_of(batch, branch)
    assert torch.equal(theirs["input_ids"], ours.input_ids)
    assert torch.equal(theirs["attention_mask"], ours.attention_mask)
    assert torch.equal(theirs["completion_mask"].bool(), ours.completion_mask)
    assert ((ours.input_ids == tokenizer.eos_token_id).sum(1) == 1).all()


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_log_probabilities_are_those_of_trl(
    branch: Branch, trl: Callable[[Branch], DPOTrainer], untrained: BVPO, batch: PairBatch
) -> None:
    sequences = sequences_of(batch, branch)
    assert untrained.reference is not None
    policy, reference = sequence_logps(untrained.policy, sequences), untrained.reference.logps(sequences)
    ours = torch.stack([policy.chosen, policy.rejected, reference.chosen, reference.rejected])
    assert_close(ours.detach(), trl_logps(trl(branch)), rtol=LOGP_ERROR, atol=0)
    margins = reward_margin(policy, reference)
    assert margins.min() < -3 and margins.max() > 3  # so the pairs of the tests below do weigh differently


@pytest.mark.parametrize(("branch", "alpha"), [("trace", 1.0), ("empty", 0.0)])
def test_loss_and_gradient_at_the_ends_of_alpha_are_those_of_trl(
    branch: Branch, alpha: float, trl: Callable[[Branch], DPOTrainer], fit: Callable[[float], tuple[BVPO, Tensor]]
) -> None:
    trainer = trl(branch)
    expected_loss, expected = trl_loss_and_gradient(trainer)
    module, gradient = fit(alpha)

    logps = trl_logps(trainer)
    assert abs(module.metrics[f"loss/{branch}"] - expected_loss) <= loss_error(logps)
    assert (gradient - expected).norm() <= gradient_error(logps) * expected.norm()
    names = [name for name, _ in cast(nn.Module, trainer.model).named_parameters()]
    assert [name for name, _ in module.policy.named_parameters()] == names


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_between_the_ends_the_gradient_is_the_mixture(
    alpha: float, untrained: BVPO, batch: PairBatch, fit: Callable[[float], tuple[BVPO, Tensor]]
) -> None:
    """α g_t + (1 − α) g_e, where g_t and g_e are the gradients of the two mean losses, each taken alone."""
    weights = {"trace": alpha, "empty": 1 - alpha}
    module, gradient = fit(alpha)
    parts = []
    for branch in BRANCHES:
        sequences = sequences_of(batch, branch)
        assert untrained.reference is not None
        loss = untrained.loss(sequence_logps(untrained.policy, sequences), untrained.reference.logps(sequences)).mean()
        parts.append(weights[branch] * flat(torch.autograd.grad(loss, list(untrained.policy.parameters()))))
    assert (gradient - (parts[0] + parts[1])).norm() <= BACKWARD_ERROR * (parts[0].norm() + parts[1].norm())

    losses = [module.metrics[f"loss/{name}"] for name in ("mixed", *BRANCHES)]
    assert losses[0] == pytest.approx(alpha * losses[1] + (1 - alpha) * losses[2], rel=4 * U)
