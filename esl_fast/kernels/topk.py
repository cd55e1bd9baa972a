"""Best gallery items of each query, streaming: a block of scores in scratch, then a selection that mostly only reads.

Selection packs score and index into one 64-bit key that orders by descending score, then ascending index, so that keys
are distinct and the outcome does not depend on the order of the work. A program holds the keys of one query against
one gallery block in registers and, while the largest exceeds the smallest kept, exchanges the two: about
k (1 + ln(G / k)) exchanges a query over a gallery in random order, few of them after the first blocks. `torch.topk`
would need keys for its ties too and reads 64-bit keys several times over; a bitonic merge of every block costs more
than the products; selection inside the product's epilogue would sort 256 columns a tile for nearly every tile.

Paper, Q x G scores: 2 Q G U FLOP, and 8 bytes a score through the scratch. 5,000 queries, 1,000,000 items, U = 1,022,
bf16: 10.2 TFLOP, 12.9 ms at 790 TFLOP/s; 40 GB, 8.4 ms at 4.8 TB/s, of which the writing half overlaps the product.
"""

from collections.abc import Iterable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast.kernels._case import CompileCase
from esl_fast.kernels._common import INTERPRETING, next_power_of_2, on_device_of, padded_rows
from esl_fast.kernels._launch import launch
from esl_fast.kernels._op import op
from esl_fast.kernels.similarity import multiply

QUERY_BLOCK = 64 if INTERPRETING else 4096
GALLERY_BLOCK = 128 if INTERPRETING else 8192
STREAM_BLOCK = 8 * GALLERY_BLOCK
SELECT_WARPS = 8
UNUSED = torch.iinfo(torch.int64).min


@triton.jit(do_not_specialize=["width", "k", "scores_row", "offset"])
def _select_kernel(scores, keys, width, k, scores_row, offset, BLOCK: tl.constexpr, SLOTS: tl.constexpr):
    """Exchange the ``k`` kept keys of a query for better ones among ``width`` scores of items from ``offset`` on."""
    query = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    stride = tl.multiple_of(scores_row.to(tl.int64), 16)
    score = tl.load(scores + query * stride + c, mask=c < stride, other=0.0)  # `width` would make the loads narrow
    score = tl.where(score != score, float("-inf"), score)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - (offset.to(tl.int64) + c))
    lowest = tl.full((), -0x8000000000000000, tl.int64)
    key = tl.where(c < width, key, lowest)

    slot = tl.arange(0, SLOTS)
    slots = keys + query * k + slot
    # Slots past k hold what no key exceeds.
    kept = tl.load(slots, mask=slot < k, other=0x7FFFFFFFFFFFFFFF)
    floor = tl.min(kept, 0)
    top = tl.max(key, 0)
    if top > floor:
        while top > floor:
            kept = tl.where(kept == floor, top, kept)
            key = tl.where(key == top, lowest, key)
            floor = tl.min(kept, 0)
            top = tl.max(key, 0)
        tl.store(slots, kept, mask=slot < k)


@op("topk_update", mutates=("keys",))
def topk_update(keys: Tensor, query_units: Tensor, gallery_units: Tensor, offset: int) -> None:
    """Exchange keys ``(Q, k)`` for better ones among ``gallery_units (G, U)``, items ``offset`` to ``offset + G``.

    A gallery of another dtype is converted to that of the queries block by block.
    """
    (queries, k), gallery = keys.shape, gallery_units.shape[0]
    if not queries or not k or not gallery:
        return
    with on_device_of(query_units):
        rows, width = min(queries, QUERY_BLOCK), min(gallery, GALLERY_BLOCK)
        scratch = padded_rows(rows, width, torch.float32, query_units.device)
        for q in range(0, queries, QUERY_BLOCK):
            block = query_units[q : q + QUERY_BLOCK]
            for g in range(0, gallery, GALLERY_BLOCK):
                items = gallery_units[g : g + GALLERY_BLOCK].to(query_units.dtype)
                multiply(block, items, scratch[: block.shape[0], : items.shape[0]])
                launch(
                    _select_kernel, (block.shape[0], 1, 1),
                    (scratch, keys[q : q + QUERY_BLOCK], items.shape[0], k, scratch.stride(0), offset + g),
                    {"BLOCK": GALLERY_BLOCK, "SLOTS": next_power_of_2(k), "num_warps": SELECT_WARPS},
                )  # fmt: skip


@topk_update.register_fake
def _(keys, query_units, gallery_units, offset):
    return None


def _first_keys(queries: int, k: int, device: torch.device) -> Tensor:
    """Keys below every item's, distinct in each row: ``(queries, k)``."""
    return (torch.arange(k, device=device) + UNUSED).expand(queries, k).contiguous()


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    keys = keys.sort(dim=1, descending=True).values
    ordered = keys >> 32
    bits = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(torch.int32)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


@torch.no_grad()
def topk(query_units: Tensor, gallery_units: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest ``query_units (Q, U) @ gallery_units (G, U)^T`` of each query, descending.

    Returns float32 scores and int64 gallery indices, both ``(Q, k)``. Of equal scores the lower index comes first; NaN
    counts as -inf. Units float32, bfloat16 or float16, any strides, computed in the queries' dtype. No gradient.
    """
    keys = _first_keys(query_units.shape[0], k, query_units.device)
    topk_update(keys, query_units, gallery_units, 0)
    return _decode(keys)


@torch.no_grad()
def topk_stream(query_units: Tensor, gallery_units: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As :func:`topk` for a gallery on the CPU (pageable, pinned or memory-mapped), which need not fit the GPU.

    On a GPU blocks pass through two pinned buffers and are copied on a stream of their own while the previous block is
    scored.
    """
    keys = _first_keys(query_units.shape[0], k, query_units.device)
    blocks = (
        (start, gallery_units[start : start + STREAM_BLOCK]) for start in range(0, gallery_units.shape[0], STREAM_BLOCK)
    )
    with on_device_of(query_units):
        for offset, units in _to_gpu(blocks, query_units.device) if query_units.is_cuda else blocks:
            topk_update(keys, query_units, units, offset)
    return _decode(keys)


class _Slot:
    """One of the two places a block passes through: a pinned buffer and its copy on the GPU."""

    def __init__(self) -> None:
        self.pinned: Tensor | None = None
        self.device: Tensor | None = None
        self.copied = torch.cuda.Event()
        self.used = torch.cuda.Event()

    def copy(self, units: Tensor, device: torch.device, stream: torch.cuda.Stream) -> Tensor:
        """Start copying ``units`` on ``stream``; what comes back is whole once ``copied`` has happened."""
        if self.device is None or self.device.numel() < units.numel() or self.device.dtype != units.dtype:
            self.copied.synchronize()
            self.used.synchronize()
            self.device = torch.empty(units.numel(), dtype=units.dtype, device=device)
            self.pinned = None
        target = self.device[: units.numel()].view(units.shape)
        if not units.is_pinned():
            if self.pinned is None or self.pinned.numel() < units.numel():
                self.pinned = torch.empty(self.device.numel(), dtype=units.dtype, pin_memory=True)
            self.copied.synchronize()  # the last block to pass through the buffer has left it
            units = self.pinned[: units.numel()].view(units.shape).copy_(units)
        with torch.cuda.stream(stream):
            stream.wait_event(self.used)
            target.copy_(units, non_blocking=True)
            self.copied.record(stream)
        return target


def _to_gpu(blocks: Iterable[tuple[int, Tensor]], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """The blocks on ``device``, the next one on its way while the caller uses the current one."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    slots = (_Slot(), _Slot())
    waiting = None
    try:
        for i, (offset, units) in enumerate(blocks):
            slot = slots[i % 2]
            coming = (slot, offset, slot.copy(units, device, stream))
            if waiting is not None:
                yield from _use(*waiting, device)
            waiting = coming
        if waiting is not None:
            yield from _use(*waiting, device)
    finally:  # of a caller who stops early too: its memory must not be given away under a copy
        torch.cuda.current_stream(device).wait_stream(stream)


def _use(slot: _Slot, offset: int, units: Tensor, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    compute = torch.cuda.current_stream(device)
    compute.wait_event(slot.copied)
    yield offset, units
    slot.used.record(compute)


def compile_cases() -> list[CompileCase]:
    queries = 4_096
    return [
        CompileCase(
            name=f"select_4k_x_8k_k{k}",
            kernel=_select_kernel,
            signature={
                "scores": "*fp32",
                "keys": "*i64",
                **dict.fromkeys(("width", "k", "scores_row", "offset"), "i32"),
            },
            constexprs={"BLOCK": GALLERY_BLOCK, "SLOTS": k},
            num_warps=SELECT_WARPS,
            num_stages=3,
            divisible=("scores", "keys"),
            flops=6.0 * queries * 8192,
            bytes=4.0 * queries * 8192,
            precision="fp32",
        )
        for k in (16, 128)
    ]
