"""The memory estimate: by hand, from rows and from a plan, for published sizes, and against what a fit allocates."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from bvpo import doctor, fit, head
from bvpo.budget import products_of, sketches_of, units_of
from bvpo.errors import UserError
from bvpo.gradients import Sketch
from bvpo.machine import Machine, format_bytes, machine_of, parse_bytes
from bvpo.memory import EIGHT_BIT, MemoryFacts, memory_estimate
from bvpo.mixing import Fixed, MixingPolicy, Optimal
from bvpo.model_checks import check_memory
from bvpo.module import BVPO
from bvpo.shapes import BatchShape, ModelShape, model_shape
from tests.conftest import EOS, make_rows, write_rows

ROOT = Path(__file__).parent.parent

# An embedding and a head of 40 · 8 = 320 numbers, a final norm of 8, and 2 layers of 176.
SHAPE = ModelShape(
    parameters=1000,
    largest=400,
    layers=2,
    hidden=8,
    intermediate=16,
    heads=2,
    attention_width=8,
    key_width=4,
    vocabulary=40,
    borders=100,
)
PADDED = MemoryFacts(SHAPE, BatchShape(sequences=4, tokens=10, scored=6, completion_tokens=20), gpu=False)
PACKED = replace(PADDED, batch=replace(PADDED.batch, row=32))


def test_a_packed_row_by_hand() -> None:
    estimate = memory_estimate(PACKED)
    assert (estimate.parameters, estimate.reference, estimate.optimizer) == (4000, 4000, 8000)
    assert estimate.gradients == 4000 + 4 * 400  # the mixture, and the largest parameter's own gradient
    # 2 layers · 32 tokens · (2 norms · 12 bytes · 8 + 4 bytes · (3.5 · 8 + 3 · 4 + 4 · 16)), and a norm at the end
    assert estimate.activations == 2 * 32 * (192 + 416) + 32 * 12 * 8
    assert estimate.layer == 32 * (3 * 16 * 4 + 2 * 4 * 8)  # three gradients as wide as the MLP, two of the norm
    # 20 tokens · 40 words · (4 bytes kept + 4 of a log-softmax + 4 of its gradient), 20 hidden states and gradients
    assert estimate.logits == 20 * 40 * 12 + 2 * 20 * 8 * 4
    assert estimate.statistics == estimate.casts == estimate.buckets == estimate.gathered == estimate.reduction == 0
    assert estimate.total == 4000 + 4000 + 5600 + 8000 + 41984 + 10880


def test_padded_sequences_by_hand() -> None:
    estimate = memory_estimate(PADDED)
    # 2 layers · 40 tokens · (192 + 4 bytes · (5 · 8 + 4 · 16)), a norm at the end, and a mask of 4 · 10 · 10
    assert estimate.activations == 2 * 40 * (192 + 416) + 40 * 96 + 400
    # 40 words · (4 · 6 logits · 4 bytes + 20 scored tokens · (4 kept + 4 picked + 4 log-softmax of the reference))
    assert estimate.logits == 40 * (96 + 240)
    eager = memory_estimate(replace(PADDED, model=replace(SHAPE, eager_attention=True)))
    assert eager.activations == estimate.activations + 2 * 400 * 2 * 8  # layers · squares · heads · (fp32 and its copy)


def test_the_estimate_follows_the_configuration() -> None:
    whole = memory_estimate(PACKED)
    mixed, true = (memory_estimate(replace(PACKED, precision=p)) for p in ("bf16-mixed", "bf16-true"))
    assert mixed.parameters == 4000 and mixed.casts == 2 * (1000 - 320) and mixed.activations < whole.activations
    assert true.parameters == 2000 and true.optimizer == 4000 and true.casts == 0
    assert memory_estimate(replace(PACKED, reference=False)).reference == 0
    assert memory_estimate(replace(PACKED, eight_bit=True)).optimizer == round(1000 * EIGHT_BIT) == 2031
    assert memory_estimate(replace(PACKED, sketches=3, sketch_width=100)).statistics == 3 * 100 * 4 + 4 * 1000
    products = replace(PACKED, sketches=3, sketch_width=100, products=16)
    assert memory_estimate(products).statistics == 3 * 100 * 4 + 16 * 8 + 4 * 1000
    checkpointed = memory_estimate(replace(PACKED, checkpointing=True))
    assert checkpointed.activations == 2 * 32 * 8 * 4 + 32 * 96  # each layer's input, and the norm at the end
    assert checkpointed.layer == 32 * 608 + whole.layer


def test_ranks_share_or_copy() -> None:
    """DDP holds all on each rank and a copy of the gradients; FSDP2 a share, and what is gathered at a time."""
    alone, copied = memory_estimate(PACKED), memory_estimate(replace(PACKED, ranks=8))
    assert copied.total == alone.total + 4000 and copied.buckets == 4000
    mixed = replace(PACKED, precision="bf16-mixed", ranks=8, sharded=True)
    shared = memory_estimate(mixed)
    assert (shared.parameters, shared.reference, shared.optimizer) == (500, 500, 1000)
    assert shared.gathered == 2 * (320 + 320 + 8 + 2 * 176) and shared.casts == 0  # in bf16: the root and two layers
    assert shared.gradients == 500 + 2 * 400
    assert shared.reduction == 648 * (2 + 4) - 800  # in bf16 and to be summed in fp32; one of them is counted above
    assert memory_estimate(replace(mixed, reshard=False)).gathered == 2 * 1000
    offloaded = memory_estimate(replace(mixed, offload=True))
    assert (offloaded.parameters, offloaded.reference, offloaded.optimizer) == (0, 0, 0)
    assert offloaded.host == 500 + 500 + 500 + 1000
    assert offloaded.total == shared.total - offloaded.host


def test_an_adapter_has_small_gradients() -> None:
    """Rank 2 on matrices with 100 inputs and outputs: 200 numbers; the head's weight has no gradient to sum.

    Norms keep their input alone. In bf16-true each adapter keeps its matrix's input in fp32: five a layer come from
    norms, one from attention, and one from the MLP; these two were kept in bf16.
    """
    facts = replace(PACKED, precision="bf16-mixed", adapter=2, reference=False)
    estimate, full = memory_estimate(facts), memory_estimate(replace(facts, adapter=None))
    assert (estimate.parameters, estimate.optimizer, estimate.gradients) == (4800, 1600, 1600)
    assert estimate.activations == full.activations - (2 * 2 + 1) * 32 * 4 * 8  # norms · tokens · the fp32 input's copy
    true = memory_estimate(replace(facts, precision="bf16-true"))
    kept = 2 * 4 * 8 + 2 * (40 + 64) + 4 * (5 * 8 + 8 + 16) - 2 * (8 + 16)
    assert (true.parameters, true.activations) == (2 * 1000 + 4 * 200, 2 * 32 * kept + 32 * 4 * 8)
    assert memory_estimate(replace(facts, ranks=4, sharded=True)).reduction == 0


def test_a_large_softmax_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = memory_estimate(PACKED).logits
    monkeypatch.setattr(head, "KEPT", 0)
    assert memory_estimate(PACKED).logits == kept - 20 * 40 * 4


# --- The machine ------------------------------------------------------------------------------------------------------


def test_bytes_are_read_and_written() -> None:
    assert parse_bytes("80GiB") == 80 * 2**30 and parse_bytes("1.5 GB") == 1_500_000_000 and parse_bytes("7") == 7
    assert [format_bytes(n) for n in (7, 2048, 3 * 2**30)] == ["7 bytes", "2.0 KiB", "3.0 GiB"]
    for wrong in ("", "80 apples", "-1GiB", "0GiB", "GiB"):
        with pytest.raises(UserError, match="give a number with a unit"):
            parse_bytes(wrong)


def test_memory_is_compared_with_the_device() -> None:
    estimate = memory_estimate(PADDED)
    need = estimate.total
    machine = Machine(gpu=True, ranks=1, ranks_here=1, sharded=False, memory=2 * need, where="given")
    assert check_memory(estimate, machine).status == "pass"
    assert check_memory(estimate, replace(machine, memory=need + 1)).status == "warn"
    assert check_memory(estimate, replace(machine, memory=need - 1)).status == "fail"
    assert check_memory(estimate, replace(machine, ranks_here=3)).status == "fail"
    assert check_memory(estimate, replace(machine, memory=None)).status == "skipped"


def test_the_advice_is_for_the_largest_part() -> None:
    machine = Machine(gpu=True, ranks=1, ranks_here=1, sharded=False, memory=1, where="given")
    assert "activation_checkpointing" in check_memory(memory_estimate(PADDED), machine).advice
    few = replace(PADDED, batch=BatchShape(2, 1, 1, 1, row=2))
    assert "fsdp2" in check_memory(memory_estimate(few), machine).advice


@pytest.mark.parametrize(
    ("devices", "nodes", "ranks"), [(8, 1, 8), ("4", 2, 8), ([0, 2], 1, 2), ("0,1,", 1, 2), ("auto", 1, 1), (-1, 2, 2)]
)
def test_ranks_are_read_off_the_trainers_options(devices: Any, nodes: int, ranks: int) -> None:
    trainer = SimpleNamespace(devices=devices, num_nodes=nodes, accelerator="cpu", strategy="auto")
    machine = machine_of(trainer, "1GiB")
    assert (machine.ranks, machine.ranks_here, machine.sharded) == (ranks, ranks // nodes, False)


def test_sharding_is_read_off_the_strategy() -> None:
    trainer = SimpleNamespace(devices=8, num_nodes=1, accelerator="gpu", strategy="ddp")
    assert not machine_of(trainer, "1GiB").sharded
    trainer.strategy = "fsdp2"
    machine = machine_of(trainer, "1GiB")
    assert machine.sharded and machine.reshard and not machine.offload
    options = {"reshard_after_forward": False, "cpu_offload": True}
    trainer.strategy = SimpleNamespace(class_path="bvpo.sharding.FSDP2", init_args=options)
    machine = machine_of(trainer, "1GiB")
    assert machine.sharded and not machine.reshard and machine.offload
    trainer.strategy = SimpleNamespace(class_path="lightning.pytorch.strategies.ModelParallelStrategy")
    assert machine_of(trainer, "1GiB").sharded


# --- The statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "mixing",
    [Fixed(window=5), Optimal(window=5, per_group=True), Optimal(window=5, anchor="marginal", per_group=True)],
    ids=["one group", "groups", "groups and anchor"],
)
def test_the_statistics_are_what_the_monitor_keeps(
    mixing: MixingPolicy, accumulate: int, ranks: int, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number by number, of ranks that each have units of their own; those of the running step aside."""
    module = BVPO(policy=str(llama_folder), accumulate=accumulate, mixing=mixing, sketch_size=10**9)
    monkeypatch.setattr("bvpo.ranks.count", lambda: ranks)
    module.configure_model()
    assert module.monitor is not None
    windows = [own for own in (module.monitor.window, module.monitor.anchored) if own is not None]
    machine = Machine(gpu=False, ranks=ranks, ranks_here=ranks, sharded=False, memory=None, where="")
    units = units_of(module, False, machine)
    running = len(windows[-1].vectors) * accumulate + 2
    kept = (sketches_of(module, units) - running) * module.shape.parameters
    assert kept == sum(own.vectors.numel() for own in windows)
    assert products_of(module, units, module.shape) == sum(own.grams.numel() for own in windows)


def test_units_grow_with_ranks_that_share_nothing() -> None:
    module = BVPO(accumulate=4)
    alone = Machine(gpu=True, ranks=1, ranks_here=1, sharded=False, memory=None, where="")
    assert [units_of(module, bucketed, alone) for bucketed in (False, True)] == [4, 1]
    copied = replace(alone, ranks=8)
    assert [units_of(module, bucketed, copied) for bucketed in (False, True)] == [32, 1]
    assert units_of(module, False, replace(copied, sharded=True)) == 4
    assert sketches_of(BVPO(mixing=Fixed(window=0)), 4) == products_of(BVPO(mixing=Fixed(window=0)), 4, SHAPE) == 0


def test_the_doctor_counts_the_units_of_all_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sketch a unit and estimator, and their products: 2 estimators, 16 steps of 4 microbatches, on 1 or 8 ranks."""
    folder = config_folder(tmp_path / "model", PUBLISHED["R1-Distill-Qwen-1.5B"])
    given = ["--plan", "--json", f"--model.policy={folder}", "--data.train=nowhere.parquet", "--data.max_length=512"]
    given += ["--model.accumulate=4", "--model.mixing.window=16", "--device_memory=1TB", "--trainer.accelerator=gpu"]
    found = []
    for devices in (1, 8):
        assert doctor.main([*given, "--trainer.strategy=ddp", f"--trainer.devices={devices}"]) == 0
        found.append(json.loads(capsys.readouterr().out)["memory"]["statistics"])
    width = Sketch(10**9).width
    assert found[1] - found[0] == 2 * 16 * 4 * 7 * width * 4 + 4 * (16 * 4) ** 2 * (8**2 - 1) * 8


# --- From a configuration ---------------------------------------------------------------------------------------------


@pytest.fixture
def ask(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The doctor's document for the random Llama, without its model checks."""

    def call(*options: str) -> dict[str, Any]:
        given = [f"--model.policy={llama_folder}", "--trainer.accelerator=cpu", "--json", *options]
        assert doctor.main(given) in (0, 1), capsys.readouterr().err
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return call


def rows_of(lengths: list[tuple[int, int, int]], path: Path) -> Path:
    """Rows by tokens of their trace pair's prompt, chosen and rejected; a word and the space behind it are two."""
    rows = []
    for row, (prompt, *completions) in zip(make_rows(len(lengths)), lengths, strict=True):
        sides = {"prompt": "w1 " * (prompt // 2)}
        for side, count, word in zip(("chosen", "rejected"), completions, ("w5", "w6"), strict=True):
            left = count - 7  # beside the trace of six tokens, and the EOS
            sides[side] = "<think> w4 </think> " + f"{word} " * (left // 2) + word * (left % 2) + EOS
        rows.append(row | sides)
    return write_rows(path, rows)


def test_the_largest_microbatch_of_real_rows(ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Two rows of prompt + chosen + rejected = 10 + 40 + 20 and 4 + 30 + 30 tokens go through the model at once: 134.

    Packed or padded is seen in the activations: 134 tokens of a row, or 4 sequences of 50.
    """
    rows = rows_of([(10, 40, 20), (4, 30, 30), (4, 10, 10), (2, 20, 8)], tmp_path / "rows.jsonl")
    options = [f"--data.train={rows}", "--model_checks=false", "--rows=0", "--data.batch_size=2"]
    packed = ask(*options)["memory"]["activations"]
    assert packed % 134 == 0 and packed < ask(*options, "--model.packing=off")["memory"]["activations"]
    for limit, tokens in ((90, 90), (1, 70)):  # parts of so many tokens at most, padding included; no pair is cut
        assert ask(*options, f"--data.max_tokens={limit}")["memory"]["activations"] * 134 == packed * tokens


def config_folder(folder: Path, config: Any) -> Path:
    config.save_pretrained(folder)
    return folder


def test_a_plan_needs_config_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No weights, no tokenizer, no rows; a configuration that does not fit is a failed check."""
    folder = config_folder(tmp_path / "large", PUBLISHED["R1-Distill-Qwen-7B"])
    given = ["--plan", "--json", f"--model.policy={folder}", "--data.train=nowhere.parquet", "--data.max_length=4096"]
    given += ["--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed", "--device_memory=80GB"]
    assert doctor.main(given) == 1
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == {"checks", "memory", "ranks"} and document["ranks"] == 1
    assert document["checks"][0]["status"] == "fail" and document["memory"]["parameters"] == 4 * 7_615_616_512
    shared = [*given, "--trainer.strategy=fsdp2", "--trainer.devices=8", "--model.activation_checkpointing=true"]
    assert doctor.main([*shared, "--data.batch_size=1"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["parameters"] == 4 * 7_615_616_512 // 8
    assert doctor.main([option for option in shared if option != "--json"]) in (0, 1)
    out = capsys.readouterr().out
    assert "Memory of each of 8 ranks" in out and "gathered parameters" in out and "% of 74.5 GiB" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.policy=builtin:tiny_reasoner"], "--plan needs data.max_length"),
        (["--model.policy=no/such/folder/here", "--data.max_length=64"], "the model's configuration cannot be loaded"),
    ],
)
def test_a_plan_that_cannot_be_made(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--plan", "--trainer.accelerator=cpu", *options]) == 2
    assert said in capsys.readouterr().err


# --- Published sizes --------------------------------------------------------------------------------------------------


def qwen2(hidden: int, layers: int, heads: int, groups: int, intermediate: int, vocabulary: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )


PUBLISHED: dict[str, Any] = {
    "R1-Distill-Qwen-1.5B": qwen2(1536, 28, 12, 2, 8960, 151_936),
    "R1-Distill-Qwen-7B": qwen2(3584, 28, 28, 4, 18_944, 152_064),
    "R1-Distill-Qwen-32B": qwen2(5120, 64, 40, 8, 27_648, 152_064),
    "R1-0528-Qwen3-8B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    ),
    "R1-Distill-Llama-70B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    ),
}
# The Hub's own counts, in 10⁶ parameters.
COUNTS = {
    "R1-Distill-Qwen-1.5B": 1777.1,
    "R1-Distill-Qwen-7B": 7615.6,
    "R1-Distill-Qwen-32B": 32763.9,
    "R1-0528-Qwen3-8B": 8190.7,
    "R1-Distill-Llama-70B": 70553.7,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name: str, tmp_path: Path) -> None:
    shape = model_shape(str(config_folder(tmp_path / "model", PUBLISHED[name])))
    assert shape.parameters / 1e6 == pytest.approx(COUNTS[name], abs=0.06)
    assert shape.root + shape.layer * shape.layers == shape.parameters
    assert shape.packs and not shape.tied and shape.rotary


SCALE = {
    "r1_distill_qwen_1.5b": "R1-Distill-Qwen-1.5B",
    "r1_distill_qwen_7b": "R1-Distill-Qwen-7B",
    "r1_0528_qwen3_8b": "R1-0528-Qwen3-8B",
    "r1_distill_qwen_32b": "R1-Distill-Qwen-32B",
    "r1_distill_llama_70b": "R1-Distill-Llama-70B",
}


@pytest.mark.parametrize("name", SCALE)
def test_the_budgets_in_the_configs_are_the_doctors(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`30.9 in all, 39% of 80` at the head of experiments/scale/NAME.yaml, in GB."""
    config = ROOT / "experiments" / "scale" / f"{name}.yaml"
    stated = re.search(r"([\d.]+) in all, (\d+)% of 80", config.read_text())
    assert stated is not None
    folder = config_folder(tmp_path / "model", PUBLISHED[SCALE[name]])
    configs = [f"--config={ROOT / 'experiments' / 'alpaca.yaml'}", f"--config={config}"]
    assert doctor.main(["--plan", "--json", *configs, f"--model.policy={folder}", "--device_memory=80GB"]) == 0
    total = json.loads(capsys.readouterr().out)["memory"]["total"]
    assert (f"{total / 1e9:.1f}", f"{total / 80e9:.0%}") == (stated[1], f"{stated[2]}%")


# --- As measured ------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, out)):
            if isinstance(value, Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, size: int) -> None:
        self.live -= size


def equal_rows(path: Path, words: int) -> Path:
    """Rows whose sequences are equally long, so that every microbatch is the largest one."""
    trace = "w3 " * words
    return write_rows(
        path,
        [
            {
                **row,
                "prompt": "w1 w2 ",
                "chosen": f"<think> {trace}</think> w1{EOS}",
                "rejected": f"<think> {trace}</think> w2{EOS}",
            }
            for row in make_rows(8)
        ],
    )


def measured_and_estimated(
    folder: Path, rows: Path, root: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, int]:
    """Bytes of a fit of two steps: the peak of all tensors, and the doctor's estimate."""
    given = [f"--model.policy={folder}", f"--data.train={rows}", "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    given += [f"--trainer.default_root_dir={root}", "--trainer.enable_progress_bar=false", *options]
    capsys.readouterr()
    assert doctor.main([*given, "--json", "--model_checks=false"]) == 0
    estimate = json.loads(capsys.readouterr().out)["memory"]["total"]
    with LiveBytes() as live:
        assert fit.main([*given, "--checkpoint.save_last=false"]) == 0
    return live.peak, estimate


def show(capsys: pytest.CaptureFixture[str], options: Sequence[str], peak: int, estimate: int) -> None:
    with capsys.disabled():
        print(f"\n{' '.join(option.split('.')[-1] for option in options)}:", end=" ")
        print(f"measured {peak / 2**20:.1f} MiB, estimated {estimate / 2**20:.1f}, ratio {estimate / peak:.2f}")


def test_the_estimate_is_near_what_a_fit_allocates(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within a fifth, tokens outweighing parameters: a formula by layers knows no view, copy or cast of one model."""
    rows = equal_rows(tmp_path / "rows.jsonl", words=200)
    for packing in ("auto", "off"):
        options = ["--data.batch_size=2", f"--model.packing={packing}"]
        peak, estimate = measured_and_estimated(llama_folder, rows, tmp_path, capsys, *options)
        assert 0.8 < estimate / peak < 1.25


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a Llama of 7.8 million parameters, and rows of pairs with 1,010 tokens."""
    folder = tmp_path_factory.mktemp("middle")
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    equal_rows(folder / "rows.jsonl", words=250)
    return folder


TWO_MICROBATCHES = (
    "--data.batch_size=2",
    "--model.accumulate=2",
)  # a mixed gradient is there when the second one comes


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--model.activation_checkpointing=true",),
        ("--model.packing=off",),
        ("--model.packing=off", "--model.activation_checkpointing=true"),
        ("--model.reference_logps=cached", "--data.max_tokens=1100"),
        ("--model.lora.rank=16", "--model.reference_logps=adapter"),
        ("--model.lora.rank=16", "--model.reference_logps=adapter", "--model.activation_checkpointing=true"),
    ],
    ids=lambda options: " ".join(option.split(".")[-1] for option in options) or "live",
)
def test_the_estimate_over_options(
    precision: str, options: tuple[str, ...], middle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*TWO_MICROBATCHES, f"--trainer.precision={precision}", *options]
    peak, estimate = measured_and_estimated(middle / "llama", middle / "rows.jsonl", tmp_path, capsys, *given)
    show(capsys, given, peak, estimate)
    assert 0.9 < estimate / peak < 1.15


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_estimate_is_near_what_a_larger_fit_allocates(
    precision: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 million parameters, which outweigh 310 tokens."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    rows = equal_rows(tmp_path / "rows.jsonl", words=150)
    options = ["--data.batch_size=1", "--model.accumulate=2", f"--trainer.precision={precision}"]
    peak, estimate = measured_and_estimated(tmp_path / "llama", rows, tmp_path, capsys, *options)
    show(capsys, options, peak, estimate)
    assert 0.9 < estimate / peak < 1.15


# Tensors that FSDP2 frees on gloo's threads escape torch's own counting; resident memory does not.
RESIDENT = """
import sys
from pathlib import Path

import torch

from bvpo import fit


def resident(key):
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(key)).split()[1]) * 1024


torch.set_num_threads(1)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
code = fit.main(sys.argv[1:])
print(f"peak {resident('VmHWM') - before}", flush=True)
sys.exit(code)
"""


def resident_peaks(middle: Path, root: Path, *options: str) -> list[int]:
    """Bytes of resident memory above those before the fit, the most, of each rank."""
    program = root / "resident.py"
    program.write_text(RESIDENT)
    given = [f"--model.policy={middle / 'llama'}", f"--data.train={middle / 'rows.jsonl'}", "--trainer.max_steps=2"]
    given += [f"--trainer.default_root_dir={root}", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    immediate = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_ARENA_MAX": "1"}  # what is freed goes back to the system
    environment = os.environ | immediate | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(root / "datasets")}
    command = [sys.executable, str(program), *given, "--checkpoint.save_last=false", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_estimate_on_two_ranks(
    strategy: str, checkpointing: str, middle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one process has beside its tensors is taken off: its peak less its estimate, which is measured above."""
    options = [*TWO_MICROBATCHES, "--model.reference_logps=cached", f"--model.activation_checkpointing={checkpointing}"]
    two = [*options, f"--trainer.strategy={strategy}", "--trainer.devices=2"]
    totals = []
    for own in (options, two):
        given = [f"--model.policy={middle / 'llama'}", f"--data.train={middle / 'rows.jsonl'}", *own]
        assert doctor.main([*given, "--trainer.accelerator=cpu", "--json", "--model_checks=false"]) == 0
        totals.append(json.loads(capsys.readouterr().out)["memory"]["total"])
    (alone,) = resident_peaks(middle, tmp_path, *options)
    peaks = resident_peaks(middle, tmp_path, *two)
    assert len(peaks) == 2
    ratios = [totals[1] / (peak - (alone - totals[0])) for peak in peaks]
    with capsys.disabled():
        shown = ", ".join(f"{peak / 2**20:.0f}" for peak in [alone, *peaks])
        print(f"\n{strategy} {checkpointing}: alone and 2 ranks {shown} MiB; estimates", end=" ")
        print(", ".join(f"{total / 2**20:.0f}" for total in totals), "ratios", *(f"{ratio:.2f}" for ratio in ratios))
    assert all(0.9 < ratio < 1.15 for ratio in ratios)
