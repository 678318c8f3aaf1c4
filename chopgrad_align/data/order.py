"""Which samples a step sees: a function of seed and step alone, so that a resumed run goes on as it would have."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mix(*numbers: int) -> int:
    """A seed from several numbers (a multiplicative hash; 63 bits)."""
    value = 0
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return value


def pick(count: int, *numbers: int) -> int:
    """Draw one of `count` things by a seed of several numbers."""
    # The low bits of the hash follow a short cycle; a generator's do not.
    return int(torch.randint(count, (), generator=torch.Generator().manual_seed(mix(*numbers))))


def batch_at(step: int, batch: int, groups: Sequence[Sequence[int]], seed: int) -> list[int]:
    """The samples of a step, all of one group, since clips of different buckets do not stack.

    In each epoch every sample comes at least once: groups are shuffled and cut into batches, a last batch that is not
    full takes from the beginning of its group again, and the batches are shuffled.

    Args:
        step: From 0.
        batch: How many.
        groups: Of sample numbers; none empty.
        seed: Of the run.
    """
    cuts = [(g, start) for g, group in enumerate(groups) for start in range(0, len(group), batch)]
    epoch, position = divmod(step, len(cuts))
    g, start = cuts[_shuffled(len(cuts), seed, epoch)[position]]
    order = _shuffled(len(groups[g]), seed, epoch, g + 1)
    return [groups[g][order[(start + i) % len(order)]] for i in range(batch)]


def _shuffled(count: int, *numbers: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(*numbers))).tolist()
