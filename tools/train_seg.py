"""``posfield segment`` as a script: ``python tools/train_seg.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("segment")
