"""``posfield detect`` as a script: ``python tools/train_det.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("detect")
