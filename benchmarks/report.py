"""Tables and plots of result files: `python -m benchmarks.report FILE...`."""

import argparse
import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks import environment

HEADER = (
    "case", "by", "median ms", "p20", "p80", "wall ms", "TFLOP/s", "of limit", "ours is faster", "peak MB", "parity",
)  # fmt: skip


def succeeded(result: dict) -> bool:
    """Whether ours gave the right result and was measured."""
    ours = result["competitors"].get("ours", {})
    return result.get("parity", {}).get("holds", False) and not {"failed", "memory_failed"} & ours.keys()


def lines(results: Iterable[dict]) -> list[str]:
    """A markdown table: a line for each case and competitor."""
    rows = [HEADER, ("---", "---", *["---:"] * 8, "---")]
    for result in results:
        name = result["case"]
        if "failed" in result or not result["parity"]["holds"]:
            rows.append((name, "ours", *[""] * 8, result.get("failed") or _parity(result)))
            continue
        for competitor in result["competitors"] or ("ours",):
            rows.append((name, *_cells(result, competitor)))
            name = ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]


def _cells(result: dict, competitor: str) -> tuple[str, ...]:
    measured, ours = (result["competitors"].get(name, {}) for name in (competitor, "ours"))
    memory = measured.get("memory_failed") or (
        f"{measured['peak_memory'] / 1e6:,.1f}" if "peak_memory" in measured else ""
    )
    parity = _parity(result) if competitor == "ours" else ""
    if "median" not in measured:
        return (competitor, measured.get("failed", ""), *[""] * 6, memory, parity)
    median = measured["median"]
    limit = result["competitors"].get("limit", {}).get("median")
    return (
        competitor,
        *(f"{1e3 * measured[key]:,.3f}" for key in ("median", "p20", "p80")),
        f"{1e3 * measured['wall']:,.3f}" if measured.get("wall") else "",
        f"{result['flops'] / median / 1e12:.3g}",
        f"{100 * limit / median:.1f}%" if limit else "",
        f"{_seen(measured) / _seen(ours):.2f}x" if competitor not in ("ours", "limit") and "median" in ours else "",
        memory,
        parity,
    )


def _seen(measured: dict) -> float:
    """Seconds that a caller sees."""
    return measured.get("wall") or measured["median"]


def _parity(result: dict) -> str:
    parity = result["parity"]
    verdict = "error" if parity["holds"] else "PARITY FAILED: error"
    return f"{verdict} {parity['error']:.1e} (allowed {parity['tolerance']:.0e}), {parity['compared']}"


def draw(results: Iterable[dict], title: str, path: Path) -> bool:
    """Time and peak memory against N, a row of pictures for each family; False if none has several sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families = defaultdict(list)
    for result in results:
        if result.get("parity", {}).get("holds"):
            family = "/".join([result["family"], *map(str, result["options"].values()), result["dtype"]])
            families[family].append(result)
    families = {name: members for name, members in families.items() if len({member["n"] for member in members}) > 1}
    if not families:
        return False
    figure, grid = plt.subplots(len(families), 2, figsize=(10, 4 * len(families)), squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=9)
    for row, (family, members) in zip(grid, families.items(), strict=True):
        for axis, key, unit, label in ((row[0], "median", 1e3, "ms"), (row[1], "peak_memory", 1e-6, "peak MB")):
            points = defaultdict(list)
            for member in members:
                for name, measured in member["competitors"].items():
                    if key in measured:
                        points[name].append((member["n"], unit * measured[key]))
            for name, pairs in points.items():
                axis.plot(*zip(*sorted(pairs), strict=True), marker="o", label=name)
            axis.set(title=family, xlabel="N", ylabel=label, xscale="log", yscale="log")
            if points:
                axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by `python -m benchmarks`")
    for path in parser.parse_args(arguments).files:
        content = json.loads(path.read_text())
        title = environment.title(content["environment"])
        print(f"\n{title}\n")
        print("\n".join(lines(content["results"])))
        picture = path.with_suffix(".png")
        if importlib.util.find_spec("matplotlib") is None:
            print("\nno plots: matplotlib is not installed")
        elif draw(content["results"], title, picture):
            print(f"\n![time and memory against N]({picture.name})")


if __name__ == "__main__":
    main()
