"""``posfield table`` as a script: ``python tools/make_table.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("table")
