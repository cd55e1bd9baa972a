"""What the command-line scripts share."""

import re
import sys
from collections.abc import Callable, Sequence


def reporting_errors(run: Callable[[], int]) -> int:
    """Exit status of a script: what its user can mend is one line on stderr, not a traceback."""
    try:
        return run()
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Options as they are named here: ``--batch-size`` is ``--batch_size``."""
    return [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), arg) for arg in argv]
