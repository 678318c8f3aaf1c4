"""Write the page of a run again: the command `chopgrad-align report`."""

from chopgrad_align.commands.report import main

if __name__ == "__main__":
    main()
