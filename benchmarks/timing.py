"""Times of competitors that take turns."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

MIN_RUNS, MAX_RUNS = 5, 200
LONG, LONG_RUNS = 0.5, 3  # runs of so many seconds need neither a lead nor many repetitions
MAX_LEAD = 0.05  # seconds
CYCLES = 2e9  # a second on a GPU, or more: a lead may be too long, not too short

Run = Callable[[], object]


@dataclass(frozen=True)
class Statistics:
    """Seconds a run: median, 20th and 80th percentile; median of what a caller who waits for a GPU sees."""

    median: float
    p20: float
    p80: float
    runs: int
    wall: float | None = None

    @classmethod
    def of(cls, samples: list["Sample"]) -> "Statistics":
        deciles = statistics.quantiles([s.seconds for s in samples], n=10, method="inclusive")
        walls = [s.wall for s in samples if s.wall is not None]
        wall = statistics.median(walls) if walls else None
        return cls(statistics.median(s.seconds for s in samples), deciles[1], deciles[7], len(samples), wall)


class Sample(NamedTuple):
    seconds: float
    wall: float | None = None


def failure(error: Exception) -> str:
    """What a result file says about a competitor that raised ``error``."""
    message = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in message:
        return "out of memory"
    return f"{type(error).__name__}: {message}"


def stopwatch(device: torch.device) -> Callable[[Run], Sample]:
    """A function that runs its argument, on a GPU twice and from a cold L2 cache, and returns the seconds it took.

    On a GPU ``seconds`` are the device's: the host gets a lead, so that launching leaves no gaps. ``wall`` is the time
    from call to result, without a lead; of long runs it is both.
    """
    if device.type == "cpu":

        def once(run: Run) -> Sample:
            start = time.perf_counter()
            result = run()  # freed after the clock has stopped
            seconds = time.perf_counter() - start
            del result
            return Sample(seconds)

        return once

    flushed = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def once(run: Run) -> Sample:
        flushed.zero_()
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        issued = time.perf_counter() - begin
        torch.cuda.synchronize(device)
        wall = time.perf_counter() - begin
        if wall > LONG:
            return Sample(wall, wall)

        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.zero_()
        torch.cuda._sleep(int(min(1.5 * issued + 1e-4, MAX_LEAD) * CYCLES))
        start.record()
        run()
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end) / 1e3, wall)

    return once


def interleaved(competitors: Mapping[str, Run], once: Callable[[Run], Sample], seconds: float) -> dict[str, dict]:
    """Statistics of each competitor after a warm-up, about ``seconds`` for each, or ``{"failed": reason}``.

    Runs of one competitor are spread evenly over the runs of the others: what slows the machine down for a while
    slows all of them. Their order is drawn anew each round: who always came after a run that drew much power would
    always meet a GPU that has lowered its clock.
    """
    outcomes, counts = {}, {}
    for name, run in competitors.items():
        try:
            once(run)
            taken = once(run).seconds
            fewest = LONG_RUNS if taken > LONG else MIN_RUNS
            counts[name] = max(fewest, min(MAX_RUNS, int(seconds / taken)))
        except Exception as error:  # out of memory, not compilable: a result like any other
            outcomes[name] = {"failed": failure(error)}
    samples: dict[str, list[Sample]] = {name: [] for name in counts}
    rounds = max(counts.values(), default=0)
    order, draw = list(counts), random.Random(0)
    for i in range(rounds):
        draw.shuffle(order)
        for name in order:
            count = counts[name]
            if (i + 1) * count // rounds > i * count // rounds:
                samples[name].append(once(competitors[name]))
    outcomes |= {name: asdict(Statistics.of(s)) for name, s in samples.items()}
    return {name: outcomes[name] for name in competitors}
