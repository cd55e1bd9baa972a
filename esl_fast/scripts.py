"""What the command-line scripts share."""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from esl_fast.data import LOADERS, DataSet, load_dataset


def reporting_errors(run: Callable[[], int]) -> int:
    """Exit status of a script: what its user can mend is one line on stderr, not a traceback."""
    try:
        return run()
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _message(error: Exception) -> str:
    """What it says; of an error in a loader's worker process the last line, which the traceback there ends with."""
    text = str(error)
    return text.strip().splitlines()[-1].partition(": ")[2] if "in DataLoader worker process" in text else text


def with_underscores(argv: Sequence[str], options: type) -> list[str]:
    """Options as the dataclass ``options`` names them: ``--five-folds`` alone is ``--five_folds=true``."""
    switches = {f"--{field.name}" for field in fields(options) if field.type is bool}
    named = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), arg) for arg in argv]
    return [
        f"{arg}=true" if arg in switches and after.startswith("-") else arg for arg, after in pairwise([*named, "--"])
    ]


def build_data(config: Any, only: str | None = None) -> DataSet:
    """The data set, or ``only`` one split of it, that a script's configuration names.

    Raises DataError for what is wrong with it.
    """
    if config.data_root is None and "root" in inspect.signature(LOADERS[config.dataset]).parameters:
        raise ValueError(f"dataset {config.dataset!r} lies on disk: say where with --data-root")
    return load_dataset(
        config.dataset,
        config.data_root,
        image_root=config.image_root,
        annotations=config.annotations,
        features=config.features,
        on_error=config.on_error,
        only=only,
    )
