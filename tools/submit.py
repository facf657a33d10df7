"""``posfield submit`` as a script: ``python tools/submit.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("submit")
