"""Times of competitors that take turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

MIN_RUNS, MAX_RUNS = 5, 200

Run = Callable[[], object]


@dataclass(frozen=True)
class Statistics:
    """Seconds a run: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> "Statistics":
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[1], deciles[7], len(samples))


def failure(error: Exception) -> str:
    """What a result file says about a competitor that raised ``error``."""
    message = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in message:
        return "out of memory"
    return f"{type(error).__name__}: {message}"


def stopwatch(device: torch.device) -> Callable[[Run], float]:
    """A function that runs its argument once and returns the seconds it took, from a cold L2 cache on a GPU."""
    if device.type == "cpu":

        def once(run: Run) -> float:
            start = time.perf_counter()
            result = run()  # freed after the clock has stopped
            seconds = time.perf_counter() - start
            del result
            return seconds

        return once

    # Writing this before each run also gives the host a lead, so that what is timed starts without a gap.
    flushed = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def once(run: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return once


def interleaved(competitors: Mapping[str, Run], once: Callable[[Run], float], seconds: float) -> dict[str, dict]:
    """Statistics of each competitor after a warm-up, about ``seconds`` for each, or ``{"failed": reason}``.

    Runs of one competitor are spread evenly over the runs of the others: what slows the machine down for a while
    slows all of them.
    """
    outcomes, counts = {}, {}
    for name, run in competitors.items():
        try:
            once(run)
            counts[name] = max(MIN_RUNS, min(MAX_RUNS, int(seconds / once(run))))
        except Exception as error:  # out of memory, not compilable: a result like any other
            outcomes[name] = {"failed": failure(error)}
    samples: dict[str, list[float]] = {name: [] for name in counts}
    rounds = max(counts.values(), default=0)
    for i in range(rounds):
        for name, count in counts.items():
            if (i + 1) * count // rounds > i * count // rounds:
                samples[name].append(once(competitors[name]))
    outcomes |= {name: asdict(Statistics.of(s)) for name, s in samples.items()}
    return {name: outcomes[name] for name in competitors}
