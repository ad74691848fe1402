"""What each rank of the test of several nodes runs: under torchrun, or as ranks of one host."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import bnrewrite
from bnrewrite import Shuffle
from tests.shuffled import loss_of, make_input, make_model

SIZES = (2, 3, 1, 4)


def numbers(rank: int, world_size: int) -> list[Tensor]:
    """Outputs, gradients and buffers of two steps in three modes, and shuffled samples."""
    found = []
    for mode in (Shuffle(), Shuffle("random", seed=1), Shuffle(running="group")):
        model = bnrewrite.convert(make_model(), mode)
        for step in range(2):
            x = make_input(rank, SIZES[rank], step)
            y = model(x)
            loss_of(y).backward()
            assert x.grad is not None
            found += [y.detach(), x.grad]
        found += [p.grad for p in model.parameters() if p.grad is not None] + [*model.buffers()]
    generator = torch.Generator().manual_seed(2)
    shuffled, restore = bnrewrite.shuffle_batch(make_input(rank, 4).detach(), generator=generator)
    return [*found, shuffled, restore(shuffled)]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(numbers(rank, dist.get_world_size()), Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
