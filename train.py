"""``python train.py [RECIPE] [--group.field value ...]``, the train command of ``python -m allspark_fast``."""

import sys

from allspark_fast.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
