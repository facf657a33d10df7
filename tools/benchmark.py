"""``posfield benchmark`` as a script: ``python tools/benchmark.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("benchmark")
