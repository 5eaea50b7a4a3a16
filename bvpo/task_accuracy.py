"""Accuracy on held-out questions with exact answers, in both modes, before and after a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bvpo.errors import UserError
from bvpo.generation import Decoding, generate
from bvpo.pairs import encode_prompt
from bvpo.policy import load_tokenizer, stop_tokens
from bvpo.tasks import Question, draw_questions, is_correct
from bvpo.traces import MODES, QWEN3, Mode, ThinkFormat, answer_of, render_prompt


@dataclass(frozen=True)
class Accuracy:
    """Answers to the same questions in one mode.

    Attributes:
        correct: (Q,) 1.0 or 0.0 a question; a response without a finished answer is wrong.
        truncated: Fraction of responses cut at `max_new_tokens`.
    """

    correct: Tensor
    truncated: float

    @property
    def mean(self) -> float:
        return float(self.correct.mean())

    @property
    def standard_error(self) -> float:
        """Over questions."""
        return standard_error(self.correct)


def standard_error(values: Tensor) -> float:
    """Of the mean of (Q,) values."""
    return float(values.std() / len(values) ** 0.5)


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    mode: Mode,
    decoding: Decoding,
    seed: int = 0,
    batch_size: int = 256,
    progress: str | None = None,
    think: ThinkFormat = QWEN3,
    stops: Sequence[str] = (),
) -> Accuracy:
    """One sampled response a question, checked exactly.

    Args:
        stops: The texts that end a response; () takes the tokenizer's EOS alone.
    """
    conversations = ([{"role": "user", "content": question.instruction}] for question in questions)
    prompts = [encode_prompt(tokenizer, render_prompt(tokenizer, c, mode, think)) for c in conversations]
    ends = tokenizer.convert_tokens_to_ids(list(stops) or [str(tokenizer.eos_token)])
    completions = generate(
        model,
        prompts,
        [seed * len(questions) + index for index in range(len(questions))],
        decoding,
        eos_token_ids=cast(list[int], ends),
        batch_size=batch_size,
        progress=progress,
    )
    correct = []
    for question, completion in zip(questions, completions, strict=True):
        finished = completion.finish_reason == "stop"
        text = tokenizer.decode(completion.token_ids[:-1] if finished else completion.token_ids)
        answer = answer_of(cast(str, text), mode, think) if finished else None
        correct.append(float(answer is not None and is_correct(question, answer)))
    truncated = sum(c.finish_reason == "length" for c in completions) / len(completions)
    return Accuracy(torch.tensor(correct, dtype=torch.float64), truncated)


class TaskAccuracy(L.Callback):
    """Measures the policy on held-out questions of the built-in tasks before and after a fit.

    The questions, and the seed of each response, are the same both times: the difference is a paired one. A policy
    that cannot be asked, as its tokenizer has no chat template or no EOS or its cached steps are not those of a plain
    forward pass, is not measured: that is said once, and the fit goes on.

    Args:
        questions: How many, at least 2.
        temperature: Of the sampled responses.
        max_new_tokens: Longer responses are cut and count as wrong.
        batch_size: Responses generated at once.
        seed: Of questions and responses.
        before: Measure before the fit too; without it only the trained policy is measured.
    """

    def __init__(
        self,
        questions: int = 1000,
        temperature: float = 0.8,
        max_new_tokens: int = 160,
        batch_size: int = 256,
        seed: int = 0,
        before: bool = True,
    ) -> None:
        if questions < 2:
            raise UserError(f"questions must be ≥ 2 to give a standard error, got {questions}")
        self.questions = draw_questions(questions, seed, "held_out")
        self.decoding = Decoding(temperature=temperature, max_new_tokens=max_new_tokens)
        self.batch_size, self.seed, self.measure_before = batch_size, seed, before
        self.before: dict[Mode, Accuracy] = {}
        self.after: dict[Mode, Accuracy] = {}
        self._said: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0 and self.measure_before:
            self.before = self._measure(trainer, pl_module, "before")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.after = self._measure(trainer, pl_module, "after")

    def _measure(self, trainer: L.Trainer, module: Any, when: str) -> dict[Mode, Accuracy]:
        tokenizer = load_tokenizer(module.policy_name)
        try:
            results = self._answers(trainer, module, tokenizer, when)
        except UserError as error:  # no reason to lose a fit
            if str(error) not in self._said:
                self._said.add(str(error))
                rank_zero_warn(f"{module.policy_name}: accuracy is not measured: {error}")
            return {}
        metrics = {f"accuracy/{mode}": result.mean for mode, result in results.items()}
        metrics |= {f"accuracy/{mode}_standard_error": result.standard_error for mode, result in results.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        return results

    def _answers(
        self, trainer: L.Trainer, module: Any, tokenizer: PreTrainedTokenizerBase, when: str
    ) -> dict[Mode, Accuracy]:
        """Raises UserError where the policy cannot be asked."""
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token")
        think = getattr(cast(Any, trainer).datamodule, "think", QWEN3)
        bars = trainer.progress_bar_callback is not None and trainer.is_global_zero
        return {
            mode: answer_questions(
                module.policy,
                tokenizer,
                self.questions,
                mode,
                self.decoding,
                self.seed,
                self.batch_size,
                progress=f"{len(self.questions)} held-out questions, {mode}, {when}" if bars else None,
                think=think,
                stops=stop_tokens(module.policy_name, tokenizer),
            )
            for mode in MODES
        }

    def state_dict(self) -> dict[str, Any]:
        return {mode: {"correct": r.correct, "truncated": r.truncated} for mode, r in self.before.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = {cast(Mode, mode): Accuracy(**result) for mode, result in state_dict.items()}
