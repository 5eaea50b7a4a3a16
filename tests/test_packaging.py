"""What an installation gets: every file of the package, also where it is not an editable one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left behind here."""
    source, hidden = tmp_path / "source", shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT / "bvpo", source / "bvpo", ignore=hidden)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("bvpo/")}
    files = {str(path.relative_to(source)) for path in (source / "bvpo").rglob("*") if path.is_file()}
    assert {"bvpo/fit.py", "bvpo/py.typed", "bvpo/assets/build_tiny_reasoner.py"} <= files
    assert held == files
