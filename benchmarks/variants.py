"""The variants of an optimizer step that `step.py` compares and `scaling.py` follows: what each of them runs.

Shapes and words are those of `bvpo`; a row is a trace pair and an empty-trace pair.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count
from typing import Any, Literal

import datasets
import lightning as L
import torch
import transformers
from lightning.fabric.utilities import move_data_to_device
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config
from turns import CUDA, Turns

from bvpo.batches import PairBatch, collate
from bvpo.data import PairData
from bvpo.losses import DPO
from bvpo.mixing import Fixed
from bvpo.module import BVPO
from bvpo.monitor import Units
from bvpo.packed import is_packed
from bvpo.policy import by_side, completion_logps, load_policy

BETA, LEARNING_RATE, CLIP = 0.1, 1e-6, 1.0
ENDLESS = 1_000_000_000  # steps: the parent ends the child
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-true"}
PRODUCT_ROWS, PRODUCTS = 4096, 20
DEVICE = "cuda" if CUDA else "cpu"
LIGER = (False, True) if CUDA and find_spec("liger_kernel") else (False,)  # TRL's options
FLASH = (False, True) if CUDA and find_spec("flash_attn") else (False,)

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Model and rows of a step.

    Attributes:
        prompt, trace, answer: Least and most tokens.
        shape: Of the random model: `smollm2` is a Llama with heads of 64 numbers whose size the next three say,
            `qwen2-1.5b` is Qwen2-1.5B whole.
        model: Folder of a model in its place.
    """

    dtype: str = "fp32"
    prompt: tuple[int, int] = (60, 130)
    trace: tuple[int, int] = (100, 310)
    answer: tuple[int, int] = (20, 120)
    rows: int = 4
    shape: Literal["smollm2", "qwen2-1.5b"] = "smollm2"
    layers: int = 3
    hidden: int = 576
    vocabulary: int = 4096
    model: str | None = None
    threads: int = 1
    seed: int = 127

    def config(self) -> Any:
        if self.model is not None:
            return AutoConfig.from_pretrained(self.model)
        if self.shape == "qwen2-1.5b":
            return Qwen2Config(
                vocab_size=151_936,
                hidden_size=1536,
                intermediate_size=8960,
                num_hidden_layers=28,
                num_attention_heads=12,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
        heads = max(1, self.hidden // 64)
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 8 // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
            tie_word_embeddings=True,
        )

    def with_weights(self, folder: str) -> Setting:
        """The same with its random model saved in the folder; itself where the model is a real one."""
        if self.model is not None:
            return self
        torch.manual_seed(self.seed)
        transformers.logging.disable_progress_bar()
        AutoModelForCausalLM.from_config(self.config()).save_pretrained(folder)
        return replace(self, model=folder)

    def make_rows(self) -> list[Row]:
        """Random tokens, as `tokenize_rows` would give them."""
        rng, vocabulary = random.Random(self.seed), self.config().get_text_config().vocab_size

        def tokens(least: int, most: int) -> list[int]:
            return rng.choices(range(1, vocabulary), k=rng.randint(least, most))

        rows: list[Row] = []
        for key in range(self.rows):
            prompt = tokens(*self.prompt)
            row: Row = {"prompt_key": key, "prompt": prompt, "empty_prompt": [*prompt, 1, 2]}
            for side in ("chosen", "rejected"):
                row |= {side: tokens(*self.trace) + tokens(*self.answer), f"empty_{side}": tokens(*self.answer)}
            row["length"] = len(prompt) + max(len(row["chosen"]), len(row["rejected"]))
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Variant:
    kind: Literal["trl", "joint", "padded", "packed", "product"]
    reference: Literal["live", "cached"] = "live"
    statistics: bool = False
    liger: bool = False
    flash: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.reference}" + "+α̂" * self.statistics + "+liger" * self.liger + "+flash" * self.flash


TRL, PRODUCT = Variant("trl"), Variant("product")
VARIANTS = [
    TRL,
    Variant("trl", "cached"),
    *([Variant("trl", "cached", liger=True)] if CUDA and find_spec("liger_kernel") else []),
    *([Variant("trl", "cached", flash=True)] if CUDA and find_spec("flash_attn") else []),
    *(
        [Variant("trl", "cached", liger=True, flash=True)]
        if CUDA and find_spec("liger_kernel") and find_spec("flash_attn")
        else []
    ),
    Variant("joint", "cached"),
    *(
        Variant(kind, reference, statistics)
        for kind in ("padded", "packed")
        for reference in ("live", "cached")
        for statistics in (False, True)
    ),
]


def all_pairs(rows: list[Row]) -> list[Row]:
    """The trace pairs, then the empty-trace pairs."""
    names = ("prompt", "chosen", "rejected")
    return [{name: row[prefix + name] for name in names} for prefix in ("", "empty_") for row in rows]


def end_alone() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of one token: rows are token ids already, and trainers ask it how they end and are padded."""
    words = Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def run_trl(variant: Variant, setting: Setting, turns: Turns) -> None:
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    pairs = all_pairs(setting.make_rows())
    attention = "flash_attention_2" if variant.flash else "sdpa"
    Tokenized(
        setting.model,
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            model_init_kwargs={"dtype": DTYPES[setting.dtype], "attn_implementation": attention},
            precompute_ref_log_probs=variant.reference == "cached",
            per_device_train_batch_size=len(pairs),
            use_liger_kernel=variant.liger,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            max_steps=ENDLESS,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,  # autocast
            use_cpu=DEVICE == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{f"{k}_ids": v for k, v in pair.items()} for pair in pairs]),
        processing_class=end_alone(),
        callbacks=[Timer()],
    ).train()


def run_joint(variant: Variant, setting: Setting, turns: Turns) -> None:
    rows = [{**pair, "prompt_key": 0, "empty_chosen": []} for pair in all_pairs(setting.make_rows())]
    batch = move_data_to_device(collate(rows, 0).trace, DEVICE)
    model: Any = load_policy(str(setting.model), DTYPES[setting.dtype])
    model, loss = model.to(DEVICE), DPO(BETA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    with torch.no_grad():
        reference = by_side(completion_logps(model, batch), batch)
    while True:
        turns.begin()
        loss(by_side(completion_logps(model, batch), batch), reference).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turns.end()


class SameRows(PairData):
    """The same tokens at every step, as other prompts: the statistics leave out a prompt that they have met."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(batch_size=len(rows))
        self.rows = {"train": datasets.Dataset.from_list(rows)}
        self.tokenizer: Any = end_alone()

    def train_dataloader(self) -> Any:
        return self

    def __iter__(self) -> Iterator[PairBatch]:
        batch = collate(list(self.rows["train"]), self.pad_token_id)  # type: ignore[arg-type]
        for step in count():
            yield batch._replace(prompts=batch.prompts + step * len(batch.prompts))


class TakeTurns(L.Callback):
    def __init__(self, variant: Variant, turns: Turns) -> None:
        self.variant, self.turns = variant, turns

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        assert is_packed(module.policy) == (self.variant.kind == "packed"), "this model's sequences cannot be packed"
        if module.monitor is not None:
            fill_window(module)

    def on_train_batch_start(self, *_: Any) -> None:
        self.turns.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        self.turns.end()


def packing(kind: str) -> dict[str, Any]:
    """The module's options that pad or pack: all that this file knows of how that is chosen."""
    return {"packing": "auto" if kind == "packed" else "off"}


def fill_window(module: Any) -> None:
    """Units of noise, of steps before the first: statistics cost most when the window is full."""
    window, rows = module.monitor.window, module.batch_rows
    counts = torch.full((2, 2, 1), float(rows))
    for step in range(-window.capacity, 0):
        vectors = torch.randn_like(window.vectors[:, :1])
        units = Units(vectors, counts.to(vectors.device), torch.arange(rows, device=vectors.device)[None] + step * rows)
        module.monitor.update(units, step)


def run_ours(variant: Variant, setting: Setting, turns: Turns) -> None:
    module = BVPO(
        str(setting.model),
        reference_logps=variant.reference,
        reference_cache=tempfile.mkdtemp(),
        loss=DPO(BETA),
        mixing=Fixed(0.5) if variant.statistics else Fixed(0.5, window=0),
        learning_rate=LEARNING_RATE,
        schedule="constant",
        clip=CLIP,
        **packing(variant.kind),
    )
    L.Trainer(
        accelerator="gpu" if CUDA else "cpu",
        devices=1,
        precision=PRECISIONS[setting.dtype],
        max_steps=ENDLESS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TakeTurns(variant, turns)],
    ).fit(module, datamodule=SameRows(setting.make_rows()))


def run_product(variant: Variant, setting: Setting, turns: Turns) -> None:
    """Rows times an MLP's matrix: the rate that the floor is computed with."""
    config = setting.config().get_text_config()
    place: dict[str, Any] = {"dtype": DTYPES[setting.dtype], "device": DEVICE}
    states = torch.randn(PRODUCT_ROWS, config.hidden_size, **place)
    matrix = torch.randn(config.intermediate_size, config.hidden_size, **place)
    while True:
        turns.begin()
        for _ in range(PRODUCTS):
            torch.nn.functional.linear(states, matrix)
        turns.end()


def product_flops(setting: Setting) -> float:
    """Multiplications and additions of one of its steps."""
    config = setting.config().get_text_config()
    return 2.0 * PRODUCTS * PRODUCT_ROWS * float(config.hidden_size * config.intermediate_size)


@dataclass(frozen=True)
class Case:
    variant: Variant
    setting: Setting

    def __str__(self) -> str:
        return self.variant.name


def run(case: Case, turns: Turns) -> None:
    """Steps of a case, without an end."""
    kinds = {"trl": run_trl, "joint": run_joint, "padded": run_ours, "packed": run_ours, "product": run_product}
    kinds[case.variant.kind](case.variant, case.setting, turns)
