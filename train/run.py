"""Train an ESL model: `python train/run.py --help` lists every option."""

import sys

from esl_fast.training import main

if __name__ == "__main__":
    sys.exit(main())
