"""The whole tree passes the linter."""

import subprocess
import sys
from pathlib import Path


def test_ruff():
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
