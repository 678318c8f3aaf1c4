"""Decoding policies written outside of the package, held to what they mean: the model's own calls, whose caches pass on
part of their gradient."""

from dataclasses import dataclass

import pytest
import tiny_vaes
import torch
from gradients import gradient, relative_error, weighted
from torch import Tensor
from torch.utils._pytree import tree_map_only

from chopgrad_align import Backprop, Exact, Full, Groupwise, Truncated, UsageError, decode, decode_loss


@dataclass(frozen=True)
class Damped(Groupwise):
    """The cotangents of the caches shrink at every group."""

    factor: float

    def cotangent_factor(self, group):
        return self.factor


@dataclass(frozen=True)
class EveryThird(Groupwise):
    """The caches pass no gradient to every third group, and as it is to the others."""

    def cotangent_factor(self, group):
        return float(group % 3 != 0)


@dataclass(frozen=True)
class DampedBand(Damped):
    """Damped, and not further than to the group before the last."""

    def truncation_distance(self):
        return 2


@dataclass(frozen=True)
class Plain(Backprop):
    """Its own way through the recurrence: plain autograd, but for the caches before every third group."""

    def run(self, recurrence, latents):
        results, caches = [], []
        for index, group in enumerate(recurrence.groups):
            if index % 3 == 0:
                caches = tree_map_only(Tensor, Tensor.detach, caches)
            hidden, caches = recurrence.step(index, recurrence.latents_of(latents, group), caches)
            results.append(recurrence.result(group, hidden[0]))
        return recurrence.joined(results)


def damped_pixels(vae, latents, factor_of) -> Tensor:
    """The model's own calls, frame by frame; the caches before frame i pass on their gradient times `factor_of(i)`."""
    vae.clear_cache()
    hidden, frames = vae.post_quant_conv(latents), []
    for i in range(hidden.shape[2]):
        before = [t.detach() + factor_of(i) * (t - t.detach()) if isinstance(t, Tensor) else t for t in vae._feat_map]
        caches = {"feat_cache": before, "feat_idx": [0]}
        frames.append(vae.decoder(hidden[:, :, i : i + 1], first_chunk=i == 0, **caches))
        vae._feat_map = before
    vae.clear_cache()
    return torch.cat(frames, 2).clamp(-1, 1)


def third(i):
    return float(i % 3 != 0)


POLICIES = {
    "damped": (Damped(0.5), lambda i: 0.5),
    "damped_host": (Damped(0.5, cache="host", rows=3), lambda i: 0.5),
    "reversed": (Damped(-1.5, cache="recompute", checkpoint=False), lambda i: -1.5),
    "cut_all": (Damped(0), lambda i: 0),
    "third": (EveryThird(), third),
    "third_host": (EveryThird(cache="host"), third),
    "plain": (Plain(), third),
}


@pytest.mark.parametrize(("backprop", "factor_of"), POLICIES.values(), ids=POLICIES.keys())
def test_a_new_policy_has_the_gradient_that_it_means(backprop, factor_of, full_precision):
    vae = tiny_vaes.wan_vae().double()
    weight = vae.decoder.conv_in.weight.requires_grad_()
    latents = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    defined = damped_pixels(vae, latents, factor_of)
    sources = [latents, weight]
    expected = torch.autograd.grad(weighted(defined), sources, retain_graph=True)
    pixels = decode(vae, latents, backprop)
    assert torch.equal(pixels, defined)
    found = torch.autograd.grad(weighted(pixels), sources)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))

    assert not backprop.one_pass
    loss = decode_loss(vae, latents, lambda p, frames: (p * (1 + frames.start)).square().sum(), backprop)
    scale = torch.tensor([1, *(i for i in (2, 6, 10, 14) for _ in range(4))])[:, None, None]  # the first frame of each
    assert relative_error(gradient(loss, latents), gradient((defined * scale).square().sum(), latents)) < 1e-12


def test_damping_is_of_each_way_within_a_band(full_precision):
    vae = tiny_vaes.wan_vae().double()
    latents = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64, requires_grad=True)

    def band(policy):
        return gradient(weighted(decode(vae, latents, policy)), latents)

    nearest, one, two = (band(Truncated(distance)) for distance in range(3))
    expected = nearest + 0.5 * (one - nearest) + 0.25 * (two - one)
    assert relative_error(band(DampedBand(0.5)), expected) < 1e-12


def test_a_new_policy_has_the_settings_of_all():
    vae = tiny_vaes.wan_vae()
    vae.decoder.conv_out.bias.data.fill_(9.0)
    latents = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    exact, own = (decode(vae, latents, policy) for policy in (Exact(saturated="pass"), Damped(1.0, saturated="pass")))
    assert torch.equal(*(gradient(weighted(pixels), latents) for pixels in (own, exact)))
    assert [policy.one_pass for policy in (Truncated(0), Truncated(1), Exact(), Full())] == [True, False, False, False]
    with pytest.raises(UsageError, match=r"Damped\(cache='disk'\): expected 'device', 'host' or 'recompute'"):
        Damped(1.0, cache="disk")
    with pytest.raises(UsageError, match=r"Plain\(saturated='no'\): expected 'zero' or 'pass'"):
        Plain(saturated="no")
