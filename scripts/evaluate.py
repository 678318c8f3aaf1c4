"""Compare methods of a restoration task on held-out clips: the command `chopgrad-align evaluate`."""

from chopgrad_align.commands.evaluate import main

if __name__ == "__main__":
    main()
