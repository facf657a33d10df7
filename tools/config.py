"""``posfield config`` as a script: ``python tools/config.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("config")
