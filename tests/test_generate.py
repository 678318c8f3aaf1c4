import importlib.util
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tiny_pipelines import PROMPTS, TARGETS, picture, svd, wan_t2v

from chopgrad_align.data.video import read_video

SCRIPT = Path(__file__).parents[1] / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    wan_t2v().save_pretrained(folder)
    defaults = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}
    (folder / "call_defaults.json").write_text(json.dumps(defaults))
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = wan_t2v().transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))
    return folder


def test_prompts_become_files_that_are_never_overwritten(generate, model, tmp_path, capsys):
    arguments = ["--model", model, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--out", tmp_path, "--fps", 12]
    generate(*arguments)
    names = ["000-a-red-circle-moving-left.mp4", "001-a-large-blue-star-spinning.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    video, fps = read_video(tmp_path / names[0])
    assert video.shape == (5, 3, 16, 16)
    assert fps == 12

    content = (tmp_path / names[0]).read_bytes()
    with pytest.raises(SystemExit, match="2"):
        generate(*arguments)
    assert f"error: {tmp_path / names[0]} exists; choose another --out" in capsys.readouterr().err
    assert (tmp_path / names[0]).read_bytes() == content
    generate(*arguments, "--overwrite", "--frames", 9, "--size", "32x16")
    assert read_video(tmp_path / names[0])[0].shape == (9, 3, 32, 16)


def test_the_video_is_the_pipelines_own_and_the_lora_changes_it(generate, model, lora, tmp_path):
    pipe = wan_t2v()
    generator = torch.Generator().manual_seed(4)
    call = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}
    expected = pipe(PROMPTS[1], **call, generator=generator, output_type="pt").frames[0]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    plain, adapted = tmp_path / "plain", tmp_path / "adapted"
    arguments = ["--model", model, "--prompts", tmp_path / "prompts.txt", "--seed", 3]
    generate(*arguments, "--out", plain)
    generate(*arguments, "--out", adapted, "--lora", lora)
    name = "001-a-large-blue-star-spinning.mp4"
    video = read_video(plain / name)[0]
    assert (video.mean((2, 3)) - expected.mean((2, 3))).abs().max() < 0.02  # h264 keeps means, not noise
    assert (plain / name).read_bytes() != (adapted / name).read_bytes()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers, numpy 2
def test_an_image_alone_is_enough_for_image_to_video(generate, tmp_path, capsys):
    svd().save_pretrained(tmp_path / "svd")
    picture().save(tmp_path / "first.png")
    (tmp_path / "images.csv").write_text("image\nfirst.png\n")
    arguments = ["--model", tmp_path / "svd", "--prompts", tmp_path / "images.csv", "--frames", 4, "--size", "16x16"]
    generate(*arguments, "--steps", 2, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000-first.mp4"]
    with pytest.raises(SystemExit, match="2"):
        generate(*arguments, "--guidance", 3, "--out", tmp_path / "other")
    assert "takes no argument 'guidance_scale'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "--model: there is no folder no/such/folder; give one, or a hub id"),
        (["--model", "."], "--model: . holds no diffusers pipeline"),
        (["--model", "no/body"], "--model: cannot load no/body; check the name and the network"),
        (["--lora", "none"], "there are no LoRA weights none; give"),
        (["--frames", "6"], "would round num_frames=6"),
        (["--size", "20x16"], "would round height=20"),
        (["--dtype", "float32", "--prompt", " "], "an empty --prompt"),
    ],
)
def test_bad_arguments_end_in_one_sentence(generate, model, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="2"):
        generate("--model", model, "--prompt", "a star", "--out", tmp_path / "out", *arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_file_and_a_lora_of_another_model(generate, model, lora, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("")
    with pytest.raises(SystemExit, match="2"):
        generate("--model", model, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    assert "is empty" in capsys.readouterr().err
    svd().save_pretrained(tmp_path / "svd")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"cut")
    for folder, weights in [(tmp_path / "svd", lora), (model, cut)]:
        with pytest.raises(SystemExit, match="2"):
            generate("--model", folder, "--prompt", "a", "--lora", weights, "--out", tmp_path / "out")
        assert "does not fit" in capsys.readouterr().err
