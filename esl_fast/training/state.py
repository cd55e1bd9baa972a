"""What a run needs beside the model to go on exactly where it stopped, as tensors and JSON."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TENSORS, PROGRESS = "training.safetensors", "training.json"


def write_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Optimizer state by parameter name, random number generators, and ``progress`` (plain data)."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / TENSORS)
    (folder / PROGRESS).write_text(json.dumps({"progress": progress, "python_rng": random.getstate()}))


def _placed_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment in the memory format of its parameter: fused optimizers walk both alike."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def read_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what :func:`write_state` wrote; returns ``progress``."""
    tensors = load_file(folder / TENSORS)
    saved = json.loads((folder / PROGRESS).read_text())
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            optimizer.state[parameter] = {key: _placed_like(parameter, value) for key, value in state.items()}
    torch.set_rng_state(tensors["rng.torch"])
    cuda = [tensors[f"rng.cuda.{i}"] for i in range(torch.cuda.device_count()) if f"rng.cuda.{i}" in tensors]
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    version, internal, gauss = saved["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    return saved["progress"]
