"""The parts of a sharded denoiser that each process loads; tests/test_distributed.py trains with them."""

import shutil

import pytest
import tiny_pipelines
import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from chopgrad_align.common.errors import UsageError
from chopgrad_align.training.models import read_pipeline


@pytest.fixture(
    scope="module",
    params=[{}, {"max_shard_size": "20KB"}, {"variant": "fp16", "max_shard_size": "20KB"}],
    ids=["one", "several", "fp16"],
)
def saved(request, tmp_path_factory):
    """A pipeline's folder, its weights in one file or in several, and their variant."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipelines.wan_t2v().save_pretrained(folder, **request.param)
    return str(folder), request.param.get("variant")


@pytest.fixture(params=[0, 1], ids=["first", "second"])
def mesh(request):
    """Two processes that share a denoiser, of which only this one is there."""
    torch.distributed.init_process_group("fake", rank=request.param, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_a_process_reads_its_rows_of_each_weight_and_no_more(saved, mesh):
    folder, variant = saved
    dtypes = {"default": "bfloat16", "vae": "float32"}
    whole = read_pipeline(folder, "model", dtypes, variant).transformer
    part = read_pipeline(folder, "model", dtypes, variant, mesh).transformer
    weights = dict(part.named_parameters())
    assert list(weights) == [name for name, _ in whole.named_parameters()]
    for name, weight in whole.named_parameters():
        mine = weights[name].to_local()
        expected = (*weight.chunk(2), weight[:0])[mesh.get_local_rank()]
        assert mine.dtype == weight.dtype
        assert torch.equal(mine, expected), name
        assert mine.untyped_storage().nbytes() <= -(-len(weight) // 2) * weight[0].nbytes
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16, torch.float32}  # as its class asks for
    buffers = dict(part.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())


@pytest.mark.parametrize("saved", [{}], ids=["one"], indirect=True)
def test_a_file_without_all_weights_is_named(saved, mesh, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.weight"]
    save_file(weights, file)
    with pytest.raises(UsageError, match=r"model: cannot load .*proj_out.weight"):
        read_pipeline(str(folder), "model", {"default": "float32"}, None, mesh)
