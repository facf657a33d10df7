"""``posfield evaluate`` as a script: ``python tools/evaluate.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("evaluate")
