"""Several processes that train one student together: each takes its share of every batch, gradients are averaged.

B is the whole batch over all W workers; a worker's share is B / W samples. What is averaged over workers are means of
equal shares, and so the whole batch's means. Whoever starts the processes has joined them by torch.distributed before
(`pipeline.training_group` by Ray Train); without, a process is a group of its own in which nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from trainer.learner import StudentUnderTraining, Tensors
from trainer.order import random_generator

Losses = Callable[[Tensors], tuple[Tensor, Tensors, Tensors]]


class Group:
    """The workers of one student, as one of them sees them. Every method but the properties is called by all alike."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        # Beside gradients on a GPU small words are exchanged between the hosts, so that no host waits for its GPU.
        self._hosts: dist.ProcessGroup | None = None
        if size > 1:
            self._hosts = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))

    @classmethod
    def joined(cls) -> Group:
        """The group of torch.distributed's process group; this process alone where there is none."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this worker writes and reports for all."""
        return self.rank == 0

    def losses_of(self, module: StudentUnderTraining) -> Losses:
        """The module's `losses` for a share of a batch; their backward averages the gradients over the workers."""
        if self.size == 1:
            return module.losses
        # Unused parameters are looked for because some backbones have them, and because buckets then stay as they
        # are: those that are laid out anew after the first step would add in another order after a resume.
        learner = DistributedDataParallel(_ShareOfLosses(module, self.size), find_unused_parameters=True)
        learner.broadcast_buffers = False  # `running_statistics` are averaged; the option, torch 2.15 renamed
        losses: Losses = learner
        return losses

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the workers; in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, mean in zip(tensors, torch.split(flat, sizes), strict=True):
            tensor.detach().copy_(mean.view_as(tensor))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of a network that `losses_of` does not cover; all workers have gradients for the same parameters."""
        self.average([p.grad for p in parameters if p.grad is not None])

    def total(self, count: int) -> int:
        """The sum of what the workers counted."""
        if self.size == 1:
            return count
        sum_ = torch.tensor([count])
        dist.all_reduce(sum_, group=self._hosts)
        return int(sum_)

    def any(self, flag: bool) -> bool:
        """Whether some worker says so."""
        return self.total(int(flag)) > 0

    def gathered(self, data: bytes) -> list[bytes]:
        """What each worker brought, by rank."""
        if self.size == 1:
            return [data]
        lengths = [self.total(len(data) if rank == self.rank else 0) for rank in range(self.size)]
        mine = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        theirs = [torch.zeros_like(mine) for _ in lengths]
        dist.all_gather(theirs, mine, group=self._hosts)
        return [their[:length].numpy().tobytes() for their, length in zip(theirs, lengths, strict=True)]

    def wait(self) -> None:
        """Until all workers are here."""
        self.total(0)


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The buffers in which batch normalisation remembers what it saw, as averages that can be averaged again."""
    norms = [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.running_mean is not None]
    return [buffer for layer in norms for buffer in (layer.running_mean, layer.running_var) if buffer is not None]


def seed_worker(seed: int, group: Group) -> None:
    """Random numbers of its own for each worker but the first, so that they do not all drop out the same."""
    if group.rank:
        torch.manual_seed(int(random_generator(seed, "worker", group.rank).integers(2**63)))


def rng_states(group: Group, device: torch.device) -> dict[str, list[Tensor]]:
    """The states of all workers' random numbers, by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {
        kind: [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in group.gathered(state.numpy().tobytes())]
        for kind, state in states.items()
    }


def set_rng_states(states: Mapping[str, list[Tensor]], group: Group, device: torch.device) -> None:
    """Continue with this worker's share of what `rng_states` gave, also where it ran on another kind of device."""
    torch.set_rng_state(states["cpu"][group.rank])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][group.rank], device)


class _ShareOfLosses(nn.Module):
    """`losses` as a forward, which is where DistributedDataParallel takes hold."""

    def __init__(self, module: StudentUnderTraining, workers: int) -> None:
        super().__init__()
        self.module, self.workers = module, workers

    def forward(self, batch: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        return self.module.losses(batch, self.workers)
