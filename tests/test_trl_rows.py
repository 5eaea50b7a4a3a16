"""A file of the documented schema, unchanged, in TRL's `DPOTrainer`: the same ids, and training that goes the same way.

`test_trl.py` compares one gradient in detail. Here whole files with all their columns go the way that a user of TRL
takes: `load_dataset`, a model by name, `train()`. The trace-only baseline is the file as it is; the empty-only one is
the file with its `empty_*` columns renamed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import datasets
import lightning as L
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from bvpo.batches import BRANCHES, Branch
from bvpo.data import PairData
from bvpo.losses import DPO
from bvpo.mixing import Fixed
from bvpo.module import BVPO
from bvpo.pairs import load_rows, tokenize_rows
from bvpo.policy import BUILTIN as MODELS
from bvpo.reading import BUILTIN as FILES
from bvpo.reading import OPTIONAL_COLUMNS, TEXT_COLUMNS
from bvpo.traces import MODES, QWEN3, R1_DISTILL, Conversation, ThinkFormat, render_prompt, template_fingerprint
from tests.conftest import write_rows
from tests.test_traces import CONVERSATIONS, deepseek, template
from tests.test_trl import BACKWARD_ERROR, LOGP_ERROR

SIDES = ("prompt", "chosen", "rejected")
FAMILIES = {"deepseek_r1_distill": R1_DISTILL, "qwen3": QWEN3}


def load(file: Path, branch: Branch = "trace") -> datasets.Dataset:
    """The rows of one branch as a user of TRL loads them: the file as it is, or with its `empty_*` columns renamed."""
    kind = "parquet" if file.suffix == ".parquet" else "json"
    rows = datasets.load_dataset(kind, data_files=str(file), split="train")
    if branch == "empty":
        rows = rows.remove_columns(list(SIDES)).rename_columns({f"empty_{name}": name for name in SIDES})
    return rows


def trl_trainer(folder: Path, rows: datasets.Dataset, output: Path, **options: Any) -> DPOTrainer:
    arguments = DPOConfig(
        output_dir=str(output),
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return DPOTrainer(str(folder), args=arguments, train_dataset=rows)


def trl_ids(trainer: DPOTrainer) -> list[dict[str, list[int]]]:
    rows = cast(datasets.Dataset, trainer.train_dataset)
    return [{name: row[f"{name}_ids"] for name in SIDES} for row in rows]


def our_ids(file: Path, tokenizer: Any, branch: Branch) -> list[dict[str, list[int]]]:
    prefix = "" if branch == "trace" else "empty_"
    rows = tokenize_rows(load_rows(str(file)), tokenizer, str(file))
    return [{name: row[prefix + name] for name in SIDES} for row in rows]


# --- Files and models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """A chat template that `trl` ships, with DeepSeek's tokenizer."""
    return str(request.param)


@pytest.fixture(scope="module")
def family_folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over DeepSeek's 128,815 tokens, of which the family's template is the chat template."""
    tokenizer = deepseek(template(family), adds_bos=family == "deepseek_r1_distill")
    folder = tmp_path_factory.mktemp(family)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,  # far from uniform predictions, so that rows differ
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def whole_row(
    tokenizer: Any, think: ThinkFormat, conversation: Conversation, index: int, first: str = ""
) -> dict[str, Any]:
    """A row with every documented column; `first` is what its chosen completions start with."""
    prompts = {mode: render_prompt(tokenizer, conversation, mode, think) for mode in MODES}
    opened = prompts["thinking"].endswith("<think>\n")
    candidates: dict[str, list[dict[str, Any]]] = {"trace": [], "empty": []}
    for score, (side, start) in enumerate((("rejected", ""), ("chosen", first))):
        thought = ("" if opened else "\n") + f"{start}{index} and then {side * (1 + index % 4)}\n"
        answers = {"trace": f"\n\nSo it is {side}, {index}.", "empty": f"{start}It is {side}, {index}."}
        for branch, answer in answers.items():
            trace = thought if branch == "trace" else ""
            written = {"score": float(score), "finish_reason": "stop", "seed": index, "n_tokens": 20}
            candidates[branch].append({"trace": trace, "answer": answer} | written)
    eos = str(tokenizer.eos_token)
    rejected, chosen = (
        ("" if opened else think.open) + own["trace"] + think.close + own["answer"] + eos for own in candidates["trace"]
    )
    empty_rejected, empty_chosen = (own["answer"] + eos for own in candidates["empty"])
    return {
        "prompt_id": f"p{index}",
        "conversation": conversation,
        "prompt": prompts["thinking"],
        "chosen": chosen,
        "rejected": rejected,
        "empty_prompt": prompts["no_thinking"],
        "empty_chosen": empty_chosen,
        "empty_rejected": empty_rejected,
        "trace_candidates": candidates["trace"],
        "empty_candidates": candidates["empty"],
        "anchor_traces": [{"trace": f"\n{index} = {k}\n", "logprob": -3.0 - k} for k in range(2)],
        "template_sha": template_fingerprint(tokenizer),
        "sampler_model": "random Llama",
        "reward_model": "length",
    }


# --- Ids --------------------------------------------------------------------------------------------------------------

# What a completion may start with. In DeepSeek's tokens a line break merges with the one that a prompt ends in, except
# where the think tag, a token of its own, comes first: Qwen3's trace pairs.
STARTS = ["", "A", "1", " a", "  a", "é", "日", "🙂", "\u0301", "\\(", "- ", '"', "\t", "\n", "\n\n", " \n", "\u00a0"]
MERGING = {
    ("deepseek_r1_distill", "trace"): ["\n", "\n\n", " \n"],
    ("deepseek_r1_distill", "empty"): ["\n", "\n\n"],
    ("qwen3", "trace"): [],
    ("qwen3", "empty"): ["\n", "\n\n"],
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_ids_are_those_of_trl_wherever_no_token_spans_the_border(
    branch: Branch, family: str, family_folder: Path, tmp_path: Path
) -> None:
    """TRL tokenizes prompt and completion together. Where that merges a prompt's end with a completion's start, it
    drops the merged end from the prompt of both sides; ours stays the prompt that generation started from."""
    tokenizer = AutoTokenizer.from_pretrained(family_folder)
    conversations = list(CONVERSATIONS.values()) * len(STARTS)
    rows = [
        whole_row(tokenizer, FAMILIES[family], conversation, index, start)
        for index, (start, conversation) in enumerate(zip(STARTS, conversations, strict=False))
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    texts = load(file, branch)
    theirs, ours = trl_ids(trl_trainer(family_folder, texts, tmp_path)), our_ids(file, tokenizer, branch)
    merging = []
    for start, text, their, our in zip(STARTS, texts, theirs, ours, strict=True):
        if all(has_border(tokenizer, text["prompt"], text[side]) for side in ("chosen", "rejected")):
            assert their == our
            continue
        merging.append(start)
        kept = len(their["prompt"])
        assert kept < len(our["prompt"]) and their["prompt"] == our["prompt"][:kept]
        assert our["prompt"] == tokenizer(text["prompt"]).input_ids
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(their["prompt"] + their[side]) == tokenizer.decode(our["prompt"] + our[side])
    assert merging == MERGING[family, branch]


def has_border(tokenizer: Any, prompt: str, completion: str) -> bool:
    """Whether, tokenized together, a token ends where the prompt does: some first tokens decode to the prompt."""
    ids, start = tokenizer(prompt + completion).input_ids, tokenizer.decode(tokenizer(prompt).input_ids)
    return any(tokenizer.decode(ids[:count]) == start for count in range(len(ids)))


def test_a_file_with_every_column_is_taken_as_it_is(family: str, family_folder: Path, tmp_path: Path) -> None:
    """None of the other columns makes TRL see conversations, tools or images in the rows."""
    tokenizer = AutoTokenizer.from_pretrained(family_folder)
    file = write_rows(tmp_path / "rows.jsonl", [whole_row(tokenizer, FAMILIES[family], CONVERSATIONS["one turn"], 1)])
    documented = {name for name in (*TEXT_COLUMNS, *OPTIONAL_COLUMNS) if not name.startswith("all_")}
    assert set(load(file).column_names) == documented  # `all_…` are columns of other tools
    [row] = trl_ids(trl_trainer(family_folder, load(file), tmp_path))
    assert tokenizer.decode(row["chosen"]) == load(file)[0]["chosen"]
    assert row["prompt"].count(tokenizer.bos_token_id) == (family == "deepseek_r1_distill")


def test_every_built_in_row_has_the_ids_of_trl(tmp_path: Path) -> None:
    folder, file = MODELS["builtin:tiny_reasoner"], FILES["builtin:tiny_reasoner"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for branch in BRANCHES:
        assert trl_ids(trl_trainer(folder, load(file, branch), tmp_path)) == our_ids(file, tokenizer, branch)


# --- Training ---------------------------------------------------------------------------------------------------------

B, STEPS, BETA, LEARNING_RATE = 4, 3, 0.1, 1e-3

# Relative, of a later gradient and of the whole update. AdamW divides every entry of a gradient by its own size: one
# below its rounding error may go either way, so the weights part by more than rounding, where the loss is flat.
# Measured: at most 1.4e-5 and 9e-4.
LATER_ERROR, UPDATE_ERROR = 1e-4, 1e-2


class TheirSteps(TrainerCallback):
    """Gradients, (P,), as TRL's optimizer gets them."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.gradients.append(flat(parameter.grad for parameter in parts["model"].parameters()))


class OurSteps(L.Callback):
    """Logged values, and gradients, (P,), as the optimizer gets them."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.metrics: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.gradients.append(flat(parameter.grad for parameter in module.policy.parameters()))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.metrics.append(module.metrics)


def flat(tensors: Iterable[Any]) -> Tensor:
    return torch.cat([tensor.detach().flatten().clone() for tensor in tensors])


def train_theirs(folder: Path, rows: datasets.Dataset, output: Path) -> tuple[list[float], list[Tensor], Tensor]:
    """Losses, gradients, and the weights at the end, (P,). The options name our defaults, or turn choices off."""
    trainer = trl_trainer(
        folder,
        rows,
        output,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        per_device_train_batch_size=B,
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
    )
    steps = TheirSteps()
    trainer.add_callback(steps)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, steps.gradients, flat(cast(nn.Module, trainer.model).parameters())


def train_ours(model: str, data: PairData, alpha: float) -> tuple[OurSteps, Tensor]:
    """What was seen, and the weights at the end, (P,)."""
    options: dict[str, Any] = {"learning_rate": LEARNING_RATE, "schedule": "constant"}
    module, steps = BVPO(model, loss=DPO(BETA), mixing=Fixed(alpha), **options), OurSteps()
    L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[steps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    return steps, flat(module.policy.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("branch", BRANCHES)
def test_the_built_in_file_trains_the_same_way(branch: Branch, tmp_path: Path) -> None:
    name = "builtin:tiny_reasoner"
    check_training(name, MODELS[name], FILES[name], branch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_file_of_a_real_family_trains_the_same_way(
    branch: Branch, family: str, family_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family_folder)
    conversations = list(CONVERSATIONS.values()) * B
    rows = [whole_row(tokenizer, FAMILIES[family], conversations[index], index) for index in range(B * STEPS)]
    check_training(str(family_folder), family_folder, write_rows(tmp_path / "rows.jsonl", rows), branch, tmp_path)


def check_training(model: str, folder: Path, file: Path, branch: Branch, output: Path) -> None:
    """Several optimizer steps on the same rows in the same order: every loss and gradient, and the last weights."""
    data = PairData(str(file), batch_size=B, tokenizer=model)
    data.setup()
    order = [row for microbatch in data.sampler() for row in microbatch.rows][: B * STEPS]
    losses, gradients, weights = train_theirs(folder, load(file, branch).select(order), output)
    steps, our_weights = train_ours(model, data, {"trace": 1.0, "empty": 0.0}[branch])

    assert len(losses) == len(gradients) == len(steps.gradients) == STEPS
    for step, (loss, theirs, ours) in enumerate(zip(losses, gradients, steps.gradients, strict=True)):
        logged = steps.metrics[step]
        logp = max(abs(logged[f"logp/{branch}_{side}_sum"]) for side in ("chosen", "rejected"))
        assert abs(logged[f"loss/{branch}"] - loss) <= BETA * LOGP_ERROR * logp * 2 / math.sqrt(
            B
        )  # 4B log-probabilities
        assert (ours - theirs).norm() <= (LATER_ERROR if step else BACKWARD_ERROR) * theirs.norm()
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6) and abs(losses[-1] - losses[0]) > 1e-4  # it has moved
    start = flat(AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert (our_weights - weights).norm() <= UPDATE_ERROR * (weights - start).norm()
