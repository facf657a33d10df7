"""``posfield predict`` as a script: ``python tools/predict.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("predict")
