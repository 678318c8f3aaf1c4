"""What holds for every test."""

import os

# Several processes run tests at a time: with more threads than cores each would wait for the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny_pipelines
import tiny_runs
import torch
from torch import nn


def pytest_collection_modifyitems(items):
    """Begin with the longest test, beside which the other process does the rest."""
    items.sort(key=lambda item: item.name != "test_the_main_job")


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for a test, whether it runs alone, in another order, or again."""
    torch.manual_seed(0)


@pytest.fixture
def full_precision(monkeypatch):
    """Upsampling that does not pass through float32, as Wan's and Qwen-Image's does, so that float64 means float64."""
    from diffusers.models.autoencoders import autoencoder_kl_qwenimage, autoencoder_kl_wan

    monkeypatch.setattr(autoencoder_kl_wan.WanUpsample, "forward", nn.Upsample.forward)
    monkeypatch.setattr(autoencoder_kl_qwenimage.QwenImageUpsample, "forward", nn.Upsample.forward)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny Wan text-to-video pipeline."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_pipelines.wan_t2v().save_pretrained(folder)
    return folder


@pytest.fixture
def configure(model, tmp_path):
    """The config of a run of seconds on that pipeline, with overrides."""
    return lambda *overrides: tiny_runs.config(tmp_path, model, *overrides)
