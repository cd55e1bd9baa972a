"""Peak memory of one competitor, in a process of its own, above the level at which its inputs exist."""

import ctypes
import multiprocessing
import re
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import registry
from benchmarks.timing import failure


def peak(case: registry.Case, competitor: str, device: torch.device, threads: int) -> dict[str, int | str]:
    """``{"peak_memory": bytes}`` or ``{"memory_failed": reason}``."""
    # A server that has imported everything, and used no thread and no GPU, forks the fresh process in no time.
    context = multiprocessing.get_context("forkserver")
    # (`torch._dynamo`: what the first call of a registered op imports).
    context.set_forkserver_preload(["benchmarks.memory", "esl_fast", "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(case, competitor, device, threads, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        return {"memory_failed": "out of memory" if killed else f"died with exit code {process.exitcode}"}
    finally:
        process.join()


def limit_to_available() -> None:
    """Make allocations beyond the machine's free memory fail, here and in child processes, instead of being killed.

    Linux only, as is the peak memory on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _field("/proc/self/status", "VmSize") + int(0.9 * _field("/proc/meminfo", "MemAvailable"))
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _measure(case: registry.Case, competitor: str, device: torch.device, threads: int, sender: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        run = case.problem(device).competitors[competitor]
        square = torch.ones(256, 256, device=device)
        _ = square @ square  # leaves behind what all products share: threads, workspaces
        measure = _peak_cuda if device.type == "cuda" else _peak_resident
        sender.send({"peak_memory": measure(run, device)})
    except Exception as error:  # sent to the process that asked
        sender.send({"memory_failed": failure(error)})


def _peak_cuda(run, device: torch.device) -> int:
    level = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - level


def _peak_resident(run, device: torch.device) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    level = _field("/proc/self/status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run()
    return _field("/proc/self/status", "VmHWM") - level


def _field(path: str, name: str) -> int:
    """A size in bytes from a file of lines like `name: 123 kB`."""
    return int(re.search(rf"^{name}:\s*(\d+) kB", Path(path).read_text(), re.MULTILINE)[1]) << 10
