"""The data: scikit-learn's handwritten digits, split once, and the order in which ranks read it."""

import dataclasses

import torch
from torch import Tensor

NUM_TEST = 597
"""Images held back for testing, of 1797; 1200 remain."""


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images and labels.

    Attributes:
        images: (N, 1, 8, 8), float64, from 0 to 1.
        labels: (N,), int64.
    """

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Digits":
        """The same on ``device``, images in ``dtype``."""
        return Digits(self.images.to(device, dtype), self.labels.to(device))


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """Training and test images, split at random by ``seed``; nothing is downloaded."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).double().div(16).view(-1, 1, 8, 8)
    labels = torch.from_numpy(labels).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[NUM_TEST:], order[:NUM_TEST]
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def epoch_batches(num_images: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Indices of the global batches of one epoch, (num_batches, batch_size).

    They depend on the seed and the epoch only: each rank takes its columns, a single process all.
    An incomplete last batch is dropped.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_images, generator=generator)
    num_batches = num_images // batch_size
    return order[: num_batches * batch_size].view(num_batches, batch_size)
