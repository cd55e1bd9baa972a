"""The tree as a whole: its style, what its README says, what a wheel would hold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


def test_ruff():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks[:-1]:  # the last one reads checkpoints that are not there
        exec(block, names)
    assert "load_checkpoint" in blocks[-1]
    assert len(blocks) >= 3


def test_wheel_holds_every_file(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    packaged = set()
    for package in given["packages"]:
        folder = ROOT / package.replace(".", "/")
        for pattern in ("*.py", *given["package_data"].get(package, ())):
            packaged |= set(folder.glob(pattern))
    present = {p for p in (ROOT / "esl_fast").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert present == packaged
    for target in given["entry_points"]["console_scripts"]:
        module, _, name = target.partition("=")[2].strip().partition(":")
        assert callable(getattr(pytest.importorskip(module), name))
