"""Checkpointing of the denoiser: the same frames and gradient, so many forwards of blocks, so much memory."""

from itertools import pairwise

import pytest
import torch
from lazy_streams import WAITS, Streams
from test_rollout import close, denoiser_of, generators, gradient, make, plain, reference
from torch import nn

from chopgrad_align import Checkpointing, Full, LastSteps, Steps, UsageError, rollout
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.sampling.rollout import rollout_parts

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

WAYS = {
    "call": Checkpointing(),
    "block": Checkpointing("block"),
    "block-host": Checkpointing("block", inputs="host"),
    "nested": Checkpointing("nested"),
    "none": Checkpointing("none"),
    "second": Checkpointing(2),
    "second-host": Checkpointing(2, inputs="host"),
}


@pytest.mark.parametrize("kind", ["wan_euler", "cogvideox", "svd"])
def test_frames_and_gradient_are_those_of_the_whole_graph(kind, monkeypatch):
    pipe, call = make(kind)
    kept = reference(pipe, 1, monkeypatch, **call)
    expected = gradient(pipe, kept)
    for way in WAYS.values():
        frames = rollout(pipe, LastSteps(2), checkpointing=way, **call, generator=generators())
        assert torch.equal(frames, kept)
        assert close(gradient(pipe, frames), expected), way


@pytest.mark.parametrize(
    ("way", "forwards"),
    [("call", 2), ("block", 2), ("block-host", 2), ("nested", 3), ("none", 1), ("second", 1.5), ("second-host", 1.5)],
    ids=lambda value: str(value),
)
def test_forwards_of_blocks(way, forwards):
    pipe, call = make("wan_euler")
    blocks, count = pipe.transformer.blocks, 0

    def forward(*_):
        nonlocal count
        count += torch.is_grad_enabled()

    for block in blocks:
        block.register_forward_pre_hook(forward)
    frames = rollout(pipe, LastSteps(1), checkpointing=WAYS[way], **call, generator=generators())
    assert count == 2 * len(blocks)  # a call for guidance
    gradient(pipe, frames)
    assert count == 2 * len(blocks) * forwards


def counted(way, policy=LastSteps(2), layers=6):  # noqa: B008 (frozen)
    """Bytes on the device and on the host after the forward pass, and at the peak of the backward pass, of latents."""
    pipe, call = make("wan_euler")
    blocks = pipe.transformer.blocks
    blocks.extend([blocks[-1]] * (layers - len(blocks)))
    with StorageCount() as count:
        call = {**call, "generator": generators()}
        parts = rollout_parts(pipe, call, policy, Full(), checkpointing=WAYS[way], output_type="latent")
        loss = next(parts).video.mean()
        held, waiting = count.now, count.host
        count.peak, count.host_peak = count.now, count.host
        loss.backward()
        peaks = count.peak, count.host_peak
        del parts, loss
        assert count.host == 0
    return held, waiting, *peaks


def test_storage():
    found = {way: counted(way) for way in WAYS}
    held = {way: numbers[0] for way, numbers in found.items()}
    assert held["none"] > held["second"] > held["block"] > held["block-host"] > held["call"] == held["nested"], held
    for way, (_, waiting, _, most) in found.items():
        assert (waiting > 0) == (way in ("block-host", "second-host")), way
        assert (most > 0) == way.endswith("-host"), way
    assert held["block"] - held["block-host"] <= found["block-host"][1]
    peaks = {way: numbers[2] for way, numbers in found.items()}
    assert max(peaks["nested"], peaks["block-host"]) < peaks["block"] < peaks["call"] < peaks["none"], peaks


def test_block_inputs_on_the_host_take_no_room_for_the_depth():
    shallow, deep = (counted("block-host", LastSteps(1), layers) for layers in (6, 12))
    assert deep[1] > 1.5 * shallow[1]
    assert deep[0] < 1.01 * shallow[0]


def test_masks_of_dropout_are_drawn_again(monkeypatch):
    pipe, call = make("wan_euler", lora_dropout=0.5)
    denoiser_of(pipe).train()
    found = []
    for way in WAYS.values():
        torch.manual_seed(7)
        found.append(gradient(pipe, rollout(pipe, checkpointing=way, **call, generator=generators())))
    assert all(close(one, other, 1e-6) for one, other in pairwise(found))


def test_attention_processors_are_those_of_the_forward_pass(monkeypatch):
    """Perturbed attention swaps them for its own for the time of a call."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Doubled(WanAttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    pipe, call = make("wan_euler")
    found = []
    for way in ("none", "block", "block-host"):
        pipe.transformer.set_attn_processor(Doubled())
        frames = rollout(pipe, checkpointing=WAYS[way], **call, generator=generators())
        pipe.transformer.set_attn_processor(WanAttnProcessor())
        found.append(gradient(pipe, frames))
    assert all(close(one, found[0], 1e-6) for one in found)


def test_a_graph_can_be_used_again():
    pipe, call = make("wan_euler")
    weights = [weight for weight in pipe.transformer.parameters() if weight.requires_grad]
    for way in ("block", "block-host", "second-host"):
        loss = rollout(pipe, Steps([0, 2]), Full(), checkpointing=WAYS[way], **call, generator=generators()).mean()
        first, second = (torch.autograd.grad(loss, weights, retain_graph=keep) for keep in (True, False))
        assert all(map(torch.equal, first, second))


def gradient_with_streams(monkeypatch, ignored=None):
    with monkeypatch.context() as patch:
        pipe, call = make("wan_euler")
        Streams(ignored).install(patch)
        return gradient(
            pipe, rollout(pipe, LastSteps(2), Full(), checkpointing=WAYS["block-host"], **call, generator=generators())
        )


def test_copies_are_waited_for(monkeypatch):
    pipe, call = make("wan_euler")
    expected = gradient(pipe, rollout(pipe, LastSteps(2), Full(), **call, generator=generators()))
    assert close(gradient_with_streams(monkeypatch), expected)


@pytest.mark.parametrize("wait", WAITS)
def test_a_missing_wait_is_noticed(monkeypatch, wait):
    assert gradient_with_streams(monkeypatch, wait).isnan().any()


@pytest.mark.parametrize("way", ["block", "none", "nested"])
def test_weights_that_changed_before_the_backward_pass(way):
    pipe, call = make("wan_euler")
    frames = rollout(pipe, checkpointing=WAYS[way], **call, generator=generators())
    with torch.no_grad():
        next(weight for weight in pipe.transformer.parameters() if weight.requires_grad).mul_(2)
    with pytest.raises(UsageError, match="the weights of WanTransformer3DModel changed"):
        frames.mean().backward()


def test_everything_is_as_before_also_after_an_error(monkeypatch):
    pipe, call = make("wan_euler")
    expected = plain(pipe, **call)

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(pipe.transformer.proj_out, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        rollout(pipe, LastSteps(3), checkpointing=WAYS["block-host"], **call, generator=generators())
    monkeypatch.undo()
    assert not pipe.transformer.is_gradient_checkpointing
    assert torch.equal(plain(pipe, **call), expected)


def test_wrong_settings(monkeypatch):
    for settings, message in (
        ({"checkpoint": "blocks"}, "expected one of 'call', 'block', 'nested', 'none', or a number"),
        ({"checkpoint": 0}, "expected a whole number"),
        ({"inputs": "disk"}, "expected 'device' or 'host'"),
        ({"inputs": "host"}, "use checkpoint='block'"),
        ({"checkpoint": "nested", "inputs": "host"}, "use checkpoint='block'"),
    ):
        with pytest.raises(UsageError, match=message):
            Checkpointing(**settings)
    pipe, call = make("wan_euler")
    monkeypatch.setattr(type(pipe.transformer), "_supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match="WanTransformer3DModel has no gradient checkpointing of its blocks"):
        rollout(pipe, checkpointing=WAYS["block"], **call, generator=generators())
    assert isinstance(pipe.transformer, nn.Module)
    assert len(rollout(pipe, checkpointing=WAYS["none"], **call, generator=generators())) == 2
