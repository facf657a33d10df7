"""``posfield toy-data`` as a script: ``python tools/make_toy_data.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("toy-data")
