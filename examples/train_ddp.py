"""Data-parallel training with distributed BatchNorm: an ordinary script plus three lines.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --epochs 4
    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --epochs 8 --resume

It trains a small residual network on scikit-learn's digits. The three lines are marked (1) to (3).
"""

import argparse
import os
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

import bnrewrite  # (1)
from bnrewrite.demo.data import Digits, epoch_batches, load_digits
from bnrewrite.demo.network import DigitsNet


def main() -> None:
    args = parse_arguments()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available() and torch.cuda.device_count() > local_rank
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    torch.manual_seed(args.seed)
    train_data, test_data = (part.to(device, torch.float32) for part in load_digits(args.seed))

    network = DigitsNet().to(device)
    network = bnrewrite.convert(network, mode="sync")  # (2)
    if dist.get_rank() == 0:
        print(bnrewrite.report(network), flush=True)  # (3)

    model: nn.Module = network
    if args.compile:
        model = cast(nn.Module, torch.compile(network, fullgraph=True))
    model = DistributedDataParallel(model)
    optimizer = SGD(network.parameters(), lr=args.lr, momentum=0.9, nesterov=True)
    schedule = StepLR(optimizer, step_size=3, gamma=0.5)
    first_epoch = 0
    if args.resume:
        first_epoch = load_checkpoint(args.checkpoint, network, optimizer, schedule, device)

    for epoch in range(first_epoch, args.epochs):
        loss = train_epoch(model, optimizer, train_data, args, epoch)
        schedule.step()
        accuracy = evaluate(network, test_data)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {accuracy:.1%}", flush=True)
            save_checkpoint(args.checkpoint, network, optimizer, schedule, epoch + 1)
    dist.barrier()
    # After the group, its destructor can wait forever (torch 2.13 and gloo, with any model).
    del model
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Data-parallel training.")
    parser.add_argument("--epochs", type=int, default=4, help="epochs in total, resumed or not")
    parser.add_argument("--batch-size", type=int, default=2, help="images per rank and step")
    parser.add_argument("--lr", type=float, default=0.01, help="initial learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data split and order")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--compile", action="store_true", help="torch.compile with fullgraph=True")
    parser.add_argument("--amp", action="store_true", help="forward in bfloat16 under autocast")
    return parser.parse_args()


def train_epoch(
    model: nn.Module, optimizer: Optimizer, data: Digits, args: argparse.Namespace, epoch: int
) -> float:
    """One pass over the training images; returns the mean loss over ranks and steps."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = torch.zeros((), device=data.images.device)
    batches = epoch_batches(len(data.labels), args.batch_size * world_size, args.seed, epoch)
    model.train()
    for batch in batches.chunk(world_size, dim=1)[rank]:
        optimizer.zero_grad()
        with torch.autocast(data.images.device.type, torch.bfloat16, enabled=args.amp):
            loss = F.cross_entropy(model(data.images[batch]), data.labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / (len(batches) * world_size)


@torch.no_grad()
def evaluate(network: nn.Module, data: Digits) -> float:
    """Test accuracy. Evaluation communicates nothing, so ranks may evaluate independently."""
    network.eval()
    right: Tensor = network(data.images).argmax(1) == data.labels
    return right.double().mean().item()


def save_checkpoint(
    path: Path, network: nn.Module, optimizer: Optimizer, schedule: LRScheduler, epoch: int
) -> None:
    """Writes a checkpoint that both the converted and the plain network can load."""
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "epoch": epoch,
    }
    # A crash while writing must not destroy the previous checkpoint.
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(path)


def load_checkpoint(
    path: Path,
    network: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    device: torch.device,
) -> int:
    """Loads a checkpoint on every rank; returns the number of epochs already trained."""
    state = torch.load(path, map_location=device, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["epoch"]


if __name__ == "__main__":
    main()
