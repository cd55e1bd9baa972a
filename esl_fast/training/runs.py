"""A run's folder: where it is, what it records, how it is drawn."""

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esl_fast.files import existing, replace_text
from esl_fast.scripts import OPTIONS_FILE

METRICS, RESULTS, CURVES = "metrics.jsonl", "results.json", "curves.png"
LAST, BEST, BOARD = "last", "best", "tensorboard"
# What a run may leave that ended before its first checkpoint.
LEFTOVERS = {METRICS, BOARD, OPTIONS_FILE}
UNFINISHED = tuple(f"{name}.tmp" for name in (LAST, BEST, *LEFTOVERS))


def find_run(resume: str, logs: str) -> Path:
    """Folder of the run to resume: ``latest`` under ``logs``, a run's folder, or a checkpoint in it.

    Raises FileNotFoundError saying where it looked.
    """
    if resume == "latest":
        runs = [path.parent for path in Path(logs).rglob(METRICS) if existing(path.parent / LAST).is_dir()]
        if not runs:
            raise FileNotFoundError(f"nothing to resume: no run with a checkpoint under {Path(logs).resolve()}")
        return max(runs, key=lambda run: existing(run / LAST).stat().st_mtime)
    run = Path(resume)
    run = run.parent if run.name in (LAST, BEST) else run
    if not existing(run / LAST).is_dir():
        raise FileNotFoundError(f"nothing to resume: {run} holds no checkpoint {LAST!r}")
    return run


def create_run(logs: str, name: str) -> Path:
    """A new, writable folder for a run, or that of one that failed before it began.

    This process holds it from now on; :func:`discard_run`, or the end of its :class:`RunLog`, lets it go. Raises
    FileExistsError or OSError with what to do about it.
    """
    run = Path(logs) / name
    try:
        run.mkdir(parents=True, exist_ok=True)
        hold(run)
        if existing(run / LAST).exists():
            raise FileExistsError(
                f"{run} holds a run already: choose another --name, or continue it with --resume {run}"
            )
        kept = [path.name for path in run.iterdir() if not _left_over(path)]
        if kept:
            raise FileExistsError(f"{run} holds {kept[0]}: choose another --name")
        (run / METRICS).touch()
    except BlockingIOError:
        raise
    except OSError as error:
        let_go(run)
        if isinstance(error, FileExistsError) and error.errno is None:
            raise
        reason = error.strerror or error
        raise OSError(f"cannot write into {run}: {reason}; choose another folder with --logs") from error
    return run


def discard_run(run: Path) -> None:
    """Let go what :func:`create_run` made, and remove it if nothing has come in since."""
    let_go(run)
    with suppress(OSError):
        if [path.name for path in run.iterdir()] == [METRICS] and not (run / METRICS).stat().st_size:
            (run / METRICS).unlink()
            run.rmdir()


def _left_over(path: Path) -> bool:
    """Whether a run that ended before its first checkpoint may have left this."""
    if path.name != METRICS:
        return path.name in LEFTOVERS or path.name.startswith(UNFINISHED)
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return all(entry["step"] == 0 for entry in entries)
    except (ValueError, TypeError, KeyError):
        return False  # not a run's


_held: dict[Path, int] = {}  # runs of this process, and the descriptors whose locks say so


def hold(run: Path) -> None:
    """Make this process the one that writes a run. Raises BlockingIOError if there is another one."""
    run = run.resolve()
    if run in _held:
        return
    try:
        import fcntl

        descriptor = os.open(run, os.O_RDONLY)
    except (ImportError, PermissionError):  # another system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        reason = f"{run} is being trained by another process; wait for its end, stop it, or choose another --name"
        raise BlockingIOError(reason) from error
    except OSError:  # a file system without locks
        pass
    _held[run] = descriptor


def let_go(run: Path) -> None:
    descriptor = _held.pop(run.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


class RunLog:
    """Writes ``metrics.jsonl`` and TensorBoard scalars; entries after a resumed step are dropped first."""

    def __init__(self, run: Path, resumed_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.path = run, run / METRICS
        hold(run)
        if resumed_step is None:
            shutil.rmtree(run / BOARD, ignore_errors=True)  # of one that failed before it began
            kept = []
        else:
            kept = [entry for entry in read_metrics(run) if entry["step"] <= resumed_step]
        replace_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._board = SummaryWriter(run / BOARD, purge_step=resumed_step and resumed_step + 1)
        self._failed: set[str] = set()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line, and a scalar ``kind/name`` for each number; what cannot be written costs one warning."""
        with self._forgiving(METRICS):
            _append(self.path, json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")
        with self._forgiving("TensorBoard's scalars"):
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        let_go(self.run)
        with self._forgiving("TensorBoard's scalars"):
            self._board.close()

    @contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorBoard hands on whatever ended its thread
            if what not in self._failed:
                warnings.warn(f"could not write {what}: {error}; training goes on", stacklevel=4)
            self._failed.add(what)


def _append(path: Path, line: str) -> None:
    """A whole line or nothing, also on a disk that has room for half of it."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError:
        os.truncate(path, size)
        raise


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All entries; a last line cut short by a crash is left out. None where nothing was written."""
    entries = []
    if not (run / METRICS).exists():
        return entries
    for line in (run / METRICS).read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def draw_curves(run: Path, chance: float) -> Path:
    """Loss, validation recall and rsum over the steps as a picture; ``chance`` is the rsum of a random similarity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = read_metrics(run)
    of = {kind: [e for e in entries if e["kind"] == kind] for kind in ("train", "val", "test")}
    figure, (loss, recall, rsum) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    loss.plot([e["step"] for e in of["train"]], [e["loss"] for e in of["train"]])
    loss.set(title="training loss", xlabel="step")
    steps = [e["step"] for e in of["val"]]
    for way, style in (("i2t", "-"), ("t2i", "--")):
        for k in (1, 5, 10):
            recall.plot(steps, [e[f"{way}_r{k}"] for e in of["val"]], style, label=f"{way} R@{k}")
    recall.set(title="validation recall (%)", xlabel="step", ylim=(0, 100))
    recall.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    rsum.plot(steps, [e["rsum"] for e in of["val"]], label="validation")
    for entry in of["test"]:
        rsum.plot(entry["step"], entry["rsum"], "o", label=f"test: {entry['rsum']:.1f}")
    rsum.axhline(chance, color="grey", linestyle=":", label=f"chance: {chance:.1f}")
    rsum.set(title="rsum", xlabel="step", ylim=(0, None))
    rsum.legend(fontsize="small")
    path = run / CURVES
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
