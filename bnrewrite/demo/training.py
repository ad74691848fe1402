"""Training: an ordinary loop that neither knows nor cares what its BatchNorm layers are."""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnrewrite.demo.data import Digits, epoch_batches

EVALUATIONS_PER_EPOCH = 12

LEARNING_RATE = 0.01


@dataclasses.dataclass(frozen=True)
class Score:
    """Mean cross-entropy and fraction of right answers."""

    loss: float
    accuracy: float


@dataclasses.dataclass
class Outcome:
    """What a run left behind.

    Attributes:
        batch_losses: (num_steps,), loss of this rank's part of each batch, in training mode.
        epochs: when the scores were taken, in epochs.
        train: scores on the training images, in evaluation mode.
        test: scores on the test images, in evaluation mode.
        state: the trained parameters and buffers.
        seconds: time of the training, evaluation left out.
    """

    batch_losses: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    epochs: list[float] = dataclasses.field(default_factory=list)
    train: list[Score] = dataclasses.field(default_factory=list)
    test: list[Score] = dataclasses.field(default_factory=list)
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long, in which order and on which part of each batch to train.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step over all ranks.
        seed: of the data order.
        rank: which part of each batch is this process's.
        world_size: number of parts.
    """

    epochs: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def batches(self, num_images: int, epoch: int) -> Tensor:
        """This rank's indices, (num_batches, batch_size / world_size)."""
        batches = epoch_batches(num_images, self.batch_size, self.seed, epoch)
        return batches.chunk(self.world_size, dim=1)[self.rank]


def train(
    model: nn.Module | Callable[[Tensor], Tensor],
    network: nn.Module,
    data: tuple[Digits, Digits],
    plan: Plan,
    on_step: Callable[[float], None],
) -> Outcome:
    """Trains ``model`` with SGD and evaluates as it goes.

    Args:
        model: what is called in training: ``network`` or a wrapper of it.
        network: the plain network, which is evaluated on the first rank.
        data: training and test images.
        plan: length, order and part.
        on_step: called after each step with its loss.
    """
    train_data, _ = data
    outcome = Outcome()
    num_batches = len(train_data.labels) // plan.batch_size
    optimizer = torch.optim.SGD(
        network.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=plan.epochs * num_batches, pct_start=0.2
    )
    every = max(1, num_batches // EVALUATIONS_PER_EPOCH)
    losses = []
    _evaluate_into(outcome, 0.0, network, data, plan)
    for epoch in range(plan.epochs):
        for index, batch in enumerate(plan.batches(len(train_data.labels), epoch), start=1):
            started = time.perf_counter()
            optimizer.zero_grad()
            logits = model(train_data.images[batch])
            loss = F.cross_entropy(logits, train_data.labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            outcome.seconds += time.perf_counter() - started
            on_step(losses[-1].item())
            if index == num_batches or (index % every == 0 and num_batches - index >= every):
                when = epoch + index / num_batches
                _evaluate_into(outcome, when, network, data, plan)
    outcome.batch_losses = torch.stack(losses)
    outcome.state = {name: value.detach().clone() for name, value in network.state_dict().items()}
    return outcome


def evaluate(network: nn.Module, data: Digits) -> Score:
    """Score in evaluation mode; the modes of all layers are put back."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    with torch.no_grad():
        logits = network(data.images)
    for module, training in modes.items():
        module.training = training
    right = (logits.argmax(1) == data.labels).double().mean()
    return Score(F.cross_entropy(logits, data.labels).item(), right.item())


def _evaluate_into(
    outcome: Outcome, when: float, network: nn.Module, data: tuple[Digits, Digits], plan: Plan
) -> None:
    if plan.rank == 0:
        outcome.epochs.append(when)
        outcome.train.append(evaluate(network, data[0]))
        outcome.test.append(evaluate(network, data[1]))
