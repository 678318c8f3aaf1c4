"""Gradients through video decoders: policies, the recurrence over frame groups, what a block keeps, and where."""
