import importlib.util
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tiny_runs
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from tiny_pipelines import PROMPTS, TARGETS, picture, svd, wan_i2v, wan_t2v

from chopgrad_align.data.video import read_video
from chopgrad_align.training.config_file import to_yaml

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
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = wan_t2v().transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))
    return folder


@pytest.fixture(scope="module")
def run(model, lora, tmp_path_factory):
    """As the trainer leaves it, of other settings than the model folder's."""
    folder = tmp_path_factory.mktemp("run")
    own = ["model.scheduler.flow_shift=5.0", "model.vae_dtype=bfloat16", "model.call.max_sequence_length=20"]
    config = tiny_runs.config(folder, model, *own, "model.fps=12")
    shutil.copytree(lora, folder / "run" / "lora")
    (folder / "run" / "config.yaml").write_text(to_yaml(config))
    return folder / "run"


@pytest.fixture
def written(monkeypatch):
    """What is written into the mp4 files, before h264 loses some of it."""
    videos = []
    monkeypatch.setattr("chopgrad_align.data.video.write_video", lambda *arguments: videos.append(arguments))
    return videos


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


def test_a_seed_is_a_video_by_a_stochastic_scheduler_too(generate, model, lora, written, tmp_path):
    config = tiny_runs.config(
        tmp_path, model, "model.scheduler={stochastic_sampling: true, name: FlowMatchEulerDiscreteScheduler}"
    )
    shutil.copytree(lora, tmp_path / "run" / "lora")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    for out, seed in (("a", 7), ("b", 7), ("c", 8)):
        generate("--run", tmp_path / "run", "--prompt", PROMPTS[0], "--seed", seed, "--out", tmp_path / out)
    first, again, other = (video for _, video, _ in written)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def the_runs_pipeline(model, lora, vae):
    """By diffusers alone; of the files, whose weights lie in memory as the script's do, so that sums round alike."""
    pipe = WanPipeline.from_pretrained(model, dtype={"default": torch.float32, "vae": vae})
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=5.0)
    pipe.load_lora_weights(str(lora))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_run_is_sampled_as_it_was_trained(generate, model, run, lora, written, tmp_path):
    generate("--run", run, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--seed", 3, "--out", tmp_path)
    pipe = the_runs_pipeline(model, lora, vae=torch.bfloat16)
    call = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 3.0}
    call["max_sequence_length"] = 20
    assert len(written) == 2
    for index, (_, video, fps) in enumerate(written):
        generator = torch.Generator().manual_seed(3 + index)
        assert torch.equal(video, pipe(PROMPTS[index], **call, generator=generator, output_type="pt").frames[0])
        assert fps == 12


def test_options_go_before_the_run(generate, model, run, lora, written, tmp_path):
    options = ["--steps", 2, "--guidance", 1, "--frames", 9, "--size", "32x16", "--fps", 7, "--dtype", "float32"]
    generate("--run", run, "--prompt", PROMPTS[0], *options, "--out", tmp_path)
    pipe = the_runs_pipeline(model, lora, vae=torch.float32)
    call = {"height": 32, "width": 16, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0}
    call["max_sequence_length"] = 20
    generator = torch.Generator().manual_seed(0)
    ((_, video, fps),) = written
    assert torch.equal(video, pipe(PROMPTS[0], **call, generator=generator, output_type="pt").frames[0])
    assert fps == 7


def test_a_lora_counts_as_much_as_asked(generate, model, run, lora, written, tmp_path):
    generate("--run", run, "--prompt", PROMPTS[0], "--lora-scale", 0.25, "--out", tmp_path)
    pipe = the_runs_pipeline(model, lora, vae=torch.bfloat16)
    pipe.set_adapters(pipe.get_active_adapters(), 0.25)
    call = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 3.0}
    call |= {"max_sequence_length": 20, "generator": torch.Generator().manual_seed(0)}
    ((_, video, _),) = written
    assert torch.equal(video, pipe(PROMPTS[0], **call, output_type="pt").frames[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "RUN", "--model", "x/y"], "--model: --run has a model and a LoRA of its own"),
        (["--run", "RUN", "--lora", "lora"], "--lora: --run has a model and a LoRA of its own"),
        (["--run", "none"], "--run: there is no none/config.yaml; give the folder of a run that has ended"),
        (["--run", "begun"], "--run: there is no begun/lora; give the folder of a run that has ended"),
        (["--run", "clips"], "--run: clips makes videos from clips, not from prompts; see chopgrad-align evaluate"),
        (["--run", "RUN", "--dtype", "float16"], "model.dtype: gradients of activations fall below"),
        (["--run", "RUN", "--frames", "6"], "would round num_frames=6"),
    ],
)
def test_bad_runs_end_in_one_sentence(generate, model, run, lora, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    restoration = tiny_runs.config(tmp_path, model, "data.clips={}", "prediction.mode=one_step")
    for folder, text in (("begun", (run / "config.yaml").read_text()), ("clips", to_yaml(restoration))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text(text)
    shutil.copytree(lora, tmp_path / "clips" / "lora")
    arguments = [run if argument == "RUN" else argument for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        generate(*arguments, "--prompt", "a star", "--out", tmp_path / "out")
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in error
    assert not (tmp_path / "out").exists()


def test_an_image_without_a_prompt_has_an_empty_one(generate, written, tmp_path):
    wan_i2v().save_pretrained(tmp_path / "wan")
    picture().save(tmp_path / "first.png")
    (tmp_path / "images.csv").write_text("image\nfirst.png\n")
    arguments = ["--model", tmp_path / "wan", "--prompts", tmp_path / "images.csv", "--frames", 5, "--size", "16x16"]
    generate(*arguments, "--steps", 2, "--out", tmp_path / "out")
    call = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(0)
    pipe = WanImageToVideoPipeline.from_pretrained(tmp_path / "wan")
    expected = pipe(image=picture(), prompt="", **call, generator=generator, output_type="pt").frames[0]
    assert torch.equal(written[0][1], expected)


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
        (["--lora-scale", "0.5"], "--lora-scale 0.5: there is no LoRA; give --run or --lora too"),
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
        assert "cannot be loaded" in capsys.readouterr().err
