"""What a benchmark's figures were measured with, printed beneath its table and kept in its file.

Files of `results/` are named DATE_BENCHMARK.json; docs/performance.md and docs/results.md say which tables they are of.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "transformers", "datasets", "trl", "liger_kernel")


def circumstances() -> dict[str, Any]:
    """Command, commit, versions and hardware; called before measuring, so that the load is that of others."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join(["python", *(Path(word).name if os.sep in word else word for word in sys.argv)]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": (commit or "none") + " and changes" * bool(changed),
        "versions": {"python": platform.python_version()} | _versions(),
        "hardware": _hardware(),
        "load": round(os.getloadavg()[0], 1),  # processes that want a core
    }


def show(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        shown = ", ".join(f"{key} {number}" for key, number in value.items()) if isinstance(value, dict) else value
        print(f"{name:10} {shown}")


def write(path: str | None, facts: dict[str, Any], figures: dict[str, Any]) -> None:
    """All of it as JSON; no path writes nothing."""
    if path:
        Path(path).write_text(json.dumps(facts | figures, indent=1, ensure_ascii=False) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> str:
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name()}; {cpu}" if torch.cuda.is_available() else cpu
