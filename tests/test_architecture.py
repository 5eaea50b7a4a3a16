"""Imports run downwards only, and the maths knows neither Lightning nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bvpo"
LAYERS = [  # a file imports from the lines above its own only
    ["cell", "errors", "math_check", "ranks", "slices", "tasks"],
    [
        "armorm",
        "batches",
        "checkpoints",
        "decoding",
        "gradients",
        "journal",
        "kv_cache",
        "lora",
        "losses",
        "machine",
        "moments",
        "order",
    ],
    ["optimization", "remote", "run_log", "sharded_checkpoints", "stopping", "traces"],
    ["generation", "head", "model_card", "packing", "pairing", "reading"],
    ["attention_kernels", "benchmark", "derived_pairs", "response_variance", "row_writer", "selection"],
    ["anchor", "attention", "backends", "mixing", "prompts", "rows", "sample_report", "window"],
    ["alpaca_eval", "arena_hard", "benchmark_scores", "held_out", "maths"],
    ["evaluation_report", "packed", "pairs"],
    ["monitor", "oracle", "policy", "row_faults"],
    ["engines", "reward_models", "shapes", "sharding"],
    ["compatibility", "row_sizes", "throughput"],
    [
        "compatibility",
        "data",
        "memory",
        "records",
        "reference",
        "reference_cache",
        "rewards",
        "sampling_settings",
        "task_accuracy",
    ],
    ["models", "passes", "sampling"],
    ["checks", "inspection", "module", "sampler"],
    ["budget", "doctor_report", "model_checks", "report", "runs", "sampled_rows"],
    ["ablation_table", "analysis", "commands"],
    ["derive", "export", "fit", "plots", "sample", "stochasticity"],
    ["doctor", "evaluated_policy", "grid"],
    ["evaluation", "grid_run"],
    ["ablate", "evaluate"],
    ["assets.build_tiny_reasoner"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    """The package's own files that a file imports."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {node.module.removeprefix("bvpo.") for node in found if node.module and node.module.startswith("bvpo.")}
    return names | {name.name for node in found if node.module == "bvpo" for name in node.names if name.name in FILES}


def test_every_file_has_its_place() -> None:
    assert FILES.keys() == LEVEL.keys()


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name: str) -> None:
    for imported in imports(FILES[name]):
        assert LEVEL[imported] < LEVEL[name], f"{name} imports {imported}"


def test_the_maths_imports_neither_lightning_nor_transformers() -> None:
    """Nor does anything that it imports: asked of a fresh interpreter, with torchmetrics for the window's shell."""
    program = (
        "import sys, bvpo.losses, bvpo.gradients, bvpo.moments, bvpo.mixing, bvpo.oracle\n"
        "print([name for name in ('lightning', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
