"""Where and with what a result was measured."""

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device, threads: int) -> dict:
    hardware = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": threads}
    if device.type == "cuda":
        hardware |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "driver": _driver()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")}
    commit = _output("git", "-C", ROOT, "rev-parse", "HEAD")
    dirty = bool(_output("git", "-C", ROOT, "status", "--porcelain")) if commit else None
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "device": device.type, "hardware": hardware, "versions": versions, "date": date,
        "git": {"commit": commit, "dirty": dirty},
    }  # fmt: skip


def title(environment: dict) -> str:
    hardware, versions, git = (environment[key] for key in ("hardware", "versions", "git"))
    machine = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    commit = (git["commit"] or "unknown")[:10] + (" with local changes" if git["dirty"] else "")
    software = f"torch {versions['torch']}, triton {versions['triton']}"
    return f"{machine}; {software}; {environment['date'][:10]}, commit {commit}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _driver() -> str:
    return next(iter(_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()), "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str | Path) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
