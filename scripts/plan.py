"""Plan the memory of a training run: the command `chopgrad-align plan`."""

from chopgrad_align.commands.plan import main

if __name__ == "__main__":
    main()
