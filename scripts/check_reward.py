"""Check a reward before training with it: the command `chopgrad-align check-reward`."""

from chopgrad_align.commands.check_reward import main

if __name__ == "__main__":
    main()
