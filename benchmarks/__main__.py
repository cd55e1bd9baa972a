"""Measure: `python -m benchmarks --help`."""

import argparse
import gc
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import environment, memory, registry, report, timing

SECONDS = {"cpu": 10.0, "cuda": 0.3}  # for each competitor
QUICK_SECONDS = 0.3


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a result of ours is wrong or failed, else 0."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    cases = registry.find(options.device, options.cases)
    cases = [case for case in cases if case.quick or not options.quick]
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if options.tiny:
        cases = list({(tiny := case.tiny()).name: tiny for case in cases}.values())
    if not cases:
        print(f"no case matches {options.cases!r}; see --list", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        memory.limit_to_available()
    seconds = QUICK_SECONDS if options.quick else SECONDS[options.device]

    results = {"environment": environment.describe(device, options.threads), "results": []}
    print(environment.title(results["environment"]))
    for case in cases:
        print(f"\n{case.name}", flush=True)
        results["results"].append(_run(case, device, options, seconds))
        print("\n".join(report.lines([results["results"][-1]])[2:]), flush=True)
        _save(results, options.output)  # after each case: a run that is cut short keeps what it has
    # Last, since processes take their time to start.
    for case, result in zip(cases, results["results"], strict=True):
        if case.memory and result.get("parity", {}).get("holds"):
            print(f"\n{case.name}: memory", flush=True)
            for name in case.memory:
                measured = memory.peak(case, name, device, options.threads)
                result["competitors"].setdefault(name, {}).update(measured)
            print("\n".join(report.lines([result])[2:]), flush=True)
            _save(results, options.output)
    print(f"\nwritten to {options.output}")
    return int(any(not report.succeeded(result) for result in results["results"]))


def _run(case: registry.Case, device: torch.device, options: argparse.Namespace, seconds: float) -> dict:
    described = {"family": case.family, "options": dict(case.options), "n": case.n, "m": case.m, "dtype": case.dtype}
    result = {"case": case.name, **described, "competitors": {}}
    try:
        problem = case.problem(device)
        parity = problem.parity()
    except Exception as error:  # one broken case must not lose the others
        return result | {"failed": timing.failure(error)}
    result |= {"flops": problem.flops, "parity": asdict(parity) | {"holds": parity.holds}}
    if not parity.holds:
        return result
    runs = {name: run for name, run in problem.competitors.items() if name != "compiled" or options.compile}
    if case.timed:
        result["competitors"] = timing.interleaved(runs, timing.stopwatch(device), seconds)
    del problem, runs
    gc.collect()
    if options.compile:
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def _save(results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure esl_fast against its limits.")
    parser.add_argument("--cases", metavar="PATTERN", default="*", help="only names that contain this (with * and ?)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--device", choices=tuple(SECONDS), default="cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a few cases, a few runs of each: figures are rough")
    parser.add_argument("--tiny", action="store_true", help="every case at a tiny size, parity only")
    parser.add_argument("--compile", action="store_true", help="also time the baselines under torch.compile")
    default = Path("benchmarks/results/latest.json")
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help=f"default: {default}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
