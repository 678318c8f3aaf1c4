"""Who holds what and who works on which clip: one process or a few on a clip, with a model that is whole or sharded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..common.errors import UsageError

T = TypeVar("T")

# What a configuration of accelerate can ask for and the trainer does not do: its variable, the value that asks for
# nothing, and what to do instead.
_NOT_OBEYED = {
    "ACCELERATE_USE_FSDP": ("false", "FSDP", "set parallel.shard instead"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "DeepSpeed", "every process holds the whole model"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "Megatron-LM", "every process holds the whole model"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "a parallelism config", "every process holds the whole model"),
    "ACCELERATE_MIXED_PRECISION": ("no", "mixed precision", "set model.dtype instead"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "torch.compile", "models run as they are"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "gradient accumulation", "set train.micro_batch instead"),
}


def check_launch() -> None:
    """Raise a UsageError for what a launcher's environment asks for and would not get."""
    for variable, (nothing, what, instead) in _NOT_OBEYED.items():
        value = os.environ.get(variable, nothing)
        if value.lower() != nothing:
            raise UsageError(
                f"accelerate is configured for {what} ({variable}={value}), which this trainer does not do: {instead}; "
                "change it by `accelerate config`, or by an option of `accelerate launch`"
            )
    # It sets the address of a main process for several, and then starts one.
    ranks = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    on_cpu, several = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true", "MASTER_PORT" in os.environ
    if on_cpu and several and not any(rank in os.environ for rank in ranks):
        raise UsageError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; for several on the CPU: "
            "torchrun --nproc_per_node N -m chopgrad_align align …"
        )


def launched_as_main() -> bool:
    """True on the main process, as its launcher says before the processes know each other."""
    return int(os.environ.get("RANK", "0")) == 0


class LostContactError(RuntimeError):
    """Another process ended, or does not answer."""


class Replicas:
    """The processes of a run, in groups of those that work on the same clips; each group has clips of its own.

    Args:
        trackers: Names of experiment trackers.
        folder: Where those keep their files.
        threads: CPU threads of this process; default `OMP_NUM_THREADS`, or else its share of the cores.
        timeout: Seconds that processes wait for each other.
        shard: So many processes, next to each other, share one copy of the frozen denoisers.
        context: So many, next to each other, are a group.

    Attributes:
        groups: How many there are.
        group: That of this process.
        first: True for the first process of a group, which speaks for it.
    """

    def __init__(
        self,
        trackers: Sequence[str] = (),
        folder: str | None = None,
        threads: int | None = None,
        timeout: float = 1800.0,
        shard: int = 1,
        context: int = 1,
    ) -> None:
        self._timeout = timeout
        self._accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            log_with=[*trackers] or None,
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
        )
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self.device, self.is_main = self._accelerator.device, self._accelerator.is_main_process
        if self.device.type == "cpu":
            torch.set_num_threads(threads or _threads_of_the_environment() or _share_of_the_cores())
        for key, size in (("shard", shard), ("context", context)):
            if self.world % size:
                raise UsageError(
                    f"parallel.{key}={size}: expected a divisor of the number of processes, {self.world}; launch more "
                    f"or set parallel.{key}=1"
                )
        self._shard, self._context = shard, context
        self.groups, self.group, self.first = self.world // context, self.rank // context, self.rank % context == 0

    def sharing(self) -> DeviceMesh | None:
        """The processes that share one copy of the frozen denoisers with this one; None: each holds the whole."""
        if self._shard == 1:
            return None
        shape = (self.world // self._shard, self._shard)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replica", "shard"))["shard"]

    def context(self) -> DeviceMesh | None:
        """The groups, with the names that diffusers' context parallelism has for dimensions; None: of one process."""
        if self._context == 1:
            return None
        shape = (self.groups, 1, self._context)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("group", "ring", "ulysses"))

    def shares(self, batch_size: int, micro_batch: int) -> list[range]:
        """Places of the batch that this process works on, a micro-batch at a time.

        Raises:
            UsageError: The batch is no multiple of processes, or groups of them, and micro-batch.
        """
        local = batch_size // self.groups
        together = min(micro_batch, max(local, 1))
        if batch_size % (self.groups * together):
            raise UsageError(
                f"train.batch_size={batch_size} must be a multiple of {self.workers} × micro_batch = "
                f"{self.groups} × {together}"
            )
        starts = range(self.group * local, (self.group + 1) * local, together)
        return [range(start, start + together) for start in starts]

    @property
    def workers(self) -> str:
        """Name of a group, for messages: what works on clips of its own."""
        return "processes" if self._context == 1 else f"groups of {self._context} processes"

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all groups, in order, on the CPU."""
        return self._gather(rows).unflatten(0, (self.groups, self._context, -1))[:, 0].flatten(0, 1)

    def gather_objects(self, thing: Any) -> list[Any]:
        """Gather a thing from each group, in order."""
        with self._others():
            return gather_object([thing])[:: self._context]

    def _gather(self, rows: Tensor) -> Tensor:
        with self._others():
            return self._accelerator.gather(rows).cpu()

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up gradients over the processes: of their clips, and of their parts of a clip.

        The pipeline calls the bare denoiser, past the wrapper by which DistributedDataParallel would see the backward
        pass. A weight that no process has a gradient of keeps none, so that weight decay leaves it alone too.
        """
        if self.world == 1:
            return
        reached = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        somewhere = self.sum(reached).tolist()
        parameters = [parameter for parameter, count in zip(parameters, somewhere, strict=True) if count]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes."""
        with self._others():
            return self._accelerator.reduce(tensor, "sum")

    def greatest(self, number: int) -> int:
        """The greatest number that any process has."""
        if self.world == 1:
            return number
        return int(self._gather(torch.tensor([number], device=self.device)).max())

    def on_main(self, function: Callable[[], T]) -> T:
        """The result of a function on the main process, the only one that calls it; its UsageError is raised by all."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [function(), None]
            except UsageError as error:
                outcome = [None, error]
        with self._others():
            result, failure = broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        return result

    def wait(self) -> None:
        """Wait for the other processes."""
        with self._others():
            self._accelerator.wait_for_everyone()

    @contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostContactError(
                f"process {self.rank} waited for the others in vain: one of them ended, whose error is above, or hangs "
                f"for longer than parallel.timeout={self._timeout:g} seconds"
            ) from error

    def start_trackers(self, name: str, config: Mapping[str, Any]) -> None:
        """Open the experiment trackers, and tell them the run's name and its config by key."""
        self._accelerator.init_trackers("chopgrad_align", dict(config), {"wandb": {"name": name}})

    def track(self, row: Mapping[str, float | str], step: int) -> None:
        """Give a row of metrics, or texts, to the experiment trackers."""
        self._accelerator.log(dict(row), step=step)

    @property
    def trackers(self) -> list[GeneralTracker]:
        """The experiment trackers that were opened; none on other processes than the main one."""
        return self._accelerator.trackers if self.is_main else []

    def end(self) -> None:
        """Close the experiment trackers and the process group."""
        self._accelerator.end_training()


def _threads_of_the_environment() -> int | None:
    """`OMP_NUM_THREADS` as the user set it; None for the 1 that a launcher sets if the user said nothing."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    return int(value) if value.isdecimal() and int(value) > launched else None


def _share_of_the_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
