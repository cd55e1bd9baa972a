"""Evaluate checkpoints, or an ensemble of them: `python train/evaluate.py --help` lists every option."""

import sys

from esl_fast.evaluation.main import main

if __name__ == "__main__":
    sys.exit(main())
