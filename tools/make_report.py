"""``posfield report`` as a script: ``python tools/make_report.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("report")
