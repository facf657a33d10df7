"""``posfield analyze`` as a script: ``python tools/analyze.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("analyze")
