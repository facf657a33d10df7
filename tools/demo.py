"""``posfield demo`` as a script: ``python tools/demo.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("demo")
