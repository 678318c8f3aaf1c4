"""A run of the trainer that takes a second: tiny Wan, 16x16, three sampling steps."""

import json
from pathlib import Path

from safetensors.torch import load_file

from chopgrad_align.training.config_file import load_config

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "align.py"

_CONFIG = """
run: {{folder: {folder}/run, seed: 3}}
model:
  name: {model}
  call: {{height: 16, width: 16, num_frames: {frames}, num_inference_steps: 3, guidance_scale: 3.0}}
data: {{train: {folder}/train.txt, held_out: {folder}/held_out.txt}}
rewards:
  colour: {{name: colorfulness}}
train: {{steps: 2, batch_size: 2, learning_rate: 1.0e-2}}
lora: {{rank: 4}}
validation: {{pairs: 2, videos: 1}}
"""


def config_file(folder, model, frames=5):
    """Write a config and its prompts into a folder."""
    (folder / "train.txt").write_text("a red circle moving left\na large blue star spinning\na circle\nred\nblue\n")
    (folder / "held_out.txt").write_text("a large red star\na blue circle\n")
    path = folder / "config.yaml"
    path.write_text(_CONFIG.format(folder=folder, model=model, frames=frames))
    return path


def config(folder, model, *overrides, frames=5):
    return load_config(config_file(folder, model, frames), overrides)


def rows(run, kind="reward"):
    """Rows of `metrics.jsonl` that have a key, without what the clock and the machine decide."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(("seconds/", "peak_memory"))}
        for row in found
        if kind in row
    ]


def lora(run, step):
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "lora.safetensors")


def saved_lora(run):
    return load_file(run / "lora" / "pytorch_lora_weights.safetensors")
