"""Make videos with a pipeline: the command `chopgrad-align generate`."""

from chopgrad_align.commands.generate import main

if __name__ == "__main__":
    main()
