"""How much of a rank's own batch is in the statistics that it is normalized with, layer by layer.

    python benchmarks/shuffle_leak.py > benchmarks/results/shuffle_leak.md

All ranks are simulated in one process. The measure is, for the statistics (mean and rstd of every
channel) that rank r uses at a layer, the share of its own batch in their sensitivity:

    own share = |d stats / d x_r|^2 / sum over ranks k of |d stats / d x_k|^2

averaged over ranks and over random networks, inputs and projections of the statistics. Local
BatchNorm has share 1, synchronized 1 / W. "Return" is how often a layer's share is not zero at all.
Shuffled samples (``shuffle_batch``) have local statistics of batches that were put together anew.
"""

import argparse
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from bnrewrite import permutations

Peers = Callable[[int, int], list[int]]


def ring(world_size: int) -> Peers:
    return lambda layer, trial: [(rank + 1) % world_size for rank in range(world_size)]


def random_peers(world_size: int) -> Peers:
    def peers(layer: int, trial: int) -> list[int]:
        step = torch.tensor(trial)
        return [
            int(permutations.shuffle_peers(step, layer, 0, rank, world_size)[0])
            for rank in range(world_size)
        ]

    return peers


def own_shares(
    xs: list[Tensor], num_layers: int, peers: Callable[[int], list[int]], groups: Tensor | None
) -> list[list[float]]:
    """Own share of every rank in its statistics, per layer.

    Args:
        xs: (N, C), the batch of each rank, requiring gradients.
        num_layers: of the network: linear, statistics, ReLU.
        peers: of every rank, for a layer.
        groups: (W * N,): which samples make a batch after samples were shuffled; None for ranks.
    """
    values = torch.cat(xs)
    num, width = xs[0].shape
    world_size = len(xs)
    batch_of = torch.arange(world_size * num) // num if groups is None else groups
    shares = []
    for layer in range(num_layers):
        values = values @ torch.randn(width, width).div(width**0.5)
        peer_of = peers(layer)
        means = torch.stack([values[batch_of == batch].mean(0) for batch in range(world_size)])
        rstds = torch.stack(
            [
                (values[batch_of == batch].var(0, correction=0) + 1e-5).rsqrt()
                for batch in range(world_size)
            ]
        )
        used = torch.tensor(peer_of)[batch_of]
        shares.append([_own_share(xs, means, rstds, used, rank) for rank in range(world_size)])
        values = ((values - means[used]) * rstds[used]).relu()
    return shares


def _own_share(xs: list[Tensor], means: Tensor, rstds: Tensor, used: Tensor, rank: int) -> float:
    """Share of ``rank`` in the statistics that its samples are normalized with."""
    num = xs[0].size(0)
    mine = used[rank * num : (rank + 1) * num]
    stats = torch.cat([means[mine].mean(0), rstds[mine].mean(0)])
    grads = torch.autograd.grad(stats @ torch.randn(stats.numel()), xs, retain_graph=True)
    squares = torch.stack([grad.square().sum() for grad in grads])
    return (squares[rank] / squares.sum()).item()


def measure(kind: str, world_size: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Mean own share per layer, and how often it is not zero."""
    found = []
    for trial in range(args.trials):
        torch.manual_seed(trial)
        xs = [torch.randn(args.batch, args.width, dtype=torch.float64) for _ in range(world_size)]
        xs = [x.requires_grad_() for x in xs]
        groups = None
        schedule: Peers = lambda layer, trial: list(range(world_size))  # noqa: E731
        if kind == "ring":
            schedule = ring(world_size)
        elif kind == "random":
            schedule = random_peers(world_size)
        elif kind == "shuffle_batch":
            groups = torch.randperm(world_size * args.batch) // args.batch

        def peers(layer: int, schedule: Peers = schedule, trial: int = trial) -> list[int]:
            return schedule(layer, trial)

        found.append(own_shares(xs, args.layers, peers, groups))
    table = torch.tensor(found)
    return table.mean((0, 2)), (table > 1e-20).double().mean((0, 2))


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share == 0 or share >= 0.1 else f"{100 * share:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print("# What leaks: a rank's own share in the statistics that it is normalized with\n")
    print(
        f"`benchmarks/shuffle_leak.py`, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {args.trials} trials, {args.batch} samples per rank, "
        f"{args.width} channels, ReLU networks with random weights, float64.\n"
    )
    layers = range(1, args.layers + 1)
    for world_size in (2, 4, 8):
        print(f"## {world_size} ranks\n")
        print("| own share, % | " + " | ".join(f"layer {layer}" for layer in layers) + " |")
        print("|---" * (args.layers + 1) + "|")
        returns = []
        for kind in ("local", "shuffle_batch", "ring", "random"):
            share, back = measure(kind, world_size, args)
            print(f"| {kind} | " + " | ".join(_percent(s) for s in share.tolist()) + " |")
            returns.append((kind, back))
        for kind, back in returns[2:]:
            cells = " | ".join(f"{100 * b:.0f}" for b in back.tolist())
            print(f"| {kind}: how often not zero, % | {cells} |")
        print()


if __name__ == "__main__":
    main()
