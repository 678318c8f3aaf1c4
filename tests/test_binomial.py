"""Few sets of caches: the same bits, no more sets at a time than allowed, the fewest forward passes of groups."""

import math
from functools import cache

import pytest
import tiny_vaes
import torch
from gradients import gradient, weighted
from lazy_streams import Streams

from chopgrad_align import Exact, Truncated, UsageError, decode
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.decoding.binomial import first_state, states_of_first_run, steps_forward
from chopgrad_align.decoding.groupwise import GroupwiseGradient


@cache
def least(length, states):
    """By trying every first state."""
    if length == 1 or not states:
        return 0 if length == 1 else math.inf
    return min(j + least(length - j, states - 1) + least(j, states) for j in range(1, length))


@pytest.mark.parametrize("states", [1, 2, 3, 5, 30])
def test_the_schedule_is_the_best_there_is(states):
    for length in range(1, 25):
        assert steps_forward(length, states) == least(length, states)
        if length > 1:
            j = first_state(length, states)
            assert j + least(length - j, states - 1) + least(j, states) == least(length, states)
        kept = states_of_first_run(length, states)
        assert kept == sorted({*kept})
        assert len(kept) - 1 <= min(states, length - 1)
    assert states_of_first_run(24, None) == [*range(24)]


GROUPS = 7
VAES = {
    "wan": (tiny_vaes.wan_vae, (1, 4, GROUPS, 2, 2)),
    "cogvideox": (tiny_vaes.cogvideox_vae, (1, 4, 2 * GROUPS, 2, 2)),
}


@pytest.mark.parametrize("checkpoint", [True, False], ids=["blocks", "groups"])
@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("kind", VAES)
def test_the_gradient_is_that_with_all_sets_kept(kind, place, checkpoint, monkeypatch):
    make, shape = VAES[kind]
    vae, latents = make(), torch.randn(shape, requires_grad=True)
    expected = gradient(weighted(decode(vae, latents, Exact(cache=place, checkpoint=checkpoint))), latents)
    advanced, count = GroupwiseGradient._advanced, 0

    def counting(*args):
        nonlocal count
        count += 1
        return advanced(*args)

    monkeypatch.setattr(GroupwiseGradient, "_advanced", counting)
    for sets in (1, 2, 3, 6):
        count = 0
        pixels = decode(vae, latents, Exact(cache=place, cache_sets=sets, checkpoint=checkpoint))
        assert torch.equal(gradient(weighted(pixels), latents), expected)
        assert count == least(GROUPS, sets) - (GROUPS - 1)  # the first run is there anyway


def test_other_policies_and_a_graph_that_is_used_again():
    vae, latents = tiny_vaes.wan_vae(), torch.randn(1, 4, 5, 2, 2, requires_grad=True)
    for policy in (Truncated, Exact):
        args = (2,) if policy is Truncated else ()
        expected = gradient(weighted(decode(vae, latents, policy(*args))), latents)
        loss = weighted(decode(vae, latents, policy(*args, cache="host", cache_sets=2)))
        for keep in (True, False):
            (found,) = torch.autograd.grad(loss, [latents], retain_graph=keep)
            assert torch.equal(found, expected)


def test_copies_are_waited_for(monkeypatch):
    vae, latents = tiny_vaes.wan_vae(), torch.randn(1, 4, 5, 2, 2, requires_grad=True)
    expected = gradient(weighted(decode(vae, latents, Exact())), latents)
    places = Streams().install(monkeypatch)
    assert torch.equal(gradient(weighted(decode(vae, latents, Exact(cache="host", cache_sets=2))), latents), expected)
    assert not any(place._in_transit or place._prefetched for place in places)


def host_peaks(vae, groups, sets):
    """Peaks of host memory, in the forward pass and in the backward pass."""
    latents = torch.randn(1, 4, groups, 4, 4, requires_grad=True)
    with StorageCount() as count:
        pixels = decode(vae, latents, Exact(cache="host", cache_sets=sets))
        forward = count.host_peak
        pixels.sum().backward()
        assert count.host == 0
    return forward, count.host_peak


def test_so_many_sets_are_there_at_a_time():
    vae = tiny_vaes.wan_vae()
    few, more = (host_peaks(vae, groups, None)[0] for groups in (6, 7))
    one = more - few
    for sets in (1, 3):
        forward, backward = host_peaks(vae, 7, sets)
        assert (sets - 1) * one < forward < (sets + 0.5) * one, sets  # a block's twice, from group to group
        # Beside them cotangents of one set, and the inputs of a group's blocks.
        assert backward < (sets + 2.2) * one, sets


def test_wrong_numbers():
    with pytest.raises(UsageError, match="expected a whole number"):
        Exact(cache_sets=0)
    with pytest.raises(UsageError, match="two ways to keep less"):
        Exact(cache="recompute", cache_sets=3)
