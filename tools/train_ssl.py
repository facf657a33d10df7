"""``posfield pretrain`` as a script: ``python tools/train_ssl.py --help``."""

from posfield.cli import main

if __name__ == "__main__":
    main("pretrain")
