"""Rows that a model does not take: doctor and fit refuse the same ones, the fit in one line before its first step."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import datasets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RwkvConfig,
    T5Config,
)

from bvpo import doctor, fit
from bvpo.batches import collate
from bvpo.errors import UserError
from bvpo.policy import completion_logps, load_policy
from bvpo.row_sizes import RowSizes, frequencies_misfit
from bvpo.shapes import Frequencies, ModelShape, model_shape
from tests.conftest import EOS, make_rows, write_rows

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    **IDS,
}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 60, **IDS}
Save = Callable[[PretrainedConfig], Path]


def longrope(border: int) -> Phi3Config:
    """Positions as Phi-4-mini has them: one set of frequencies up to `border` tokens, another behind it."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": border}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **factors}
    settings = {**LLAMA, "vocab_size": 64, "max_position_embeddings": 256, "rope_parameters": rope}
    return Phi3Config(**settings, original_max_position_embeddings=border)


def dynamic(border: int) -> LlamaConfig:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaConfig(**LLAMA, vocab_size=64, max_position_embeddings=border, rope_parameters=rope)


@pytest.fixture
def save(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Save:
    """A random model of a configuration, with the words' tokenizer."""

    def to_folder(config: PretrainedConfig) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / f"{config.model_type}_{len(list(tmp_path.iterdir()))}"
        cast(Any, AutoModelForCausalLM).from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return to_folder


@pytest.fixture
def verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, list[str]]]:
    """The fit's exit code and what it says, and the names of the doctor's checks that fail."""

    def ask(model: Path, *options: str) -> tuple[int, str, list[str]]:
        given = [
            f"--model.policy={model}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            *options,
        ]
        given += ["--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
        capsys.readouterr()
        code, said = fit.main(given), capsys.readouterr().err
        doctor_code = doctor.main([*given, "--json", "--rows=0"])
        failing = [c["name"] for c in json.loads(capsys.readouterr().out)["checks"] if c["status"] == "fail"]
        assert doctor_code == bool(failing)
        return code, said, failing

    return ask


Verdicts = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    """The third row's chosen trace has 126 tokens, the other sequences at most 60."""
    rows = make_rows(6)
    rows[2]["chosen"] = "<think> " + "w3 " * 60 + "</think> w1" + EOS
    return write_rows(tmp_path / "long.jsonl", rows)


def test_a_row_behind_the_last_position_is_refused(
    save: Save, verdicts: Verdicts, pairs_file: Path, long_file: Path
) -> None:
    model = save(GPT2Config(**GPT2))
    assert verdicts(model, f"--data.train={pairs_file}") == (0, "", [])
    code, said, failing = verdicts(model, f"--data.train={long_file}")
    assert code == 2 and failing == ["positions"] and len(said.splitlines()) == 1
    assert f"{long_file}, for {model}: the longest sequence has" in said and "made for 60: set data.max_length" in said
    code, said, failing = verdicts(model, f"--data.train={pairs_file}", f"--data.validation={long_file}")
    assert code == 2 and failing == ["validation positions"] and str(long_file) in said
    dropped = ["--data.max_length=60", "--data.on_overlong=drop"]
    assert verdicts(model, f"--data.train={long_file}", *dropped)[::2] == (0, [])


def test_the_reference_must_take_the_rows_too(
    save: Save, verdicts: Verdicts, llama_folder: Path, long_file: Path
) -> None:
    reference = save(GPT2Config(**GPT2))
    code, said, failing = verdicts(llama_folder, f"--model.reference={reference}", f"--data.train={long_file}")
    assert code == 2 and failing == ["reference positions"] and f"for {reference}: the longest" in said


def test_an_id_without_embedding_is_refused(save: Save, verdicts: Verdicts, pairs_file: Path) -> None:
    code, said, failing = verdicts(save(LlamaConfig(**LLAMA, vocab_size=30)), f"--data.train={pairs_file}")
    assert code == 2 and failing == ["vocabulary"] and len(said.splitlines()) == 1
    assert "the model has 30 embeddings, and the rows hold the id 46" in said


def test_overlong_validation_rows_fail_in_the_doctor_too(
    verdicts: Verdicts, llama_folder: Path, pairs_file: Path, long_file: Path
) -> None:
    options = [f"--data.train={pairs_file}", f"--data.validation={long_file}", "--data.max_length=60"]
    code, said, failing = verdicts(llama_folder, *options)
    assert code == 2 and failing == ["validation length"] and "row 3: longest sequence" in said


@pytest.mark.parametrize(("rows", "together", "said"), [(6, 4, "has 6 rows, no multiple"), (6, 2, "rows 1 to 2 are")])
def test_rows_that_cannot_be_drawn_together_fail_in_the_doctor_too(
    verdicts: Verdicts, llama_folder: Path, tmp_path: Path, rows: int, together: int, said: str
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", make_rows(rows))
    code, err, failing = verdicts(llama_folder, f"--data.train={source}", f"--data.rows_together={together}")
    assert code == 2 and failing == ["rows together"] and said in err


# --- Rotary frequencies that depend on the batch ----------------------------------------------------------------------


@pytest.mark.parametrize("config", [longrope(30), dynamic(30)], ids=["longrope", "dynamic"])
@torch.no_grad()
def test_a_log_probability_depends_on_the_rows_beside_it(config: PretrainedConfig, save: Save) -> None:
    """What the refusal is for: the first row's sequences have at most 14 tokens. A row of 12 beside it changes nothing
    but the last digits (1e-5); one of 44 does."""
    model = load_policy(str(save(config)))

    def row(tokens: int) -> dict[str, Any]:
        ids = {"prompt": [8, 9], "chosen": list(range(8, 8 + tokens)), "rejected": [9, 8]}
        return ids | {"empty_prompt": [], "empty_chosen": [], "empty_rejected": [], "prompt_key": tokens}

    alone, beside_short, beside_long = (
        float(completion_logps(model, collate([row(12), *others], 0).trace)[0]) for others in ([], [row(10)], [row(42)])
    )
    assert beside_short == pytest.approx(alone, rel=1e-5)
    assert abs(beside_long - alone) > 1e-2


def test_frequencies_are_read_off_the_configuration() -> None:
    assert Frequencies.of(longrope(16)) == Frequencies("longrope", 16)
    assert Frequencies.of(dynamic(32)) == Frequencies("dynamic", 32)
    assert Frequencies.of(LlamaConfig(**LLAMA)) is None and Frequencies.of(GPT2Config(**GPT2)) is None
    layers = {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 8}, "sliding": {}}
    given = cast(Any, type("Config", (), {"rope_parameters": layers}))
    assert Frequencies.of(given) == Frequencies("longrope", 8)


SHAPE = ModelShape(
    parameters=1000, largest=400, layers=2, hidden=8, intermediate=16, heads=2, attention_width=8, key_width=4,
    vocabulary=40,
)  # fmt: skip


def test_sequences_must_stand_on_one_side() -> None:
    """Of each branch: trace and empty-trace pairs never go through the model together."""
    long, grows = (replace(SHAPE, frequencies=Frequencies(kind, 30)) for kind in ("longrope", "dynamic"))
    assert frequencies_misfit(SHAPE, {"trace": (5, 99)}) is None
    for shape in (long, grows):
        assert frequencies_misfit(shape, {"trace": (5, 30), "empty": (3, 10)}) is None
        misfit = frequencies_misfit(shape, {"trace": (30, 31)})
        assert misfit is not None and "set data.max_length to 30" in misfit.advice and "30 to 31" in misfit.found
    assert frequencies_misfit(long, {"trace": (31, 99), "empty": (3, 10)}) is None
    assert frequencies_misfit(grows, {"trace": (31, 99), "empty": (3, 10)}) is not None


@pytest.mark.parametrize("config", [longrope(36), dynamic(36)], ids=["longrope", "dynamic"])
def test_rows_on_both_sides_are_refused(
    config: PretrainedConfig, save: Save, verdicts: Verdicts, pairs_file: Path
) -> None:
    code, said, failing = verdicts(save(config), f"--data.train={pairs_file}")
    assert code == 2 and failing == ["rotary frequencies"] and len(said.splitlines()) == 1
    assert "more than 36 tokens, and the trace sequences have" in said and "set data.max_length to 36" in said


def test_rows_on_one_side_start_at_ln_2(save: Save, verdicts: Verdicts, pairs_file: Path, tmp_path: Path) -> None:
    """A cached reference is computed in other batches than the policy: below the border, and above it."""
    for border in (100, 6):
        model = save(longrope(border))
        options = ["--model.reference_logps=cached", f"--model.reference_cache={tmp_path / 'cache'}"]
        empties = write_rows(tmp_path / f"{border}.jsonl", [row | long_answers(row) for row in make_rows(8)])
        code, said, failing = verdicts(model, f"--data.train={empties}", *options)
        assert (code, said, failing) == (0, "", [])
        newest = max((tmp_path / "runs").glob("version_*"), key=lambda path: path.stat().st_mtime)
        with (newest / "metrics.csv").open() as file:
            first = next(csv.DictReader(file))
        assert float(first["loss/trace"]) == pytest.approx(math.log(2), abs=1e-5)
        assert float(first["loss/empty"]) == pytest.approx(math.log(2), abs=1e-5)


def long_answers(row: dict[str, Any]) -> dict[str, str]:
    """Empty-trace answers of at least eight tokens."""
    return {name: "w7 w8 w9 w7 " + row[name] for name in ("empty_chosen", "empty_rejected")}


# --- What is measured -------------------------------------------------------------------------------------------------


def test_sizes_of_rows_by_hand() -> None:
    """Rows that were selected, one of them without a trace pair; an anchor is the longest trace sequence."""
    both = {"prompt": [5, 6], "chosen": [7], "rejected": [8, 9, 9], "empty_prompt": [5], "empty_chosen": [7]}
    both |= {"empty_rejected": [1, 2], "anchor_chosen": [[1], [1, 2, 3, 44]], "anchor_rejected": [[1, 1]], "length": 5}
    none: dict[str, Any] = {"prompt": [], "chosen": [], "rejected": [], "anchor_chosen": [], "anchor_rejected": []}
    one_sided = {**both, **none, "empty_prompt": [1] * 9}
    large = {**both, "chosen": [99] * 50}
    rows = datasets.Dataset.from_list([both, large, both, one_sided])
    assert RowSizes.of(rows.select([0, 2, 3]), ids=True) == RowSizes({"trace": (3, 6), "empty": (2, 11)}, 44)
    assert RowSizes.of(rows, ids=True) == RowSizes({"trace": (3, 52), "empty": (2, 11)}, 99)
    assert RowSizes.of(rows.select([3]), ids=False) == RowSizes({"empty": (10, 11)}, None)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(**SMALL, **IDS, state_size=4),
        Mamba2Config(**SMALL, **IDS, state_size=4, num_heads=4, head_dim=16, n_groups=1),
        RwkvConfig(**SMALL, **IDS, context_length=16),
    ],
    ids=["mamba", "mamba2", "rwkv"],
)
@pytest.mark.filterwarnings("ignore:.*sequences are padded")
def test_models_without_attention_train_padded(
    config: PretrainedConfig,
    save: Save,
    verdicts: Verdicts,
    pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their memory is estimated roughly, and the doctor says so."""
    folder = save(config)
    shape = model_shape(str(folder))
    assert shape.heads == shape.attention_width == shape.key_width == 0 and not shape.packs and shape.positions is None
    assert verdicts(folder, f"--data.train={pairs_file}")[::2] == (0, [])
    given = [f"--model.policy={folder}", f"--data.train={pairs_file}", "--trainer.accelerator=cpu", "--json"]
    assert doctor.main(given) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert "roughly: the model's layers have no attention" in checks["memory"]["found"]
    assert checks["labels"]["status"] == checks["start"]["status"] == "pass"


def test_the_widest_layer_counts_where_each_has_its_own(tmp_path: Path) -> None:
    config = Gemma3nTextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=[48, 64],
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_kv_shared_layers=0,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    config.save_pretrained(tmp_path)
    assert model_shape(str(tmp_path)).intermediate == 64


def test_a_model_of_another_kind_is_said_in_one_line(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be loaded: Unrecognized configuration class .*CausalLM\.$") as found:
        model_shape(str(tmp_path))
    assert "\n" not in str(found.value)
