"""Denoisers whose tokens several processes share; tests/test_distributed.py trains with them."""

import json
import os
import subprocess
import sys
import types

import pytest
import tiny_pipelines
import tiny_runs
from every_pipeline import ENTRIES

from chopgrad_align.common.errors import UsageError
from chopgrad_align.training.context import expect_splittable
from chopgrad_align.training.parallel import Replicas

WAN = {"height": 16, "width": 16, "num_frames": 5}  # 2 x 2 x 2 tokens
ODD = {"height": 8, "width": 8, "num_frames": 9}  # 3 tokens

# Frames and gradients of one process, and then of those that share the tokens: of each pipeline the relative error of
# the frames, of the sum of the gradients of the LoRA, and of those that a process has for itself.
COMPARED = """
import json, sys
import torch, torch.distributed
from gradients import relative_error, weighted
from test_context import SHARED
from test_rollout import add_lora
from chopgrad_align import LastSteps, rollout
from chopgrad_align.common.errors import UsageError
from chopgrad_align.sampling.block_offload import offload_blocks
from chopgrad_align.sampling.checkpointing import Checkpointing
from chopgrad_align.sampling.denoisers import denoisers_of
from chopgrad_align.training.context import split_tokens
from torch.distributed.device_mesh import init_device_mesh

torch.distributed.init_process_group("gloo")
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
mesh, errors = init_device_mesh("cpu", (1, 1, size), mesh_dim_names=("group", "ring", "ulysses")), {}
for name, (make, call) in SHARED.items():
    pipe = make()
    for denoiser in denoisers_of(pipe).values():
        add_lora(denoiser)
        if name == "offloaded":
            offload_blocks(denoiser, torch.device("cpu"))
    kept = Checkpointing("block", inputs="host") if name == "offloaded" else Checkpointing()
    weights = [w for denoiser in denoisers_of(pipe).values() for w in denoiser.parameters() if w.requires_grad]

    def outcome():
        video = rollout(pipe, LastSteps(2), checkpointing=kept, generator=torch.Generator().manual_seed(3), **call)
        weighted(video).backward()
        gradient = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])
        for weight in weights:
            weight.grad = None
        return video.detach(), gradient

    frames, gradient = outcome()
    split_tokens(pipe, mesh)
    shared, part = outcome()
    whole = part.clone()
    torch.distributed.all_reduce(whole)
    found = [relative_error(shared, frames), relative_error(whole, gradient), relative_error(part, gradient)]
    errors[name] = found
    if name == "pair":
        try:
            pipe.transformer(torch.zeros(1, 4, 3, 2, 2))
        except UsageError as error:
            errors["odd"] = str(error)
if rank == 0:
    print(json.dumps(errors))
torch.distributed.destroy_process_group()
"""


def _entry(name):
    entry = ENTRIES[name]
    return entry.make, {**entry.call, **entry.row}


_TEXT = {"prompt": tiny_pipelines.PROMPTS[0], "num_inference_steps": 3, "guidance_scale": 3.0, **WAN}
SHARED = {
    "wan": (tiny_pipelines.wan_t2v, _TEXT),
    "offloaded": (tiny_pipelines.wan_t2v, _TEXT),
    "pair": (lambda: tiny_pipelines.wan_t2v(two_stage=True), _TEXT),
    "image": (tiny_pipelines.wan_i2v, {**_TEXT, "image": tiny_pipelines.picture(size=32)}),
    "ltx": _entry("LTXPipeline"),
    "ltx_image": _entry("LTXImageToVideoPipeline"),
}


@pytest.mark.slow
def test_the_sum_of_the_processes_gradients_is_that_of_one(tmp_path):
    script = tmp_path / "compared.py"
    script.write_text(COMPARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    paths = {"PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert "latents of 1x4x3x2x2 are 3 tokens of WanTransformer3DModel" in errors.pop("odd")
    assert errors.keys() == SHARED.keys()
    for name, (frames, whole, part) in errors.items():
        assert frames == 0, name
        assert whole < 1e-5, name
        assert part > 1e-2, name


@pytest.mark.parametrize(
    ("kind", "processes", "call", "said"),
    [
        ("wan_t2v", 2, {}, None),
        ("wan_t2v", 2, {"num_frames": None}, None),  # those of a video, which is looked at in the call
        ("wan_t2v", 2, ODD, "9 frames of 8x8 are 3 tokens"),
        ("wan_t2v", 3, {}, "a divisor of the 2 attention heads of pipe.transformer"),
        ("wan_vace", 2, {}, "is a WanVACETransformer3DModel, whose tokens cannot be split"),
        ("cogvideox", 2, {}, "is a CogVideoXTransformer3DModel, whose tokens cannot be split"),
    ],
    ids=["splits", "open", "tokens", "heads", "vace", "cogvideox"],
)
def test_what_cannot_be_split_is_said_before_sampling(kind, processes, call, said):
    pipe = getattr(tiny_pipelines, kind)()
    if said is None:
        expect_splittable(pipe, [WAN | call], processes)
    else:
        with pytest.raises(UsageError, match=rf"parallel.context={processes}: .*{said}"):
            expect_splittable(pipe, [WAN | call], processes)


def test_gradients_that_each_process_has_whole_are_refused(tmp_path):
    options = ["parallel.context=2", "trainable.name=modules", "trainable.args.modules=[vae.decoder.conv_out]"]
    with pytest.raises(UsageError, match=r"trainable: parallel.context=2 adds up gradients"):
        tiny_runs.config(tmp_path, tmp_path, *options)


@pytest.fixture
def layout(monkeypatch):
    """The processes of a run of six, of which three are a group."""

    def made(rank, **sizes):
        accelerator = types.SimpleNamespace(
            process_index=rank, num_processes=6, device=types.SimpleNamespace(type="cuda"), is_main_process=rank == 0
        )
        monkeypatch.setattr("chopgrad_align.training.parallel.Accelerator", lambda **_: accelerator)
        return Replicas(**sizes)

    return made


def test_a_group_has_clips_of_its_own(layout):
    shares = [layout(rank, context=3).shares(8, 2) for rank in range(6)]
    assert shares == [[range(0, 2), range(2, 4)]] * 3 + [[range(4, 6), range(6, 8)]] * 3
    assert [layout(rank, context=3).first for rank in range(6)] == [True, False, False] * 2
    with pytest.raises(UsageError, match="multiple of groups of 3 processes × micro_batch = 2 × 1"):
        layout(0, context=3).shares(3, 1)


@pytest.mark.parametrize("key", ["shard", "context"])
def test_a_number_of_processes_that_does_not_go_round_is_named(layout, key):
    with pytest.raises(UsageError, match=rf"parallel.{key}=4: expected a divisor of the number of processes, 6"):
        layout(0, **{key: 4})
