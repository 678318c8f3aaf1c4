"""Optimizers and schedules by name, the average of the weights, and what of them is measured."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from chopgrad_align import UsageError
from chopgrad_align.training.average import Average
from chopgrad_align.training.config import Named, Train
from chopgrad_align.training.optimizers import make_optimizer, make_schedule
from chopgrad_align.training.state import TrainState

ANCHORED = """
import torch

class Anchored(torch.optim.SGD):
    \"\"\"As schedule-free ones: what it trains is not what it has found, and there and back is not exact.\"\"\"

    def eval(self):
        self._scale(1 / 3)

    def train(self):
        self._scale(3.0)

    @torch.no_grad()
    def _scale(self, factor):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(factor)
"""


class Weights:
    """A trainable that is its weights."""

    def __init__(self, *shapes):
        self.parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]

    def state_dict(self):
        return {str(i): p.detach().clone() for i, p in enumerate(self.parameters)}

    def load_state_dict(self, state):
        for i, p in enumerate(self.parameters):
            p.data.copy_(state[str(i)])


def settings(optimizer=None, schedule=None, optimizer_args=(), schedule_args=(), **train):
    named = {"optimizer": (optimizer, optimizer_args), "schedule": (schedule, schedule_args)}
    chosen = {key: Named(name=name, args=dict(args)) for key, (name, args) in named.items() if name}
    return Train(steps=6, learning_rate=0.1, **chosen, **train)


def state_of(train, decay=None):
    trainable = Weights((3, 2), (2, 3))
    optimizer = make_optimizer(trainable.parameters, train)
    average = None if decay is None else Average(trainable.parameters, decay)
    return TrainState(trainable, optimizer, make_schedule(optimizer, train), average)


def step(state):
    for p in state.trainable.parameters:
        p.grad = p.detach().sin()
    state.update()
    state.schedule.step()


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("torch.optim.SGD", {"momentum": 0.5}, torch.optim.SGD),
        ("torch.optim.Muon", {"weight_decay": 0.0}, torch.optim.Muon),
        ("torch.optim:AdamW", {"eps": 1e-6}, torch.optim.AdamW),
    ],
    ids=["sgd", "muon", "colon"],
)
def test_optimizer_by_name(name, args, expected):
    made = make_optimizer(Weights((3, 2)).parameters, settings(name, optimizer_args=args))
    assert type(made) is expected
    assert {**made.defaults, **{"lr": 0.1, **args}} == made.defaults


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"optimizer": "AdamW"},
            "expected a dotted name such as torch.optim.AdamW, or path/to/file.py:Class, got 'AdamW'",
        ),
        ({"optimizer": "torch.optim.AdmaW"}, "torch.optim has no 'AdmaW'.*AdamW"),
        ({"optimizer": "absent_package.Lion"}, "no module named 'absent_package'"),
        ({"optimizer": "torch.optim.SGD", "optimizer_args": {"momentun": 1}}, "momentun.*momentum"),
        (
            {"optimizer": "torch.optim.SGD", "optimizer_args": {"momentum": -1}},
            "cannot be made with momentum=-1; .*Invalid momentum",
        ),
        ({"optimizer": "torch.optim.Muon"}, "cannot be made with no arguments; .*Muon only supports 2D parameters"),
        ({"schedule": "cosin"}, "no schedule is called 'cosin'.*cosine"),
        ({"schedule": "polynomial", "schedule_args": {"lr_end": 1.0}}, "train.schedule 'polynomial': lr_end"),
        ({"schedule": "reduce_lr_on_plateau"}, "no schedule is called"),
        ({"schedule": "torch.optim.lr_scheduler.StepLR", "warmup_steps": 2}, "train.warmup_steps"),
        ({"schedule": "torch.optim.lr_scheduler.StepLR"}, "step_size"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_wrong_names(train, message):
    train, weights = settings(**train), Weights((3,)).parameters
    with pytest.raises(UsageError, match=message):
        make_schedule(make_optimizer(weights, train), train)


def test_settings_of_adamw_beside_another_optimizer():
    with pytest.raises(ValueError, match=r"give them in train.optimizer.args of torch.optim.SGD"):
        settings("torch.optim.SGD", weight_decay=0.1)


def rates(schedule, optimizer):
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules():
    def ours(**train):
        made = settings(**train)
        optimizer = make_optimizer(Weights((3,)).parameters, made)
        return rates(make_schedule(optimizer, made), optimizer)

    assert ours(warmup_steps=4) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    optimizer = torch.optim.SGD(Weights((3,)).parameters, lr=0.1)
    theirs = get_scheduler("cosine", optimizer, 2, 6, {"num_cycles": 1.0})
    assert ours(schedule="cosine", schedule_args={"num_cycles": 1.0}, warmup_steps=2) == rates(theirs, optimizer)
    halved = ours(schedule="torch.optim.lr_scheduler.StepLR", schedule_args={"step_size": 3, "gamma": 0.5})
    assert halved == pytest.approx([0.1] * 3 + [0.05] * 3)


@pytest.mark.parametrize(
    ("schedule", "reads"),
    [(None, False), ("constant", False), ("inverse_sqrt", False), ("linear", True), ("cosine", True), ("a.b.C", False)],
    ids=str,
)
def test_schedules_that_depend_on_the_number_of_steps(schedule, reads):
    assert settings(schedule=schedule).schedule_reads_steps is reads


def test_average_in_closed_form():
    decay, state = 0.75, state_of(settings(), decay=0.75)
    course = [state.trainable.state_dict()]
    for _ in range(5):
        step(state)
        course.append(state.trainable.state_dict())
    shares = [decay**5, *((1 - decay) * decay ** (5 - k) for k in range(1, 6))]
    assert math.isclose(sum(shares), 1)
    with state.averaged():
        found = state.trainable.state_dict()
    for name, value in found.items():
        expected = sum(share * weights[name] for share, weights in zip(shares, course, strict=True))
        torch.testing.assert_close(value, expected)
    for name, value in state.trainable.state_dict().items():
        assert torch.equal(value, course[-1][name])


@pytest.mark.parametrize("decay", [None, 0.9], ids=["alone", "ema"])
def test_state_is_resumed_exactly_wherever_it_is_measured(tmp_path, decay):
    (tmp_path / "own.py").write_text(ANCHORED)
    train = settings(f"{tmp_path}/own.py:Anchored", "linear", {"momentum": 0.9})
    whole, half = state_of(train, decay), state_of(train, decay)
    half.trainable.load_state_dict(whole.trainable.state_dict())
    if decay is not None:
        half.average.load(whole.average.weights)
    for _ in range(3):
        step(whole), step(half)
        with half.averaged(), pytest.raises(KeyError):
            raise KeyError
    resumed = state_of(train, decay)
    resumed.load_state_dict(half.state_dict())
    for _ in range(3):
        step(whole), step(resumed)
    for name, value in whole.trainable.state_dict().items():
        assert torch.equal(resumed.trainable.state_dict()[name], value)
    with whole.averaged(), resumed.averaged():
        for name, value in whole.trainable.state_dict().items():
            assert torch.equal(resumed.trainable.state_dict()[name], value)


@pytest.mark.parametrize(
    "name", ["schedulefree.AdamWScheduleFree", "prodigyopt.Prodigy", "bitsandbytes.optim.AdamW8bit"]
)
def test_optimizers_of_other_packages(name):
    pytest.importorskip(name.partition(".")[0])
    state = state_of(settings(name))
    resumed = state_of(settings(name))
    step(state)
    resumed.load_state_dict(copy.deepcopy(state.state_dict()))  # as a file would; torch shares tensors
    with state.averaged():
        pass
    step(state), step(resumed)
    for name, value in state.trainable.state_dict().items():
        assert torch.equal(resumed.trainable.state_dict()[name], value)
