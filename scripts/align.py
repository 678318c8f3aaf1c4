"""Fine-tune a video diffusion pipeline: the command `chopgrad-align align`."""

from chopgrad_align.commands.align import main

if __name__ == "__main__":
    main()
