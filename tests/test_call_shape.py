"""The shape of a clip among the arguments of calls that name it otherwise, or do not take it."""

import diffusers
import pytest

from chopgrad_align.sampling.call_shape import as_taken, frames_asked

CALL = {"num_frames": 9, "height": 16, "width": 32, "guidance_scale": 2.0}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("WanPipeline", {"num_frames": 9, "height": 16, "width": 32}),
        ("SanaVideoPipeline", {"frames": 9, "height": 16, "width": 32}),
        ("LattePipeline", {"video_length": 9, "height": 16, "width": 32}),
        ("WanVideoToVideoPipeline", {"height": 16, "width": 32}),
        ("HunyuanVideo15ImageToVideoPipeline", {"num_frames": 9}),
        ("VideoToVideoSDPipeline", {}),
    ],
)
def test_shape_of_a_call(name, shape):
    pipe = object.__new__(getattr(diffusers, name))
    taken = as_taken(pipe, CALL)
    assert taken == {**shape, "guidance_scale": 2.0}
    assert as_taken(pipe, taken) == taken
    assert frames_asked(taken) == (9 if len(shape) in (1, 3) else None)
