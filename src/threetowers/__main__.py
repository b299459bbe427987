"""`python -m threetowers`, which `torchrun -m threetowers` starts in each process."""

from threetowers.cli import main

if __name__ == "__main__":
    main()
