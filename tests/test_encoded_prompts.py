"""Prompts encoded once: the call of a pipeline then gives what it gave, without text encoders."""

import pytest
import tiny_pipelines
import torch

from chopgrad_align.common.errors import UsageError
from chopgrad_align.data.cache import Cache
from chopgrad_align.training.encoded_prompts import encode_prompts

CPU = torch.device("cpu")
PROMPTS = ["a red star", "a blue ring over yellow sand"]
TEXTS = [{"prompt": prompt} for prompt in PROMPTS]


def call_of(name, **changed):
    call = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 3.0}
    if name == "cogvideox":
        call["num_frames"] = 9
    return call | {"output_type": "pt", "prompt": PROMPTS[0], **changed}


def frames(pipe, call, seeds=(0,)):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipe(**call, generator=generators if len(seeds) > 1 else generators[0]).frames)


@pytest.mark.parametrize("name", ["wan_t2v", "cogvideox", "animatediff"])
def test_a_call_is_as_before_without_the_text_encoder(name):
    pipe = getattr(tiny_pipelines, name)()
    call = call_of(name, negative_prompt="grey")
    wanted = [frames(pipe, {**call, "prompt": prompt}, [seed]) for seed, prompt in enumerate(PROMPTS)]
    both = {**call, "prompt": PROMPTS, "negative_prompt": ["grey", "grey"]}
    together = frames(pipe, both, [0, 1])
    assert encode_prompts(pipe, call, TEXTS, Cache(), CPU)
    assert pipe.text_encoder is None
    for seed, prompt in enumerate(PROMPTS):
        assert torch.equal(frames(pipe, {**call, "prompt": prompt}, [seed]), wanted[seed])
    torch.testing.assert_close(frames(pipe, both, [0, 1]), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["wan_vace", "wan_i2v"])
def test_models_that_wait_on_the_cpu_are_not_run(name, monkeypatch):
    pipe = getattr(tiny_pipelines, name)()
    image = tiny_pipelines.picture()
    given = {"image": image} if name == "wan_i2v" else {"video": [image] * 5, "reference_images": [image]}
    for part in (pipe.vae, pipe.components.get("image_encoder")):
        for method in ("encode", "forward"):
            if hasattr(part, method):
                monkeypatch.setattr(part, method, lambda *args, **kwargs: pytest.fail("it is not on the device"))
    assert encode_prompts(pipe, call_of(name, **given), TEXTS, Cache(), CPU)


def test_a_model_between_prompts_and_latents_is_not_run(monkeypatch):
    """As LTX-2's connectors."""
    pipe = tiny_pipelines.wan_t2v()
    monkeypatch.setattr(pipe.transformer, "forward", lambda *args, **kwargs: pytest.fail("it is not on the device"))
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", lambda *args, **kwargs: pipe.transformer(None))
    assert encode_prompts(pipe, call_of("wan_t2v"), TEXTS, Cache(), CPU)


def test_a_second_run_reads_what_the_first_one_left(tmp_path):
    frame_sets = []
    for hits, misses in ((2, 2), (4, 0)):  # the first prompt is met three times: twice as the call is looked at
        pipe, cache = tiny_pipelines.wan_t2v(), Cache(tmp_path)
        encode_prompts(pipe, call_of("wan_t2v"), TEXTS, cache, CPU)
        assert (cache.hits, cache.misses) == (hits, misses)
        frame_sets.append(frames(pipe, call_of("wan_t2v")))
    assert torch.equal(*frame_sets)


def test_a_pipeline_that_encodes_the_negative_prompt_by_itself():
    pipe = tiny_pipelines.wan_t2v()
    original = pipe.encode_prompt
    # As HunyuanVideo does: two calls of the same method.
    pipe.encode_prompt = lambda prompt: original(prompt, do_classifier_free_guidance=False)[0]
    call, seen = {"prompt": "a red star"}, []

    class TwoCalls(type(pipe)):
        def __call__(self, prompt, negative_prompt="grey"):
            found = self.encode_prompt(prompt=prompt), self.encode_prompt(prompt=negative_prompt)
            seen.append(found)
            self.prepare_latents()

    pipe.__class__ = TwoCalls
    pipe.prepare_latents = lambda: None
    pipe(**call)
    assert encode_prompts(pipe, call, TEXTS, Cache(), CPU)
    pipe(**call)
    assert len(seen) == 3  # before, to the end of the call that was looked at, and after
    for before, after in zip(seen[0], seen[-1], strict=True):
        assert torch.equal(before, after)
    with pytest.raises(LookupError, match="'another' is not among the prompts"):
        pipe("another")


def test_a_pipeline_without_prompts_or_with_images_in_them_stays_as_it_is():
    pipe = tiny_pipelines.svd()
    assert not encode_prompts(pipe, {"image": tiny_pipelines.picture()}, [], Cache(), CPU)
    pipe = tiny_pipelines.wan_t2v()

    class WithAnImage(type(pipe)):
        def __call__(self, prompt):
            self.encode_prompt(prompt, tiny_pipelines.picture())

    pipe.__class__ = WithAnImage
    pipe.encode_prompt = original = lambda prompt, image: None
    assert not encode_prompts(pipe, {"prompt": "a red star"}, TEXTS, Cache(), CPU)
    assert pipe.encode_prompt is original
    assert pipe.text_encoder is not None


def test_embeddings_that_do_not_stack_are_refused_before_training():
    pipe = tiny_pipelines.wan_t2v()

    class LongerForLonger(type(pipe)):
        def __call__(self, prompt):
            self.encode_prompt(prompt)
            self.prepare_latents()

    pipe.__class__ = LongerForLonger
    pipe.encode_prompt = lambda prompt: (torch.zeros(1, len(prompt), 4), None)
    with pytest.raises(UsageError, match=r"'a red star'.*different shapes.*encode_prompts_once=false"):
        encode_prompts(pipe, {"prompt": PROMPTS[0]}, TEXTS, Cache(), CPU)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "single"])
def test_embeddings_of_different_lengths(masked):
    """With a mask they are padded; without one they do for calls of one prompt, as of Latte."""
    pipe = tiny_pipelines.wan_t2v()

    class LongerForLonger(type(pipe)):
        def __call__(self, prompt):
            self.encode_prompt(prompt)
            self.prepare_latents()

    def encode(prompt):
        return torch.ones(1, len(prompt), 4), torch.ones(1, len(prompt), dtype=torch.bool) if masked else None

    pipe.__class__, pipe.encode_prompt = LongerForLonger, encode
    assert encode_prompts(pipe, {"prompt": PROMPTS[0]}, TEXTS, Cache(), CPU, stacked=masked)
    texts = [text["prompt"] for text in TEXTS]
    assert all(torch.equal(pipe.encode_prompt(text)[0], encode(text)[0]) for text in texts)
    if masked:
        embeds, mask = pipe.encode_prompt(texts)
        assert mask.sum(1).tolist() == [len(text) for text in texts]
        assert torch.equal(embeds, mask[..., None].expand_as(embeds).float())


def test_a_lost_embedding_is_named(tmp_path):
    pipe = tiny_pipelines.wan_t2v()
    encode_prompts(pipe, call_of("wan_t2v"), TEXTS, Cache(tmp_path), CPU)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="'a red star' was lost"):
        frames(pipe, call_of("wan_t2v"))
