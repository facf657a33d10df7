"""``posfield export`` as a script: ``python tools/export_backbone.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("export")
