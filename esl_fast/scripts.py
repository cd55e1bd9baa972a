"""What the command-line scripts share."""

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from esl_fast.data import DataError, DataSet, load_dataset

OPTIONS_FILE = "train.yaml"  # of a run
# Arguments that the loaders' messages name -> what a user types.
ON_COMMAND_LINE = {
    "image_root": "--image-root", "root": "--data-root", "annotations": "--annotations", "features": "--features",
}  # fmt: skip


def reporting_errors(run: Callable[[], int]) -> int:
    """Exit status of a script: what its user can mend is one line on stderr, not a traceback, as is a warning."""
    usual, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        return run()
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = usual


def _message(error: Exception) -> str:
    """What it says; of an error in a loader's worker process the last line, which the traceback there ends with."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{text}; pip install 'esl_fast[train]'"
    return text.strip().splitlines()[-1].partition(": ")[2] if "in DataLoader worker process" in text else text


def program(script: str) -> str:
    """Name of what was started: ``script``, or its installed command."""
    started = Path(sys.argv[0]).name
    return started if started.startswith("esl-") else script


def read_options(path: Path) -> dict[str, Any]:
    """Options in a YAML file. Raises ValueError naming a file that holds none."""
    try:
        options = yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no options")
    return options


def check_given(options: Any) -> None:
    """ValueError naming the first option of a dataclass that a file sets to null, and that cannot be."""
    for field in fields(options):
        if getattr(options, field.name) is None and NoneType not in get_args(field.type):
            raise ValueError(f"{field.name} is null; give it a value, or leave it out for its default")


def check_least(options: Any, least: dict[str, float]) -> None:
    """ValueError naming the first option that is given and below its bound."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name} is {value}; expected at least {bound}")


def with_underscores(argv: Sequence[str], options: type) -> list[str]:
    """Options as the dataclass ``options`` names them: ``--five-folds`` alone is ``--five_folds=true``."""
    switches = {f"--{field.name}" for field in fields(options) if field.type is bool}
    named = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), arg) for arg in argv]
    named = [_config_with_underscores(before, arg) for before, arg in pairwise(["", *named])]
    return [
        f"{arg}=true" if arg in switches and after.startswith("-") else arg for arg, after in pairwise([*named, "--"])
    ]


def config_first(argv: Sequence[str]) -> list[str]:
    """The same arguments with ``--config`` in front, so that all others override it, as its help says."""
    files, rest, taken = [], [], ""
    for arg in argv:
        is_file = arg.partition("=")[0] == "--config" or taken == "--config"
        (files if is_file else rest).append(arg)
        taken = arg
    return files + rest


def _config_with_underscores(before: str, arg: str) -> str:
    """An argument of ``--config`` as it is, or as inline JSON with underscores if keys of its file have hyphens."""
    option, _, path = arg.partition("=") if arg.startswith("--config=") else (before, "", arg)
    if option != "--config" or not os.path.isfile(path):
        return arg
    try:
        options = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return arg  # the parser says what is wrong
    options = {} if options is None else options  # of comments alone
    if not isinstance(options, dict) or (options and not any("-" in str(key) for key in options)):
        return arg
    renamed = {str(key).replace("-", "_"): value for key, value in options.items()}
    if len(renamed) < len(options):
        raise ValueError(f"{path} says an option twice, with a hyphen and with an underscore")
    inline = json.dumps(renamed, default=str)
    return f"--config={inline}" if arg.startswith("--config=") else inline


def build_data(config: Any, only: str | None = None) -> DataSet:
    """The data set, or ``only`` one split of it, that a script's configuration names.

    Raises DataError, which names options as a user types them.
    """
    try:
        return load_dataset(
            config.dataset,
            config.data_root,
            image_root=config.image_root,
            annotations=config.annotations,
            features=config.features,
            on_error=config.on_error,
            only=only,
        )
    except DataError as error:
        message = re.sub(rf"\b({'|'.join(ON_COMMAND_LINE)})=", lambda match: ON_COMMAND_LINE[match[1]], str(error))
        raise DataError(message) from error
