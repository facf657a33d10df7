"""``python -m posfield``; a file that torchrun and SLURM can be given, too."""

from posfield.cli import main

if __name__ == "__main__":
    main()
