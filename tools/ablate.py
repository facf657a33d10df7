"""``posfield ablation`` as a script: ``python tools/ablate.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("ablation")
