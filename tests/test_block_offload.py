"""Frozen weights of blocks in host memory: the same frames and gradient, and few weights on the device."""

import pytest
import torch
from lazy_streams import WAITS, Streams
from test_rollout import close, denoiser_of, generators, gradient, make, plain

from chopgrad_align import Checkpointing, Full, LastSteps, UsageError, rollout
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.sampling.block_offload import offload_blocks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

CPU = torch.device("cpu")
WAYS = {
    "block": Checkpointing("block"),
    "block-host": Checkpointing("block", inputs="host"),
    "nested": Checkpointing("nested"),
    "call": Checkpointing(),  # which takes all of them to the device, but is right
}


@pytest.mark.parametrize("kind", ["wan_euler", "wan_i2v", "cogvideox"])
def test_frames_and_gradient_are_those_of_the_whole_model(kind):
    pipe, call = make(kind)
    expected = plain(pipe, **call)
    weights = gradient(pipe, rollout(pipe, LastSteps(2), **call, generator=generators()))
    total = sum(p.nbytes for p in denoiser_of(pipe).parameters())
    moved = offload_blocks(denoiser_of(pipe), CPU)
    assert total - moved == sum(p.nbytes for p in denoiser_of(pipe).parameters())
    assert moved > total / 4
    assert torch.equal(plain(pipe, **call), expected)
    for way in WAYS.values():
        frames = rollout(pipe, LastSteps(2), checkpointing=way, **call, generator=generators())
        assert torch.equal(frames, expected)
        assert close(gradient(pipe, frames), weights, 1e-6), way


def gradient_with_streams(monkeypatch, ignored=None):
    with monkeypatch.context() as patch:
        pipe, call = make("wan_euler")
        places = Streams(ignored).install(patch)
        offload_blocks(pipe.transformer, CPU)
        frames = rollout(pipe, LastSteps(2), Full(), checkpointing=WAYS["block"], **call, generator=generators())
        found = gradient(pipe, frames)
    return found, places


def test_copies_are_waited_for(monkeypatch):
    pipe, call = make("wan_euler")
    expected = gradient(pipe, rollout(pipe, LastSteps(2), Full(), **call, generator=generators()))
    found, (place,) = gradient_with_streams(monkeypatch)
    assert close(found, expected, 1e-6)
    assert not place._prefetched


@pytest.mark.parametrize("wait", WAITS)
def test_a_missing_wait_is_noticed(monkeypatch, wait):
    assert gradient_with_streams(monkeypatch, wait)[0].isnan().any()


def peak(offloaded, layers):
    """Of a forward and a backward pass of a transformer whose weights are larger than its activations."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with StorageCount() as count:
        denoiser = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=8,
            ffn_dim=512,
            num_layers=layers,
            rope_max_seq_len=16,
        ).requires_grad_(False)
        block = sum(p.nbytes for p in denoiser.blocks[0].parameters())
        if offloaded:
            assert offload_blocks(denoiser, CPU) == count.host == layers * block
        count.peak = count.now
        latents = torch.randn(1, 4, 1, 4, 4, requires_grad=True)
        time, text = torch.zeros(1), torch.zeros(1, 3, 8)
        args = {"hidden_states": latents, "timestep": time, "encoder_hidden_states": text, "return_dict": False}
        WAYS["block"].call(type(denoiser).forward, denoiser, (), args)[0].sum().backward()
        return count.peak, block


def test_two_blocks_are_on_the_device_at_a_time():
    (few, block), (many, _) = (peak(True, layers) for layers in (4, 8))
    whole, _ = peak(False, 8)
    assert many - few < block / 10
    assert whole - many > 5 * block


def test_blocks_whose_parts_run_again_by_themselves_are_refused():
    pipe, _ = make("svd")
    with pytest.raises(UsageError, match="UNetSpatioTemporalConditionModel has no blocks that run again one by one"):
        offload_blocks(pipe.unet, CPU)
