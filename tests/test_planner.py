"""The planner: its figures against a real step's, the shapes that come with it, and its choice of a setting."""

import functools
import importlib
import json
import math
import runpy
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny_pipelines
import tiny_rewards
import tiny_runs
import torch
import yaml
from torch import nn

from chopgrad_align.common.errors import UsageError
from chopgrad_align.common.storage_count import StorageCount
from chopgrad_align.objective.statistics import Statistics
from chopgrad_align.planner import choose, stand_ins
from chopgrad_align.planner.report import as_it_is, fragment, in_words
from chopgrad_align.planner.simulate import Figures, Memory
from chopgrad_align.planner.weightless import Simulation, weightless
from chopgrad_align.sampling.steps import LastSteps
from chopgrad_align.training.config_file import load_config
from chopgrad_align.training.lora import TRAINED
from chopgrad_align.training.methods.direct import DirectGradient
from chopgrad_align.training.models import load_objective

simulate = importlib.import_module("chopgrad_align.planner.simulate")  # the package has a function of this name
GIB = 2**30
SCRIPT = Path(__file__).parents[1] / "scripts" / "plan.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the checkpoints of tiny pipelines and rewards."""
    folder = tmp_path_factory.mktemp("planner")
    for name in ("wan_t2v", "wan_vace", "wan_i2v", "cogvideox", "svd", "animatediff"):
        getattr(tiny_pipelines, name)().save_pretrained(folder / name)
    tiny_rewards.make_checkpoints(folder / "rewards")
    return folder


def run(folder, model, *overrides):
    frames = {"cogvideox": 9, "svd": 4, "animatediff": 3}.get(model, 5)
    return tiny_runs.config(folder, folder / model, *overrides, frames=frames)


def learned_rewards(folder):
    """Of open_clip and of transformers, with a head in a torch file."""
    return [
        "rewards.hps.name=hps_v2",
        f"rewards.hps.args.checkpoint={folder / 'rewards' / 'hps'}",
        f"rewards.hps.args.model={tiny_rewards.ARCHITECTURE}",
        "rewards.aesthetic.name=aesthetic",
        "rewards.aesthetic.args.frames_per_chunk=2",
        f"rewards.aesthetic.args.clip={folder / 'rewards' / 'vit'}",
        f"rewards.aesthetic.args.head={folder / 'rewards' / 'head.pth'}",
    ]


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("wan_t2v", ["gradient.cache=host", "model.gradient_checkpointing=true", "gradient.last_steps=2"]),
        ("wan_t2v", ["gradient.checkpoint=false", "train.micro_batch=2", "gradient.denoiser.checkpoint=none"]),
        ("wan_t2v", ["gradient.denoiser={checkpoint: block, inputs: host}", "model.offload=blocks"]),
        ("cogvideox", ["gradient.cache=recompute", "gradient.denoiser.checkpoint=2"]),
        ("animatediff", []),
        pytest.param("wan_i2v", ["gradient.cache=host"], marks=pytest.mark.slow),
        pytest.param("svd", ["~model.call.guidance_scale"], marks=pytest.mark.slow),
    ],
)
def test_simulated_figures_are_those_of_a_real_step_exactly(folder, model, overrides):
    config = run(folder, model, *[o for o in overrides if not o.startswith("~")])
    for key in (o for o in overrides if o.startswith("~")):
        del config.model.call[key.rpartition(".")[2]]
    real = counted(config)
    assert simulate.simulate(config) == real
    encoding = set() if model == "svd" else {"encoding prompts"}  # it has no prompts
    assert real.phases.keys() == {*choose.PHASES, *encoding}


L1 = ["~rewards.colour", "losses.l1.name=l1", "model.call.guidance_scale=1"]


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("wan_t2v", ["prediction.mode=one_step", "data.clips.degradation={name: blur}", "train.micro_batch=2"]),
        ("wan_t2v", ["prediction.mode=one_step", "data.clips.degradation={name: blur}", "gradient.decoder=truncated"]),
        ("wan_vace", ["data.clips.mask={name: boxes}", "prediction.columns={video: degraded, mask: mask}"]),
        ("cogvideox", ["prediction.mode=denoise", "data.clips={}", "losses.usual.name=diffusion"]),
        ("wan_t2v", ["prediction.mode=denoise", "data.clips={}", "losses.usual.name=diffusion", "~losses.l1"]),
    ],
)
def test_simulated_figures_of_clips_are_those_of_a_real_step_exactly(folder, model, overrides):
    config = run(folder, model, *L1, *overrides)
    real = counted(config)
    assert simulate.simulate(config) == real
    assert real.resident["clips"] > 0
    streamed = "gradient.decoder=truncated" in overrides
    undecoded = "~losses.l1" in overrides
    passed = {"reward backward", "decoder backward"} if streamed or undecoded else set()
    assert real.phases.keys() == {*choose.PHASES, "encoding prompts"} - passed - ({"decoding"} if undecoded else set())


def test_clips_are_of_the_largest_bucket_and_have_the_roles_that_the_config_names(folder):
    overrides = ["data.clips.buckets=[[5,16,16],[9,16,32]]", "data.clips.mask={name: boxes}", "train.micro_batch=2"]
    columns = ["data.clips.columns={target: a, caption: b, control: c}", "prediction.columns={image: image}"]
    videos = simulate.load(run(folder, "wan_i2v", *L1, *overrides, *columns), nullcontext()).batch.videos
    assert {role: tuple(video.shape) for role, video in videos.items()} == {
        "control": (2, 9, 3, 16, 32),
        "degraded": (2, 9, 3, 16, 32),
        "image": (2, 1, 3, 16, 32),
        "mask": (2, 9, 1, 16, 32),
        "target": (2, 9, 3, 16, 32),
    }


def test_arguments_that_the_pipeline_does_not_take(folder):
    with pytest.raises(UsageError, match="WanPipeline takes no argument 'nothing'"):
        simulate.simulate(run(folder, "wan_t2v", *L1, "data.clips={}", "prediction.columns={nothing: target}"))


def test_losses_that_are_streamed_have_a_lever_where_they_are_taken(folder):
    """By the chunk of a loss of single frames, in the phase in which it is read."""
    one_step = ["prediction.mode=one_step", "data.clips.degradation={name: blur}", "gradient.decoder=truncated"]
    config = run(folder, "wan_t2v", *L1, *one_step)
    (lever,) = (lever for lever in choose.levers(config, {"losses.l1": 8}) if lever.rungs[0] == {})
    assert lever.phases == ("decoding", "reward", "reward backward")
    assert [rung["losses.l1.args.frames_per_chunk"] for rung in lever.rungs[1:]] == [4, 2, 1]


def test_a_loss_without_an_argument_for_its_chunk_is_no_lever(folder, tmp_path):
    (tmp_path / "own.py").write_text(
        "from chopgrad_align.objective.losses.protocol import FrameLoss\n\n\n"
        "class Own(FrameLoss):\n"
        "    def __init__(self):\n"
        "        super().__init__(frames_per_chunk=8)\n\n"
        "    def error(self, frames, target):\n"
        "        return (frames - target).abs().mean(1)\n"
    )
    losses = ["losses.l1.args={frames_per_chunk: 3}", f"losses.own.name={tmp_path}/own.py:Own", "data.clips={}"]
    assert counted(run(folder, "wan_t2v", *L1, *losses)).chunks == {"losses.l1": 3}


@pytest.mark.parametrize(("model", "size"), [("wan_i2v", (832, 480)), ("svd", (1024, 576))])
def test_an_image_is_of_the_size_that_the_pipeline_makes_by_itself(model, size):
    pipe = getattr(tiny_pipelines, model)()
    assert simulate._inputs(pipe, {}, 1)["image"].size == size
    assert simulate._inputs(pipe, {"height": 16, "width": 32}, 1)["image"].size == (32, 16)


@pytest.mark.slow
def test_a_run_without_a_size_is_one_of_the_pipelines_own(folder, tmp_path):
    shutil.copytree(folder / "wan_i2v", tmp_path / "wan_i2v")
    settings = tmp_path / "wan_i2v" / "transformer" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"rope_max_seq_len": 128}))
    own = simulate.simulate(run(tmp_path, "wan_i2v", "~model.call.height", "~model.call.width"))
    assert own == simulate.simulate(run(tmp_path, "wan_i2v", "model.call.height=480", "model.call.width=832"))


class ImagePipeline:
    """As CogVideoX's: the size is its transformer's, if it is not given."""

    def __call__(self, image, prompt=None, height=None, width=None):
        """Nothing."""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, r"model\.call: height and width are missing, for which ImagePipeline has no default"),
        ({"height": 16}, r"model\.call: width is missing"),
        ({"height": None, "width": 16}, r"model\.call: height is missing"),
    ],
)
def test_an_image_whose_size_is_not_known(call, message):
    with pytest.raises(UsageError, match=message):
        simulate._inputs(ImagePipeline(), call, 1)


@pytest.mark.parametrize(
    ("model", "call", "limit", "length"),
    [
        ("wan_t2v", {}, 77, 512),
        ("wan_t2v", {"max_sequence_length": 24}, 77, 24),
        ("animatediff", {}, 12, 12),
        ("animatediff", {}, 77, 16),  # positions of its encoder
        ("animatediff", {}, int(1e30), 16),  # of a tokenizer that was saved without one
    ],
)
def test_prompts_are_as_long_as_the_pipeline_pads_them(model, call, limit, length):
    pipe = getattr(tiny_pipelines, model)()
    pipe.tokenizer.model_max_length = limit
    inputs = simulate._inputs(pipe, call, 2)
    assert inputs["prompt_embeds"].shape == inputs["negative_prompt_embeds"].shape == (2, length, 8)


def test_prompts_of_any_length_are_an_error():
    pipe = tiny_pipelines.animatediff()
    pipe.tokenizer.model_max_length = int(1e30)
    pipe.text_encoder = tiny_pipelines.cogvideox().text_encoder  # T5 has no positions that could end
    with pytest.raises(UsageError, match="how long the prompts of AnimateDiffPipeline are"):
        simulate._inputs(pipe, {}, 1)


def test_learned_rewards_are_loaded_without_their_weights_and_count_the_same(folder):
    config = run(folder, "wan_t2v", *learned_rewards(folder))
    real = counted(config)
    assert real.resident["reward hps"] > 0
    assert real.resident["reward aesthetic"] > 0
    assert real.chunks == {"rewards.colour": 8, "rewards.hps": 8, "rewards.aesthetic": 2}
    assert simulate.simulate(config) == real


def test_the_phases_cover_the_step(folder):
    """The largest of them is what a count of the trainer's own step finds, which knows no phases."""
    config = run(folder, "wan_t2v", "gradient.cache=host")
    figures = counted(config)
    loaded = simulate.load(config, nullcontext())
    method = DirectGradient(
        pipe=loaded.models.pipe,
        call=config.model.call | {"num_inference_steps": 2},
        objective=loaded.models.objective,
        steps=LastSteps(1),
        backprop=config.gradient.policy(),
        batch_size=config.train.batch_size,
        phases=lambda name: nullcontext(),
    )
    with StorageCount() as count:
        optimizer = torch.optim.AdamW(loaded.models.trainable.parameters)
        for parameter in loaded.models.trainable.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert count.now == figures.resident["optimizer"]
        count.peak = count.now
        method.accumulate(loaded.batch, {"colour": Statistics(0, 1, 1)})
    weights = sum(figures.resident.values()) - figures.resident["optimizer"]
    assert weights + count.peak == max(m.device for name, m in figures.phases.items() if name != "optimizer")
    assert count.host_peak == figures.host > 0


def test_the_moving_average_counts(folder):
    plain, averaged = (counted(run(folder, "wan_t2v", *option)) for option in ([], ["ema.decay=0.9"]))
    trained = 4 * sum(
        p.numel() for p in simulate.load(run(folder, "wan_t2v"), nullcontext()).models.trainable.parameters
    )
    assert (plain.resident["average"], averaged.resident["average"]) == (0, trained)
    assert averaged.phases["sampling"].device == plain.phases["sampling"].device + trained


def test_libraries_load_weights_again_afterwards(folder):
    simulate.simulate(run(folder, "cogvideox"))
    assert nn.Linear(2, 2).to(torch.float64).weight.dtype == torch.float64
    real = simulate.load(run(folder, "cogvideox"), nullcontext())
    assert type(next(real.models.pipe.vae.parameters()).data) is torch.Tensor


def counted(config, limit=math.inf):
    """The figures of a real step, which are the simulated ones, and quicker to have of a tiny model."""
    return simulate.one_step(config, simulate.load(config, nullcontext()), limit)


@functools.cache
def larger(folder, *overrides, limit=math.inf):
    """Activations are larger than weights."""
    size = ["model.call.height=64", "model.call.width=64", "model.call.num_frames=9"]
    return counted(run(folder, "wan_t2v", *size, *overrides), limit)


def test_more_frames_never_need_less(folder):
    few, more = larger(folder, "model.call.num_frames=5"), larger(folder)
    for name, memory in few.phases.items():
        assert memory.device <= more.phases[name].device, name
        assert memory.host <= more.phases[name].host, name
    assert few.peak < more.peak


@pytest.mark.parametrize(
    ("phase", "dear", "cheap"),
    [
        ("denoiser backward", [], ["model.gradient_checkpointing=true"]),
        ("sampling", ["gradient.denoiser.checkpoint=none"], ["gradient.denoiser.checkpoint=block"]),
        ("decoding", ["gradient.denoiser.checkpoint=block"], ["gradient.denoiser={checkpoint: block, inputs: host}"]),
        ("decoder backward", ["gradient.checkpoint=false"], []),
        ("decoder backward", [], ["gradient.cache=host"]),
        ("decoder backward", ["gradient.cache=host"], ["gradient.cache=host", "gradient.rows=8"]),
        ("reward backward", [], ["rewards.colour.args.frames_per_chunk=1"]),
        ("sampling", ["train.micro_batch=2"], []),
        ("optimizer", ["lora.rank=8"], []),
    ],
)
def test_each_lever_lowers_its_phase(folder, phase, dear, cheap):
    dearer, cheaper = (larger(folder, *o) for o in (dear, cheap))
    assert cheaper.phases[phase].device < dearer.phases[phase].device


@pytest.mark.parametrize("phase", choose.PHASES[:5])
def test_a_step_that_is_too_large_is_left_where_it_is(folder, phase):
    whole = larger(folder, "gradient.checkpoint=false")
    limit = whole.phases[phase].device - 1
    first = next(name for name in choose.PHASES if whole.phases[name].device > limit)
    part = larger(folder, "gradient.checkpoint=false", limit=limit)
    through = list(choose.PHASES[: choose.PHASES.index(first) + 1])
    assert list(part.phases) == ["encoding prompts", *through]
    assert part.phases == {name: whole.phases[name] for name in part.phases}
    assert whole.complete
    assert not part.complete


# --- shapes that come with the planner --------------------------------------------------------------------------------

DENOISERS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": 2_153_972_032,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 16_394_878_784,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": 16_394_878_784,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14_288_491_584,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 14_288_901_184,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 4_999_787_712,
    "Skywork/SkyReels-V2-T2V-14B-540P-Diffusers": 14_288_491_584,
    "THUDM/CogVideoX-2b": 1_693_783_872,
    "THUDM/CogVideoX-5b": 5_570_283_072,
    "THUDM/CogVideoX-5b-I2V": 5_570_479_680,
    "THUDM/CogVideoX1.5-5B": 5_570_676_352,
    "Lightricks/LTX-Video": 1_923_385_472,
    "Lightricks/LTX-Video-0.9.8-13B-distilled": 13_042_569_344,
    "Lightricks/LTX-2": 18_876_174_592,
    "hunyuanvideo-community/HunyuanVideo": 12_821_012_544,
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": 8_326_608_160,
    "genmo/mochi-1-preview": 10_027_677_744,
    "nvidia/Cosmos-Predict2.5-2B": 2_059_174_912,
    "stabilityai/stable-video-diffusion-img2vid-xt": 1_524_623_082,
    "SG161222/Realistic_Vision_V5.1_noVAE": 859_520_964 + 453_209_280,  # Stable Diffusion 1.5, and the motion modules
}
OTHERS = {
    "UMT5EncoderModel": {5_680_910_336},
    "T5EncoderModel": {4_762_310_656, 219_314_944},
    "Gemma3ForConditionalGeneration": {12_187_325_040},
    "LlamaModel": {7_505_186_816},
    "Qwen2_5_VLTextModel": {7_070_619_136},
    "Qwen2_5_VLForConditionalGeneration": {8_292_166_656},
    "CLIPTextModel": {123_060_480},
    "CLIPVisionModel": {630_766_080},
    "CLIPVisionModelWithProjection": {632_076_800},
    "AutoencoderKL": {83_653_863},
    "AutoencoderKLWan": {126_892_531, 704_688_668},
    "AutoencoderKLCogVideoX": {215_583_907},
    "AutoencoderKLLTXVideo": {419_193_649, 1_246_913_522},
    "AutoencoderKLLTX2Video": {1_222_479_601},
    "AutoencoderKLLTX2Audio": {53_248_146},
    "LTX2Vocoder": {55_592_802},
    "LTX2TextConnectors": {1_431_475_200},
    "AutoencoderKLHunyuanVideo": {246_478_803},
    "AutoencoderKLHunyuanVideo15": {1_260_634_115},
    "AutoencoderKLMochi": {459_748_611},
    "AutoencoderKLTemporalDecoder": {97_742_847},
}
"""Weights of the published files where figures are to be had, else of the class with the published settings."""
SETTINGS = ("scheduler", "image_processor", "feature_extractor", "guider")
"""Components without weights."""


def weights(settings):
    import diffusers
    import transformers
    from diffusers.pipelines import ltx2

    config = dict(settings)
    name, library = config.pop("class"), config.pop("library", "diffusers")
    with torch.device("meta"):
        if library == "ltx2" or hasattr(diffusers, name):
            model = getattr(ltx2 if library == "ltx2" else diffusers, name).from_config(config)
        else:
            cls = getattr(transformers, name)
            model = cls(cls.config_class(**config))
    return sum(p.numel() for p in model.parameters())


def test_the_models_have_as_many_weights_as_the_published_ones():
    models = stand_ins.known_models()
    aliases = {alias for model in models.values() for alias in model.get("aliases", ())}
    assert models.keys() - aliases == DENOISERS.keys()
    found = {}
    counts = {}
    for name, model in models.items():
        for part, settings in model["components"].items():
            if part in SETTINGS:
                continue
            key = json.dumps(settings)
            if key not in counts:
                counts[key] = weights(settings)
            if part not in TRAINED:
                found.setdefault(settings["class"], set()).add(counts[key])
            elif name in DENOISERS:
                assert counts[key] == DENOISERS[name], name
    assert found == OTHERS


def published(model, size, frames, *overrides):
    height, width = size
    call = {"height": height, "width": width, "num_frames": frames, **stand_ins.known_models()[model]["call"]}
    given = choose.sections(model, ["colorfulness"], call)
    return choose.config_of(given, ["gradient.cache=host", "model.gradient_checkpointing=true", *overrides])


def test_published_rewards_have_the_weights_of_their_checkpoints(tmp_path):
    names = ("aesthetic", "hps_v2", "pick_score")
    config = published("Lightricks/LTX-Video", (64, 64), 9, *(f"rewards.{name}.name={name}" for name in names))
    stand_ins.write_hub(tmp_path)
    with weightless(Simulation(), tmp_path):
        objective = load_objective(config.rewards, torch.device("cpu"))
    found = {name: sum(p.numel() for p in objective.terms[name].reward.parameters()) for name in names}
    # CLIP ViT-L/14's vision tower with its projection, and the head; ViT-H/14 twice.
    assert found["aesthetic"] == pytest.approx(303_966_208 + 923_985, rel=1e-3)
    assert found["hps_v2"] == pytest.approx(986_109_441, rel=1e-3)
    assert found["pick_score"] == pytest.approx(985_060_865, rel=2e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")  # of Mochi's pipeline
@pytest.mark.parametrize(
    ("model", "size", "frames"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (480, 832), 9),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (480, 832), 5),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", (480, 832), 5),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", (704, 1280), 5),
        ("THUDM/CogVideoX-2b", (480, 720), 9),
        ("THUDM/CogVideoX-5b", (480, 720), 9),
        ("Lightricks/LTX-Video", (480, 704), 25),
        ("hunyuanvideo-community/HunyuanVideo", (320, 512), 17),
        ("Lightricks/LTX-2", (64, 96), 9),
        ("genmo/mochi-1-preview", (64, 96), 7),
        ("stabilityai/stable-video-diffusion-img2vid-xt", (64, 128), 5),
        ("SG161222/Realistic_Vision_V5.1_noVAE", (64, 64), 4),
    ],
)
def test_every_published_model(model, size, frames):
    figures = simulate.simulate(published(model, size, frames))
    denoiser = figures.resident.get("transformer") or figures.resident["unet"]
    assert denoiser >= 2 * DENOISERS[model]
    assert figures.peak > sum(figures.resident.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan2.1_t2v_1.3b_sr_x4", "wan2.1_vace_1.3b_inpaint", "cogvideox_2b_enhance"])
def test_every_config_of_pixel_losses_of_a_published_model(name):
    smaller = ["model.call.height=64", "model.call.width=96", "model.call.num_frames=9"]
    config = load_config(Path(__file__).parents[1] / "configs" / f"{name}.yaml", smaller)
    figures = simulate.simulate(config)
    assert figures.resident["transformer"] >= 2 * DENOISERS[config.model.name]
    assert figures.peak > sum(figures.resident.values())


# --- the choice -------------------------------------------------------------------------------------------------------


def pretended(config, limit):
    """Figures by a formula that knows the levers."""
    gradient, graph, batch = config.gradient, config.gradient.denoiser, config.train.micro_batch
    decoder = {"device": 40, "host": 10}[gradient.cache] if gradient.checkpoint is False else 20
    if gradient.checkpoint and gradient.cache == "host":
        decoder = 6 if gradient.rows is None else 2 + gradient.rows / 64
    chunk = config.rewards["colour"].args.get("frames_per_chunk", 8)
    phases = {
        "sampling": 3 * batch,
        "decoding": 2 * batch,
        "reward": 1,
        "reward backward": chunk,
        "decoder backward": decoder * batch,
        "denoiser backward": (13 if graph.checkpoint == "none" else 12 if graph.checkpoint == "call" else 4) * batch,
        "optimizer": 1,
    }
    memory = {}
    for name, value in phases.items():
        memory[name] = Memory(int(value * GIB), 0)
        if value * GIB > limit and name != "denoiser backward":
            break
    return Figures({"transformer": GIB}, memory, {"rewards.colour": 8})


@pytest.mark.parametrize(
    ("gib", "chosen"),
    [
        (80, {"cache": "device", "checkpoint": False, "rows": None, "chunk": None, "denoiser": "none", "batch": 2}),
        (24, {"cache": "host", "checkpoint": False, "rows": None, "chunk": None, "denoiser": "call", "batch": 2}),
        (20, {"cache": "host", "checkpoint": False, "rows": None, "chunk": None, "denoiser": "block", "batch": 2}),
        (13, {"cache": "host", "checkpoint": True, "rows": None, "chunk": None, "denoiser": "block", "batch": 2}),
        (8, {"cache": "host", "checkpoint": True, "rows": 128, "chunk": None, "denoiser": "block", "batch": 2}),
        (7, {"cache": "host", "checkpoint": True, "rows": None, "chunk": 4, "denoiser": "block", "batch": 1}),
        (4, {"cache": "host", "checkpoint": True, "rows": 128, "chunk": 4, "denoiser": "block", "batch": 1}),
    ],
)
def test_the_fastest_setting_that_fits(folder, gib, chosen):
    config = run(folder, "wan_t2v", "train.micro_batch=2")
    plan = choose.make_plan(config, gib * GIB, simulate=pretended)
    assert plan.chosen is plan.trials[-1]
    assert plan.chosen.figures.complete
    assert plan.chosen.figures.peak <= gib * GIB
    setting = plan.chosen.setting
    assert setting["gradient.cache"] == chosen["cache"]
    assert setting["gradient.checkpoint"] == chosen["checkpoint"]
    assert setting["gradient.rows"] == chosen["rows"]
    assert setting.get("rewards.colour.args.frames_per_chunk") == chosen["chunk"]
    assert setting["gradient.denoiser.checkpoint"] == chosen["denoiser"]
    assert setting["train.micro_batch"] == chosen["batch"]


@pytest.mark.parametrize("gib", [3.5, 2.5])
def test_nothing_fits(folder, gib):
    plan = choose.make_plan(run(folder, "wan_t2v", "train.micro_batch=2"), int(gib * GIB), simulate=pretended)
    assert plan.chosen is None
    assert plan.trials[-1].figures.complete
    assert plan.trials[-1].figures.peak == 4 * GIB
    words = in_words(plan, {})
    assert f"nothing fits {gib} GiB: the least is 4.0 GiB, in the phase 'decoder backward'; take a larger" in words


def test_weights_alone_are_too_large(folder):
    plan = choose.make_plan(run(folder, "wan_t2v"), GIB // 2, simulate=pretended)
    assert "of it 1.0 stay on the device all the time" in in_words(plan, {})


def test_the_fragment_is_read_by_the_config_loader(folder, tmp_path):
    """Pasted under the sections that every run has of its own, it is the run that was simulated."""
    given = choose.sections("Lightricks/LTX-Video", ["colour"], {"height": 64, "width": 64, "num_frames": 9})
    overrides = ["lora.rank=8", "rewards.colour.name=colorfulness", "train.batch_size=2", "train.micro_batch=2"]
    simulated = []

    def simulating(config, limit):
        simulated.append(config)
        return pretended(config, limit)

    plan = choose.make_plan(choose.config_of(given, overrides), 8 * GIB, simulate=simulating)
    pasted = fragment(plan.chosen.setting, given, [*overrides, "train.steps=1"])
    own = "run: {folder: runs/planned}\n"
    own += "data: {train: '${configs:prompts/train.txt}', held_out: '${configs:prompts/held_out.txt}'}\n"
    (tmp_path / "config.yaml").write_text(own + pasted)
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded == simulated[-1]
    assert (loaded.gradient.cache, loaded.gradient.rows, loaded.lora.rank) == ("host", 128, 8)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def main(monkeypatch):
    """The script's; it silences loggers and warnings for its own process."""
    monkeypatch.setattr("logging.disable", lambda level: None)
    with warnings.catch_warnings():
        yield runpy.run_path(str(SCRIPT))["main"]


def test_the_command_plans_for_a_config_in_json_and_in_words(folder, capsys, main):
    run(folder, "cogvideox")
    command = ["--config", str(folder / "config.yaml"), "--gpu", "24GiB"]
    half = ["model.dtype=bfloat16", "model.vae_dtype=bfloat16"]
    main([*command, "--json", *half])
    result = json.loads(capsys.readouterr().out)
    assert result["limit"] == int(22.5 * GIB)
    assert result["fits"]
    assert result["chosen"]["setting"]["gradient.cache"] == "device"
    assert result["config"]["model"] == {"dtype": "bfloat16", "vae_dtype": "bfloat16"}
    fastest = ["gradient.checkpoint=false", "gradient.denoiser.checkpoint=none"]
    assert result["chosen"]["device"] == counted(run(folder, "cogvideox", *half, *fastest)).peak
    with pytest.raises(SystemExit) as stopped:
        main([*command[:2], "--gpu", "1.5001GiB"])
    assert stopped.value.code == 1
    assert "nothing fits" in capsys.readouterr().out


def test_the_command_counts_a_run_as_it_is(folder, capsys, main):
    config = run(folder, "wan_t2v", "gradient.cache=host")
    main(["--config", str(folder / "config.yaml"), "gradient.cache=host"])
    words = capsys.readouterr().out
    figures = counted(config)
    assert f"as it is: {as_it_is(figures)}\n" in words
    assert as_it_is(figures).startswith(f"{figures.peak / GIB:.1f} GiB of the device, in the phase '{figures.largest}'")
    with pytest.raises(SystemExit, match="2"):
        main(["--config", str(folder / "config.yaml"), "--json"])
    assert "give --gpu too" in capsys.readouterr().err


def test_the_command_plans_for_a_folder(folder, capsys, main):
    main(["--model", str(folder / "cogvideox"), "--size", "16x16", "--frames", "9", "--gpu", "24GiB", "lora.rank=2"])
    words = capsys.readouterr().out
    assert "denoiser backward" in words
    pasted = yaml.safe_load(words.rpartition("that does:")[2])
    assert pasted["model"]["call"] == {"height": 16, "width": 16, "num_frames": 9}
    assert pasted["lora"] == {"rank": 2}
    kept = {"checkpoint": "none", "inputs": "device"}
    assert pasted["gradient"] == {"checkpoint": False, "rows": None, "cache": "device", "denoiser": kept}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model", "x/y", "--frames", "5"], "--size is missing"),
        (["--model", "x/y", "--size", "64x64", "--frames", "0"], "--frames: expected a whole number"),
        (["--model", "x/y", "--size", "64x64", "--frames", "5"], "no shapes for 'x/y'; give a folder"),
        (["--model", "FOLDER", "--size", "17x16", "--frames", "5"], "height=17; it makes multiples of 8"),
        (["--model", "FOLDER", "--size", "16x16", "--frames", "6"], "num_frames=6; it makes 4k"),
        (
            ["--model", "Lightricks/LTX-Video", "--size", "33x64", "--frames", "9"],
            "height=33; it makes multiples of 32",
        ),
        (
            [
                "--model",
                "FOLDER",
                "--size",
                "16x16",
                "--frames",
                "5",
                "model.call.guidance_scale_2=2.0",
            ],
            "model.call: WanPipeline refuses it",
        ),
        (["--model", "FOLDER", "--size", "16x16", "--frames", "5", "--reward", "hps"], "no reward is called 'hps'"),
        (["--gpu", "24", "--config", "a.yaml"], "--gpu=24: expected a number with GiB"),
        (["--gpu", "1GiB", "--config", "a.yaml"], "leaves nothing of --gpu"),
        (["--config", "a.yaml", "--frames", "5"], "--config has the model"),
        (["--config", "a.yaml"], "no config file"),
    ],
)
def test_wrong_arguments_are_errors_in_one_sentence(arguments, message, folder, capsys, main):
    arguments = [str(folder / "wan_t2v") if argument == "FOLDER" else argument for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["--gpu", "24GiB", *arguments])
    assert stopped.value.code == 2  # of every script
    printed = capsys.readouterr()
    assert printed.out == ""
    (error,) = (line for line in printed.err.splitlines() if not line.startswith("trying"))
    assert error.startswith("error: ")
    assert message in error


def test_a_size_is_height_and_width(capsys, main):
    with pytest.raises(SystemExit, match="2"):
        main(["--gpu", "24GiB", "--model", "x/y", "--size", "64", "--frames", "5"])
    assert "argument --size: expected HEIGHTxWIDTH such as 480x832, got '64'" in capsys.readouterr().err


def test_a_reward_whose_checkpoint_is_not_there(folder):
    with pytest.raises(UsageError, match=r"image_reward.*The planner downloads nothing"):
        simulate.simulate(run(folder, "wan_t2v", "rewards.image.name=image_reward"))
