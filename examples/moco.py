"""Momentum contrast on handwritten digits, with and without shuffled BatchNorm statistics.

    python examples/moco.py --ranks 4 --epochs 10              # local statistics: it can cheat
    python examples/moco.py --ranks 4 --epochs 10 --shuffle    # statistics of the next rank
    python examples/moco.py --ranks 4 --epochs 10 --compare moco.png

Queries and keys are two views of the same images (He et al. 2019, https://arxiv.org/abs/1911.05722).
With local statistics, a query and its key are normalized with the same images, but no key in the
queue is. An encoder may recognize the right key by that. Contrastive accuracy (how often the right
key is the nearest) then rises although the features do not improve; the nearest-neighbor accuracy
on unseen digits shows this. The script also measures the gain from a shared batch: with the same
weights and images, it normalizes keys once together with the images of their queries and once in
regrouped batches. An encoder that cheats gains more than one that could not learn to cheat because,
in its training, keys never shared a batch with their queries.
"""  # fmt: skip

import argparse
import copy
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import bnrewrite

KINDS = {
    "none": "local",
    "ring": {"encoder_k.*": "shuffle", "*": "local"},
    "random": {"encoder_k.*": bnrewrite.Shuffle(schedule="random"), "*": "local"},
    "batch": "local",
    "sync": "sync",
}
TITLES = {
    "none": "no shuffling",
    "ring": "shuffle (ring)",
    "random": "shuffle (random)",
    "batch": "shuffle_batch",
    "sync": "sync",
}


def encoder(width: int = 32, dim: int = 32) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, dim),
    )


Epoch = tuple[float, float, float, float]
"""Loss, contrastive accuracy, nearest-neighbor accuracy, gain from shared batches."""


class MoCo(nn.Module):
    """Query encoder, a key encoder that follows it slowly, and a queue of earlier keys."""

    def __init__(self, *, shuffle_samples: bool, dim: int = 32, queue_size: int = 512) -> None:
        super().__init__()
        self.encoder_q = encoder(dim=dim)
        self.encoder_k = encoder(dim=dim).requires_grad_(False)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.shuffle_samples = shuffle_samples
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.start = 0

    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities of each query to its key (column 0) and to the queue, and the keys."""
        q = F.normalize(self.encoder_q(queries), dim=1)
        with torch.no_grad():
            if self.shuffle_samples:
                keys, restore = bnrewrite.shuffle_batch(keys)
                k = restore(self.encoder_k(keys))
            else:
                k = self.encoder_k(keys)
            k = F.normalize(k, dim=1)
        queue = self.get_buffer("queue").clone()
        return torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1), k

    @torch.no_grad()
    def follow(self, k: Tensor, momentum: float) -> None:
        """Updates the key encoder, and puts the keys of all ranks into the queue."""
        for slow, fast in zip(
            self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True
        ):
            slow.lerp_(fast, 1 - momentum)
        gathered = [torch.empty_like(k) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, k)
        queue, new = self.get_buffer("queue"), torch.cat(gathered)
        places = (self.start + torch.arange(new.size(0))) % queue.size(0)
        queue[places] = new
        self.start = (self.start + new.size(0)) % queue.size(0)


def augment(images: Tensor) -> Tensor:
    """Rotates, scales and shifts images, changes their contrast and adds noise."""
    num = images.size(0)
    angle = (torch.rand(num) - 0.5) * 0.7
    zoom = 0.8 + 0.4 * torch.rand(num)
    shift = (torch.rand(num, 2) - 0.5) * 0.5
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    theta = torch.cat([rotation * zoom.view(-1, 1, 1), shift.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    contrast = 0.6 + 0.8 * torch.rand(num, 1, 1, 1)
    return moved * contrast + 0.15 * torch.randn_like(moved)


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training and for testing."""
    digits = load_digits()
    images = torch.tensor(digits["images"], dtype=torch.float32).unsqueeze(1) / 16  # pyright: ignore
    labels = torch.tensor(digits["target"])  # pyright: ignore
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels.numpy()
    )
    return images[train], labels[train], images[test], labels[test]


@torch.no_grad()
def gain_from_shared_batches(model: MoCo, images: Tensor, args: argparse.Namespace) -> float:
    """Contrastive accuracy with keys from the batches of their queries, minus that with others."""
    encoder_q, encoder_k = (
        bnrewrite.revert(copy.deepcopy(one)) for one in (model.encoder_q, model.encoder_k)
    )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # A sample of the images, the same for all variants.
    order = torch.randperm(images.size(0), generator=torch.Generator().manual_seed(1))
    hits = torch.zeros(2)
    batches = order.split(args.batch_size * world_size)[:-1][:20]
    for batch in batches:
        mine = images[batch[rank * args.batch_size : (rank + 1) * args.batch_size]]
        q, keys = F.normalize(encoder_q(augment(mine)), dim=1), augment(mine)
        others, restore = bnrewrite.shuffle_batch(keys)
        negatives = (q @ model.get_buffer("queue").T).amax(1)
        for index, k in enumerate((encoder_k(keys), restore(encoder_k(others)))):
            positive = (q * F.normalize(k, dim=1)).sum(1)
            hits[index] += (positive > negatives).float().mean() / len(batches) / world_size
    dist.all_reduce(hits)
    return (hits[0] - hits[1]).item()


@torch.no_grad()
def nearest_neighbor_accuracy(model: nn.Module) -> float:
    """How often the most similar training image has the label of a test image, in eval mode."""
    train, train_labels, test, test_labels = load()
    model.eval()
    features = F.normalize(model(train), dim=1), F.normalize(model(test), dim=1)
    model.train()
    nearest = (features[1] @ features[0].T).argmax(1)
    return (train_labels[nearest] == test_labels).float().mean().item()


def show_first_statistics(model: MoCo, images: Tensor) -> None:
    """Prints, per rank, the mean of its own keys at the first site and the mean that it uses."""
    first = model.encoder_k[1]
    assert isinstance(first, nn.BatchNorm2d)
    assert first.running_mean is not None
    first_conv = model.encoder_k[0]
    before = first.running_mean.clone()
    keys = images
    own = first_conv(keys).mean((0, 2, 3))[:3]
    if model.shuffle_samples:
        keys, _ = bnrewrite.shuffle_batch(images)
    with torch.no_grad():
        first(first_conv(keys))
    # The running mean moved by the momentum towards the mean that was used.
    used = ((first.running_mean - 0.9 * before) / 0.1)[:3]
    first.running_mean.copy_(before)
    text = f"mean of its own keys {_numbers(own)}, normalized with {_numbers(used)}"
    lines: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lines, text)
    if dist.get_rank() == 0:
        print("\n".join(f"rank {rank}: {line}" for rank, line in enumerate(lines)), flush=True)


def _numbers(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:+.4f}" for value in values.tolist()) + "]"


def train(kind: str, seed: int, args: argparse.Namespace) -> Iterator[Epoch]:
    """Trains, and yields loss, both accuracies and the gain from shared batches per epoch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    model = MoCo(shuffle_samples=kind == "batch")
    bnrewrite.convert(model, KINDS[kind])
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(
        model.encoder_q.parameters(), lr=args.rate, momentum=0.9, nesterov=True
    )
    images = load()[0]
    step_size = args.batch_size * world_size
    # From here on ranks see different images and draw different augmentations.
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(1000 * seed + rank + 1)
    show_first_statistics(model, augment(images[rank::world_size][: args.batch_size]))
    for epoch in range(args.epochs):
        losses, hits = [], []
        batches = torch.randperm(images.size(0), generator=order).split(step_size)[:-1]
        bar = tqdm(
            batches,
            desc=f"{TITLES[kind]}, epoch {epoch + 1}",
            # None: shown on terminals only.
            disable=True if rank > 0 else None,
            leave=False,
        )
        for batch in bar:
            mine = images[batch[rank * args.batch_size : (rank + 1) * args.batch_size]]
            similarities, k = parallel(augment(mine), augment(mine))
            target = torch.zeros(len(mine), dtype=torch.long)
            loss = F.cross_entropy(similarities / args.temperature, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.follow(k, args.key_momentum)
            losses.append(loss.item())
            hits.append((similarities.argmax(1) == 0).float().mean().item())
            bar.set_postfix(loss=f"{loss.item():.2f}")
        mean = torch.tensor([np.mean(losses), np.mean(hits)])
        dist.all_reduce(mean)
        mean /= world_size
        yield (
            mean[0].item(),
            mean[1].item(),
            nearest_neighbor_accuracy(model.encoder_q),
            gain_from_shared_batches(model, images, args),
        )


def run(rank: int, world_size: int, store: str | None, args: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    kinds = list(KINDS) if args.compare else [args.shuffle]
    results: dict[str, list[list[Epoch]]] = {}
    for kind in kinds:
        for seed in range(args.seeds):
            history = []
            for epoch, numbers in enumerate(train(kind, seed, args)):
                history.append(numbers)
                if rank == 0:
                    print(
                        f"{TITLES[kind]:16} seed {seed} epoch {epoch + 1:3}: "
                        f"loss {numbers[0]:.3f}, contrastive {numbers[1]:.1%}, "
                        f"nearest neighbor {numbers[2]:.1%}, "
                        f"gain from shared batches {numbers[3]:+.1%}",
                        flush=True,
                    )
            results.setdefault(kind, []).append(history)
    if rank == 0 and args.compare:
        draw(results, world_size, args)
    dist.destroy_process_group()


def draw(
    results: dict[str, list[list[Epoch]]],
    world_size: int,
    args: argparse.Namespace,
) -> None:
    """Draws both accuracies and the gain side by side, and prints a table of them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    for kind, runs in results.items():
        table = np.array(runs)
        epochs = np.arange(1, table.shape[1] + 1)
        for axis, column in zip(axes, (1, 2, 3), strict=True):
            mean, std = 100 * table[:, :, column].mean(0), 100 * table[:, :, column].std(0)
            (line,) = axis.plot(epochs, mean, label=TITLES[kind])
            axis.fill_between(epochs, mean - std, mean + std, color=line.get_color(), alpha=0.15)
        last = 100 * table[:, -1, 1:]
        print(
            f"{TITLES[kind]:16} contrastive {last[:, 0].mean():5.1f} +- {last[:, 0].std():.1f} %"
            f"   nearest neighbor {last[:, 1].mean():5.1f} +- {last[:, 1].std():.1f} %"
            f"   gain from shared batches {last[:, 2].mean():+.1f} +- {last[:, 2].std():.1f} points"
        )
    axes[0].set_title("contrastive accuracy, % (training)")
    axes[1].set_title("nearest-neighbor accuracy, % (test)")
    axes[2].set_title("gain from shared batches, points")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    seeds = "1 seed" if args.seeds == 1 else f"mean and deviation of {args.seeds} seeds"
    figure.suptitle(f"Digits, {world_size} ranks with {args.batch_size} images each, {seeds}")
    figure.savefig(args.compare, dpi=120)
    print(f"wrote {args.compare}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--shuffle", nargs="?", const="ring", default="none", choices=list(KINDS),
        help="variant to train; ring if no name follows, none without the option",
    )  # fmt: skip
    parser.add_argument("--compare", metavar="PICTURE", help="train all variants and plot them")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8, help="images per rank")
    parser.add_argument("--rate", type=float, default=0.03)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--key-momentum", type=float, default=0.99)
    args = parser.parse_args()
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (args.ranks, f"file://{folder}/store", args), nprocs=args.ranks)  # pyright: ignore


if __name__ == "__main__":
    main()
