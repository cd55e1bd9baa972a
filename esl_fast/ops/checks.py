"""One clear error for each kind of bad input."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from esl_fast._eager import is_eager

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a floating-point torch.Tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {x.dtype}; expected a floating-point tensor of 16, 32 or 64 bits")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; expected a dense tensor")


def one_of(name: str, value: Any, accepted: Iterable[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def number(name: str, value: Any) -> float:
    """A real number of any kind."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected a number")
    return float(value)


def scalar(name: str, value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One real value, as a tensor ``()`` of ``dtype`` on ``device``; differentiable where it is a tensor."""
    if not isinstance(value, Tensor):  # written on the device: a copy would be waited for
        return torch.full((), number(name, value), dtype=dtype, device=device)
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; expected one real value")
    return value.reshape(()).to(device, dtype)


def count_of(name: str, value: Any) -> int:
    """A positive integer of any kind, as an int."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a positive integer")
    return int(value)


def integers(name: str, x: Tensor, count: int, meaning: str) -> None:
    """``x (count,)`` integers; an error says what they mean."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected an integer torch.Tensor")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {x.dtype}; expected ({count},) integers, {meaning}")
    if x.shape != (count,):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({count},) integers, {meaning}")


def matrix(name: str, x: Tensor, width: int | None = None) -> None:
    """A floating-point matrix, of ``width`` columns if given."""
    floating(name, x)
    if x.ndim != 2 or (width is not None and x.shape[1] != width):
        expected = f"(n, {'width' if width is None else width})"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {expected}")


def shape(name: str, x: Tensor, *sizes: int | str) -> None:
    """``x`` has these sizes; where any will do, a letter stands for it."""
    if x.ndim != len(sizes) or any(isinstance(size, int) and size != n for size, n in zip(sizes, x.shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({', '.join(map(str, sizes))})")


def same_device(**tensors: Tensor) -> None:
    devices = {name: t.device for name, t in tensors.items()}
    first, *others = devices.values()
    if any(device != first for device in others):
        raise ValueError("tensors lie on different devices: " + ", ".join(f"{k} on {v}" for k, v in devices.items()))


def finite(name: str, x: Tensor, *, wait: bool = False) -> None:
    """No NaN or infinity in ``x (n, ...)``; without ``wait`` on a CPU only, where it needs no synchronisation."""
    if (x.device.type != "cpu" and not wait) or not is_eager():
        return
    # The sum is finite unless a term is not (or it overflows, which the exact check below clears).
    if torch.isfinite(x.detach().sum()):
        return
    bad = (~torch.isfinite(x.detach())).reshape(x.shape[0], -1).any(-1).nonzero().flatten()
    if bad.numel():
        rows = ", ".join(map(str, bad[:10].tolist())) + (", ..." if bad.numel() > 10 else "")
        raise ValueError(f"{name} has non-finite values in {bad.numel()} of {x.shape[0]} rows: {rows}")


def finite_sequences(name: str, x: Tensor, lengths: Tensor | None, *, wait: bool = False) -> None:
    """As :func:`finite` for ``x (n, L, U)``, of whose L vectors those from ``lengths (n,)`` on are padding."""
    if (x.device.type != "cpu" and not wait) or torch.isfinite(x.sum()):
        return
    found = torch.zeros(len(x))
    positions = torch.arange(x.shape[1], device=x.device)
    for first in range(0, len(x), 64):
        rows = slice(first, first + 64)
        real = x[rows].isfinite().all(-1)
        if lengths is not None:
            real |= positions >= lengths[rows, None].to(x.device)
        found[rows] = torch.where(real.all(1), 0.0, torch.nan)
    finite(name, found)


def owners_of(owners: Tensor, images: int, captions: int) -> None:
    """``owners (M,)`` integer, one image index a caption; on a GPU their range is left to :func:`owners_within`."""
    integers("owners", owners, captions, "the image index of each caption")
    if owners.device.type == "cpu":
        owners_within(owners, images)


def owners_within(owners: Tensor, images: int) -> None:
    """Every owner is one of ``images``; waits for a GPU."""
    if len(owners) and not (int(owners.min()) >= 0 and int(owners.max()) < images):
        given = f"{int(owners.min())}..{int(owners.max())}"
        expected = f"image indices 0..{images - 1}" if images else "no captions, as there are no images"
        raise ValueError(f"owners holds {given}; expected {expected}")


def ids_of(image_ids: Tensor | None, text_ids: Tensor | None, images: int, texts: int, device: torch.device) -> None:
    """Both ``(images,)`` and ``(texts,)`` integers on ``device``, or neither given."""
    if (image_ids is None) != (text_ids is None):
        raise ValueError("image_ids and text_ids go together; only one was given")
    for name, ids, count in (("image_ids", image_ids, images), ("text_ids", text_ids, texts)):
        if ids is None:
            continue
        integers(name, ids, count, "what pairs share")
        if ids.device != device:
            raise ValueError(f"{name} lies on {ids.device}, the scores on {device}")


def lengths_of(name: str, lengths: Tensor, count: int, longest: int, item: str, parts: str) -> None:
    """``lengths (count,)`` integers, how many real ``parts`` each ``item`` has; on a CPU 1 to ``longest``."""
    integers(name, lengths, count, f"one a {item}")
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or count == 0:
        return
    for worst in (int(lengths.argmin()), int(lengths.argmax())):
        found = int(lengths[worst])
        if not 1 <= found <= longest:
            raise ValueError(f"{item} {worst} has {found or 'no'} {parts} ({name}); expected 1..{longest}")
