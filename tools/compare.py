"""``posfield compare`` as a script: ``python tools/compare.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("compare")
