"""A rollout against the pipeline's own call (bits) and against a graph built without any of our code (gradients)."""

import copy
import functools
import gc
import inspect
from dataclasses import replace

import pytest
import tiny_pipelines
import tiny_vaes
import torch
from torch import Tensor

from chopgrad_align.common.errors import UsageError
from chopgrad_align.decoding.backprop import Exact, Full, Truncated
from chopgrad_align.sampling.rollout import check_call, differentiable, rollout
from chopgrad_align.sampling.steps import LastSteps, LowVariance, RandomLast, Steps

# diffusers' Euler scheduler calls numpy.array on a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

KINDS = ["wan_euler", "wan_unipc", "wan_i2v", "cogvideox", "cogvideox_heun", "svd", "animatediff"]


def make(kind: str, **lora):
    """A tiny pipeline whose denoiser carries a LoRA that is not zero, and the least call of it."""
    name, _, scheduler = kind.partition("_")
    if name == "wan" and scheduler != "i2v":
        pipe, call = tiny_pipelines.wan_t2v(scheduler), tiny_pipelines.CALLS["wan_t2v"]
    else:
        name = kind if kind in tiny_pipelines.CALLS else name
        pipe, call = getattr(tiny_pipelines, name)(), tiny_pipelines.CALLS[name]
    if scheduler == "heun":
        from diffusers import HeunDiscreteScheduler

        pipe.scheduler = HeunDiscreteScheduler(prediction_type="v_prediction")
    add_lora(denoiser_of(pipe), **lora)
    return pipe, call


def denoiser_of(pipe):
    return pipe.components.get("transformer") or pipe.components["unet"]


def add_lora(module, **options):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(1)
    # `init_lora_weights=False` draws both factors at random: with a zero B, A would get no gradient.
    config = LoraConfig(r=2, target_modules=tiny_pipelines.TARGETS, init_lora_weights=False, **options)
    inject_adapter_in_model(config, module)


def weights_of(pipe) -> list[Tensor]:
    return [weight for weight in denoiser_of(pipe).parameters() if weight.requires_grad]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def score(frames: Tensor) -> Tensor:
    torch.manual_seed(2)
    return (frames.double() * torch.randn(frames.shape, dtype=torch.float64)).mean()


def gradient(pipe, frames: Tensor) -> Tensor:
    grads = torch.autograd.grad(score(frames), weights_of(pipe))
    return torch.cat([grad.flatten() for grad in grads])


def plain(pipe, **call) -> Tensor:
    return pipe(**call, generator=generators(), output_type="pt").frames


def reference(pipe, first_call: int, monkeypatch, output_type: str = "pt", **call) -> Tensor:
    """The pipeline in grad mode, with every activation kept, cut before scheduler call number `first_call`."""
    scheduler, original, count = pipe.scheduler, pipe.scheduler.step, 0

    @functools.wraps(original)
    def step(*args, **kwargs):
        nonlocal count
        count += 1
        if count > first_call:
            return original(*args, **kwargs)
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setitem(vars(scheduler), "step", step)
        call = {"generator": generators(), **call}
        return inspect.unwrap(type(pipe).__call__)(pipe, **call, output_type=output_type).frames


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_frames_and_gradients(kind, monkeypatch):
    pipe, call = make(kind)
    expected = plain(pipe, **call)
    seen = []
    for count in (1, 2, 7):
        frames = rollout(pipe, LastSteps(count), **call, generator=generators())
        assert torch.equal(frames, expected)
        assert frames.shape[1] == call["num_frames"]
        # Heun calls its scheduler 2 + 2 + 1 times in three steps.
        first_call = max(0, 3 - count) * pipe.scheduler.order
        kept = reference(pipe, first_call, monkeypatch, **call)
        assert torch.equal(kept, expected)
        seen.append(gradient(pipe, frames))
        assert close(seen[-1], gradient(pipe, kept))
    assert not close(seen[0], seen[1], 1e-3)
    assert not close(seen[1], seen[2], 1e-3)


@pytest.mark.parametrize("kind", ["wan_euler", "wan_unipc"])
def test_finite_differences(kind):
    # Float32, in which the pipeline holds latents and norms whatever its weights are: hence the tolerance.
    pipe, call = make(kind)
    weights = weights_of(pipe)
    torch.manual_seed(5)
    ways = [torch.randn_like(weight) for weight in weights]
    grads = torch.autograd.grad(score(rollout(pipe, LastSteps(3), **call, generator=generators())), weights)
    expected = sum((grad * way).double().sum() for grad, way in zip(grads, ways, strict=True))

    start = [weight.detach().clone() for weight in weights]

    def at(offset: float) -> Tensor:
        for weight, origin, way in zip(weights, start, ways, strict=True):
            weight.data.copy_(origin + offset * way)
        return score(plain(pipe, **call))

    assert torch.isclose((at(3e-4) - at(-3e-4)) / 6e-4, expected, rtol=2e-3)


def test_two_stage_denoiser(monkeypatch):
    pipe, call = tiny_pipelines.wan_t2v(two_stage=True), tiny_pipelines.CALLS["wan_t2v"]
    add_lora(pipe.transformer)
    add_lora(pipe.transformer_2)
    frames = rollout(pipe, LastSteps(3), **call, generator=generators())
    assert torch.equal(frames, plain(pipe, **call))
    weights = [*weights_of(pipe), *(weight for weight in pipe.transformer_2.parameters() if weight.requires_grad)]
    ours = torch.autograd.grad(score(frames), weights)
    kept = torch.autograd.grad(score(reference(pipe, 0, monkeypatch, **call)), weights)
    assert all(close(a, b) for a, b in zip(ours, kept, strict=True))
    assert all(grad.any() for grad in ours)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_steps_than_the_schedule_has(count, monkeypatch):
    """Video to video starts in the middle of the schedule: the last steps are counted from its end."""
    from diffusers import WanVideoToVideoPipeline

    base, call = make("wan_euler")
    pipe = WanVideoToVideoPipeline(
        **{name: base.components[name] for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")}
    )
    pipe.set_progress_bar_config(disable=True)
    call = {key: value for key, value in call.items() if key != "num_frames"}
    call |= {"video": [tiny_pipelines.picture(i) for i in range(5)], "num_inference_steps": 5, "strength": 0.4}
    call["prompt"] = call["prompt"][0]

    def seeded():
        return {**call, "generator": torch.Generator().manual_seed(0)}

    frames = rollout(pipe, LastSteps(count), **seeded())
    assert torch.equal(frames, pipe(**seeded(), output_type="pt").frames)
    kept = reference(pipe, max(0, 2 - count), monkeypatch, **seeded())
    assert close(gradient(pipe, frames), gradient(pipe, kept))


def test_without_grad_is_the_plain_call():
    pipe, call = make("wan_unipc")
    with torch.no_grad():
        frames = rollout(pipe, **call, generator=generators())
    assert not frames.requires_grad
    assert torch.equal(frames, plain(pipe, **call))


@pytest.mark.parametrize("kind", ["wan_euler", "cogvideox", "svd", "animatediff"])
def test_saturated_pixels_pass_their_gradient_on(kind):
    """Through the decoder's clamp, where it has one, and through the pipeline's."""
    pipe, call = make(kind)
    with torch.no_grad():
        last = list(pipe.vae.decoder.parameters())[-1]  # the bias of the last convolution
        assert last.shape == (3,)
        last.fill_(9.0)
    plainly = plain(pipe, **call)
    assert (plainly == 1).all()
    for backprop in (Exact(), Full()):
        blocked = rollout(pipe, backprop=backprop, **call, generator=generators())
        passed = rollout(pipe, backprop=replace(backprop, saturated="pass"), **call, generator=generators())
        assert torch.equal(blocked, plainly)
        assert torch.equal(passed, plainly)
        assert not gradient(pipe, blocked).any()
        assert gradient(pipe, passed).any()


@pytest.mark.parametrize("backprop", [Exact(), Exact(cache="recompute"), Truncated(1)], ids=str)
def test_backprop_policies(backprop):
    pipe, call = make("wan_euler")
    exact, other = (rollout(pipe, backprop=b, **call, generator=generators()) for b in (Full(), backprop))
    assert torch.equal(exact, other)
    assert close(gradient(pipe, other), gradient(pipe, exact))  # two groups: a distance of one is everything


def test_generators_advance_as_in_the_plain_call():
    pipe, call = make("svd")
    ours, own = generators(), generators()
    frames = rollout(pipe, **call, generator=ours)
    assert torch.equal(frames, pipe(**call, generator=own, output_type="pt").frames)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, own, strict=True))
    assert not torch.equal(frames[0], frames[1])
    before = ours[0].get_state()
    gradient(pipe, frames)
    assert torch.equal(ours[0].get_state(), before)


def test_recomputation_draws_the_same_dropout(monkeypatch):
    pipe, call = make("wan_euler", lora_dropout=0.5)
    pipe.transformer.train()
    torch.manual_seed(6)
    frames = rollout(pipe, LastSteps(2), **call, generator=generators())
    torch.manual_seed(6)
    kept = reference(pipe, 1, monkeypatch, **call)
    assert torch.equal(frames, kept)
    torch.rand(3)  # the state of the backward pass is not that of the forward pass
    assert close(gradient(pipe, frames), gradient(pipe, kept))
    assert pipe.transformer.training
    assert not pipe.vae.training


def test_recomputation_casts_as_the_forward_pass_did(monkeypatch):
    pipe, call = make("cogvideox")
    with torch.autocast("cpu", torch.bfloat16):
        frames = rollout(pipe, LastSteps(2), **call, generator=generators())
        kept = reference(pipe, 1, monkeypatch, **call)
    assert torch.equal(frames, kept)
    assert not torch.equal(frames, plain(pipe, **call))
    # In bfloat16 the order of additions into a weight's gradient shows.
    assert close(gradient(pipe, frames), gradient(pipe, kept), 2e-2)


@pytest.mark.parametrize("policy", [Steps([0, 2]), LastSteps(2, unconditional=False)], ids=["between", "unconditional"])
def test_casts_without_a_graph_are_not_used_again(policy):
    """Autocast keeps the weights that it has cast, those of a prediction without gradient too."""
    pipe, call = make("wan_euler")
    grads = []
    for cached in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            frames = rollout(pipe, policy, **call, generator=generators())
        grads.append(gradient(pipe, frames))
    assert close(grads[0], grads[1], 2e-2)


def test_gradient_checkpointing_of_the_denoiser_adds_up(monkeypatch):
    pipe, call = make("wan_euler")
    kept = gradient(pipe, reference(pipe, 2, monkeypatch, **call))
    pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.train()
    assert close(gradient(pipe, rollout(pipe, **call, generator=generators())), kept)


def saved_bytes(pipe, make_latents) -> int:
    """Storage that the graph holds beside the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in denoiser_of(pipe).parameters()}
    held = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make_latents()
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("kind", ["wan_unipc", "cogvideox", "svd"])
def test_recomputation_saves_storage(kind, monkeypatch):
    pipe, call = make(kind)

    def ours(count: int):
        with differentiable(pipe, LastSteps(count), Full()):
            inspect.unwrap(type(pipe).__call__)(pipe, **call, output_type="latent")

    everything = saved_bytes(pipe, lambda: reference(pipe, 0, monkeypatch, "latent", **call))
    held = [saved_bytes(pipe, lambda count=count: ours(count)) for count in (1, 3)]
    assert held[1] < everything / 20
    assert held[1] - held[0] < everything / 50  # latents and conditions of two more steps


def everything_restored(pipe) -> bool:
    patched = [(pipe.scheduler, "step"), (pipe.vae, "decode"), (denoiser_of(pipe), "forward")]
    return torch.is_grad_enabled() and not any(name in vars(owner) for owner, name in patched)


@pytest.mark.parametrize("where", ["vae.post_quant_conv", "transformer.proj_out", "text_encoder"])
@pytest.mark.parametrize("count", [1, 3])
def test_restored_after_an_exception(where, count, monkeypatch):
    pipe, call = make("wan_unipc")
    expected, training = plain(pipe, **call), [module.training for module in pipe.transformer.modules()]

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(functools.reduce(getattr, where.split("."), pipe), "forward", fail)
        with pytest.raises(ZeroDivisionError):
            rollout(pipe, LastSteps(count), **call, generator=generators())
    assert everything_restored(pipe)
    assert training == [module.training for module in pipe.transformer.modules()]
    assert torch.equal(rollout(pipe, LastSteps(count), **call, generator=generators()), expected)
    assert everything_restored(pipe)


def graphs() -> int:
    gc.collect()
    return sum(type(thing) is Tensor and thing.grad_fn is not None for thing in gc.get_objects())


@pytest.mark.parametrize("kind", ["wan_unipc", "svd"])
def test_no_graph_stays(kind):
    pipe, call = make(kind)
    before = graphs()
    frames = rollout(pipe, LastSteps(2), **call, generator=generators())
    gradient(pipe, frames)
    del frames
    assert graphs() == before


def test_a_copy_of_the_scheduler_is_its_own():
    """Pipelines with sound step a deep copy of the scheduler beside it."""
    pipe, call = make("wan_euler")
    copies = []

    def callback(pipe, index, timestep, inputs):
        if copies:
            copies[0].step(inputs["latents"], timestep, inputs["latents"])
        else:
            copies.append(copy.deepcopy(pipe.scheduler))
        return inputs

    frames = rollout(pipe, **call, generator=generators(), callback_on_step_end=callback)
    assert torch.equal(frames, plain(pipe, **call))
    assert copies[0].step_index == pipe.scheduler.step_index


def test_signatures_of_the_replaced_methods_stay():
    pipe, _ = make("svd")
    owners = [(pipe.scheduler, "step"), (pipe.vae, "decode"), (pipe.unet, "forward")]
    before = [inspect.signature(getattr(owner, name)) for owner, name in owners]
    with pytest.raises(UsageError, match="took 0"), differentiable(pipe, LastSteps(1), Full()):
        assert before == [inspect.signature(getattr(owner, name)) for owner, name in owners]


def test_the_weights_must_not_change_before_the_backward_pass():
    pipe, call = make("wan_euler")
    frames = rollout(pipe, **call)
    torch.optim.SGD(weights_of(pipe), lr=0.1)  # making one changes nothing
    with torch.no_grad():
        weights_of(pipe)[0].add_(1.0)
    with pytest.raises(UsageError, match="WanTransformer3DModel changed"):
        gradient(pipe, frames)


def test_one_rollout_at_a_time():
    pipe, call = make("wan_euler")

    def callback(pipe, index, timestep, inputs):
        return rollout(pipe, **call)

    with pytest.raises(UsageError, match="rollout under way"):
        rollout(pipe, **call, callback_on_step_end=callback)
    assert everything_restored(pipe)


def test_an_interrupted_call_is_no_rollout():
    pipe, call = make("wan_euler")

    def callback(pipe, index, timestep, inputs):
        pipe._interrupt = True
        return inputs

    with pytest.raises(UsageError, match="announced 3 scheduler steps and took 1"):
        rollout(pipe, **call, callback_on_step_end=callback)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("wan_unipc", {"output_type": "np"}, "sets output_type itself"),
        ("wan_unipc", {"return_dict": False}, "sets return_dict itself"),
        ("wan_unipc", {"promt": "x"}, "no argument 'promt'; did you mean 'prompt'"),
        ("svd", {"prompt": "x"}, "no argument 'prompt'"),
        ("wan_unipc", {"num_frames": 6}, "round num_frames=6; it makes 4k \\+ 1, the nearest is 5"),
        ("wan_unipc", {"num_frames": 8}, "the nearest is 9"),
        ("wan_unipc", {"num_frames": 0}, "num_frames=0: expected a whole number"),
        ("wan_unipc", {"num_frames": "5"}, "num_frames='5': expected a whole number"),
        ("wan_unipc", {"height": 20}, "round height=20; it makes multiples of 8, the nearest is 16"),
        ("wan_unipc", {"width": 3}, "the nearest is 8"),
        ("cogvideox", {"num_frames": 5}, "it makes 8k \\+ 1 or multiples of 8, the nearest is 8"),
        ("cogvideox", {"num_frames": 12}, "the nearest is 9"),
        ("svd", {"width": 17}, "it makes multiples of 2, the nearest is 16"),
    ],
)
def test_bad_calls(kind, wrong, message, monkeypatch):
    pipe, call = make(kind)
    monkeypatch.setattr(denoiser_of(pipe), "forward", None)  # none of it may get as far as sampling
    with pytest.raises(UsageError, match=message):
        rollout(pipe, **{**call, **wrong})


BAD_VALUES = {
    "no_steps": ({"num_inference_steps": 0}, "num_inference_steps=0: expected a whole number, 1 or more"),
    "float_steps": ({"num_inference_steps": 2.0}, "num_inference_steps=2.0: expected a whole number"),
    "unset_steps": ({"num_inference_steps": None}, "num_inference_steps=None: expected a whole number"),
    "guidance_text": ({"guidance_scale": "high"}, "guidance_scale='high': expected a finite number"),
    "guidance_nan": ({"guidance_scale": float("nan")}, "guidance_scale=nan: expected a finite number"),
    "guidance_bool": ({"guidance_scale": True}, "guidance_scale=True: expected a finite number"),
    "guidance_2": ({"guidance_scale_2": float("inf")}, "guidance_scale_2=inf: expected a finite number"),
    "no_videos": ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0: expected a whole number"),
    "no_text": ({"max_sequence_length": 0}, "max_sequence_length=0: expected a whole number"),
    "prompt_number": ({"prompt": 3}, "prompt=3: expected a text, or a list of texts"),
    "prompt_empty": ({"prompt": []}, r"prompt=\[\]: expected a text"),
    "negative_number": ({"negative_prompt": ["a", 1]}, "negative_prompt=.*: expected a text, or a list of texts"),
    "negative_count": ({"negative_prompt": ["a"]}, "negative_prompt: expected a list of 2, got one of 1"),
    "generator_seed": ({"generator": 3}, "generator=3: expected a torch.Generator"),
    "generator_count": ({"generator": generators()[:1]}, "generator: expected a list of 2, got one of 1"),
    "latents_list": ({"latents": [1.0]}, "latents: expected a tensor of floating point, got list"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values(case, monkeypatch):
    pipe, call = make("wan_unipc")
    monkeypatch.setattr(denoiser_of(pipe), "forward", None)  # none of it may get as far as sampling
    wrong, message = BAD_VALUES[case]
    with pytest.raises(UsageError, match=message):
        rollout(pipe, **{**call, **wrong})


def test_bad_values_of_other_pipelines():
    for kind, wrong, message in (
        ("svd", {"decode_chunk_size": -1}, "decode_chunk_size=-1: expected a whole number, 0 or more"),
        ("svd", {"sigmas": [1.0, "x"]}, "sigmas=.*: expected a list of finite numbers"),
        ("cogvideox", {"timesteps": [900, 100]}, "CogVideoXDDIMScheduler takes no timesteps"),
        ("cogvideox", {"use_dynamic_cfg": 1}, "use_dynamic_cfg=1: expected True or False"),
    ):
        pipe, call = make(kind)
        with pytest.raises(UsageError, match=message):
            check_call(pipe, {**call, **wrong})


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5], ids=["negative", "long", "fraction"])
def test_bad_seeds_of_a_policy(seed):
    pipe, call = make("wan_unipc")
    with pytest.raises(UsageError, match=r"rollout: steps_seed=.*: expected a "):
        rollout(pipe, **call, steps_seed=seed)


def test_a_far_name_is_not_offered():
    pipe, call = make("wan_unipc")
    with pytest.raises(UsageError, match=r"takes no argument 'zzz'$"):
        check_call(pipe, {**call, "zzz": 1})


def test_arguments_that_the_caller_sets():
    pipe, call = make("wan_unipc")
    check_call(pipe, call)
    with pytest.raises(UsageError, match="prompt is set for each video of a run"):
        check_call(pipe, call, reserved=("prompt", "generator"))


def test_policies_that_the_call_does_not_fit():
    pipe, call = make("wan_unipc")
    check_call(pipe, call, LastSteps(3))
    check_call(pipe, {key: value for key, value in call.items() if key != "num_inference_steps"}, LastSteps(50))
    for policy, changed, message in (
        (LastSteps(4), {}, r"LastSteps\(.*\) asks for 4 steps, but the sampler takes 3; ask for at most"),
        (RandomLast(4), {}, "asks for 4 steps"),
        (Steps([3]), {}, "there is no step 3"),
        (LowVariance(2), {"num_inference_steps": 1}, "repeats the last of several steps"),
        (LastSteps(1, unconditional=False), {"guidance_scale": 1}, "guidance_scale=1 makes no unconditional"),
        (3, {}, "steps=3: expected a policy"),
    ):
        with pytest.raises(UsageError, match=message):
            check_call(pipe, {**call, **changed}, policy)


def test_steps_left_by_a_strength():
    from diffusers import WanVideoToVideoPipeline

    base, _ = make("wan_euler")
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = WanVideoToVideoPipeline(**{name: base.components[name] for name in names})
    check_call(pipe, {"num_inference_steps": 5, "strength": 0.4}, LastSteps(2))
    for strength, message in (
        (0.4, "asks for 3 steps, but the sampler takes 2"),
        (0.1, "strength=0.1 of num_inference_steps=5 leaves no step"),
        (0, "strength=0: expected a number above 0, up to 1"),
        (1.5, "strength=1.5: expected a number above 0, up to 1"),
    ):
        with pytest.raises(UsageError, match=message):
            check_call(pipe, {"num_inference_steps": 5, "strength": strength}, LastSteps(3))


def test_several_videos_of_a_prompt():
    pipe, call = make("wan_euler")
    call = {**call, "num_videos_per_prompt": 2}
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    frames = rollout(pipe, **call, generator=seeds)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    assert torch.equal(frames, pipe(**call, generator=seeds, output_type="pt").frames)


@pytest.mark.parametrize(("kind", "counts"), [("wan_unipc", [1, 9]), ("cogvideox", [1, 8, 9, 16, 17, 48])])
def test_accepted_frame_counts_are_kept(kind, counts):
    pipe, call = make(kind)
    for count in counts:
        check_call(pipe, {**call, "num_frames": count})
        assert plain(pipe, **{**call, "num_frames": count}).shape[1] == count


@pytest.mark.parametrize(
    ("family", "right", "wrong", "message"),
    [
        ("LTX", 9, 8, r"num_frames=8; it makes 4k \+ 1, the nearest is 9"),
        ("Mochi", 7, 8, r"num_frames=8; it makes 6k \+ 1, the nearest is 7"),
        ("Allegro", 8, 9, r"num_frames=9; it makes multiples of 2, the nearest is 8"),
    ],
)
def test_frame_counts_of_pipelines_with_names_of_their_own(family, right, wrong, message):
    import diffusers

    vae = {"LTX": tiny_vaes.ltx_vae, "Mochi": tiny_vaes.mochi_vae, "Allegro": tiny_vaes.allegro_vae}[family]()
    denoiser = {"LTX": "LTXVideo", "Mochi": "Mochi", "Allegro": "Allegro"}[family] + "Transformer3DModel"
    pipe = getattr(diffusers, f"{family}Pipeline")(
        vae=vae,
        transformer=getattr(diffusers, denoiser)(num_layers=1, num_attention_heads=1, attention_head_dim=12),
        scheduler=tiny_pipelines.flow_scheduler("euler"),
        text_encoder=None,
        tokenizer=None,
    )
    check_call(pipe, {"num_frames": right})
    with pytest.raises(UsageError, match=message):
        check_call(pipe, {"num_frames": wrong})


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "all"])
def test_bad_policies(count):
    with pytest.raises(UsageError, match="whole number, 1 or more"):
        LastSteps(count)


def test_policy():
    assert [LastSteps(count).first(3) for count in (1, 2, 3, 4)] == [2, 1, 0, 0]


def test_hooks_that_break_the_backward_pass_are_refused():
    from accelerate import cpu_offload
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_layerwise_casting

    def cache(pipe):
        pipe.transformer.enable_cache(FirstBlockCacheConfig())

    def cast(pipe):
        apply_layerwise_casting(pipe.transformer, torch.float8_e4m3fn, torch.float32)

    def group_offload(pipe):
        pipe.vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")

    def model_offload(pipe):
        pipe.enable_model_cpu_offload(device="cpu")

    def sequential_offload(pipe):
        cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))

    for hook in (cache, cast, group_offload, model_offload, sequential_offload):
        pipe, call = make("wan_euler")
        hook(pipe)
        with pytest.raises(UsageError, match=r"offloads its modules|has the diffusers hooks"):
            rollout(pipe, **call)


def test_other_refusals():
    pipe, call = make("wan_euler")
    with torch.inference_mode(), pytest.raises(UsageError, match="inference_mode"):
        rollout(pipe, **call)
    with pytest.raises(UsageError, match=r"steps=2: expected a policy, such as LastSteps\(1\)"):
        rollout(pipe, 2, **call)
    with pytest.raises(UsageError, match=r"expected a policy, such as Exact\(\)"):
        rollout(pipe, backprop=Exact, **call)
    del pipe.video_processor
    for other in (pipe, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"):
        with pytest.raises(UsageError, match="expected a diffusers pipeline that makes videos with a VAE, got"):
            rollout(other, **call)
    pipe, call = make("wan_euler")
    pipe.register_modules(transformer=None)
    with pytest.raises(UsageError, match="none of the components transformer"):
        rollout(pipe, **call)


@pytest.mark.parametrize("name", tiny_pipelines.CALLS)
def test_tiny_pipelines_reload(name, tmp_path):
    from diffusers import DiffusionPipeline

    pipe = getattr(tiny_pipelines, name)()
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    call = tiny_pipelines.CALLS[name]
    assert torch.equal(plain(pipe, **call), plain(again, **call))
