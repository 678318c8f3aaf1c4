"""Who holds what and who works on which clip: replicas of the whole model, each with clips of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..common.errors import UsageError


class Replicas:
    """The processes of a run; every one of them holds the whole model.

    Args:
        trackers: Names of experiment trackers.
        folder: Where those keep their files.
        threads: CPU threads of this process; default its share of the cores.
    """

    def __init__(self, trackers: Sequence[str] = (), folder: str | None = None, threads: int | None = None) -> None:
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), log_with=[*trackers] or None, project_dir=folder
        )
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self.device, self.is_main = self._accelerator.device, self._accelerator.is_main_process
        if self.device.type == "cpu":
            torch.set_num_threads(threads or _share_of_the_cores())

    def shares(self, batch_size: int, micro_batch: int) -> list[range]:
        """Places of the batch that this process works on, a micro-batch at a time.

        Raises:
            UsageError: The batch is no multiple of processes and micro-batch.
        """
        local = batch_size // self.world
        together = min(micro_batch, max(local, 1))
        if batch_size % (self.world * together):
            raise UsageError(
                f"train.batch_size={batch_size} must be a multiple of processes × micro_batch = "
                f"{self.world} × {together}"
            )
        starts = range(self.rank * local, (self.rank + 1) * local, together)
        return [range(start, start + together) for start in starts]

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all processes, in the order of ranks, on the CPU."""
        return self._accelerator.gather(rows).cpu()

    def gather_objects(self, thing: Any) -> list[Any]:
        """One thing of each process, in the order of ranks."""
        return gather_object([thing])

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up gradients over the processes.

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
        return self._accelerator.reduce(tensor, "sum")

    def wait(self) -> None:
        """Wait for the other processes."""
        self._accelerator.wait_for_everyone()

    def start_trackers(self) -> None:
        """Open the experiment trackers."""
        self._accelerator.init_trackers("chopgrad_align")

    def track(self, row: dict[str, float]) -> None:
        """Give a row of metrics to the experiment trackers."""
        self._accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def end(self) -> None:
        """Close the experiment trackers and the process group."""
        self._accelerator.end_training()


def _share_of_the_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
