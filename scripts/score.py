"""Score videos by a reward: the command `chopgrad-align score`."""

from chopgrad_align.commands.score import main

if __name__ == "__main__":
    main()
