"""Cost of one call on a tiny tensor, where nothing but calls costs: a site against BatchNorm2d.

Forward plus backward in eager mode, with gradients of input, weight and bias, one process, so no
collective. Bar: at most 4 times ``nn.BatchNorm2d``.
"""

import statistics
from collections.abc import Callable

import torch
from measure import arguments, finish, interleaved, ratio
from torch import Tensor, nn

import bnrewrite

SHAPE = (2, 8, 4, 4)


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    inputs = (x, *layer.parameters())
    return lambda: torch.autograd.grad(layer(x), inputs, grad)


def main() -> None:
    options = arguments(__doc__, rounds=60)
    torch.set_num_threads(1)
    x, grad = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    layers = {
        "site": bnrewrite.convert(nn.BatchNorm2d(SHAPE[1])),
        "local": nn.BatchNorm2d(SHAPE[1]),
    }
    steps = {name: step(layer, x, grad) for name, layer in layers.items()}
    seconds = interleaved(steps, rounds=options.rounds, calls=100)
    microseconds = {name: 1e6 * statistics.median(times) for name, times in seconds.items()}
    overhead = ratio(seconds, "site", "local")
    for name, value in microseconds.items():
        print(f"{name:>6}: {value:7.1f} us per call")
    print(f"ratio {overhead:.2f} (bar 4)")
    result = {"shape": list(SHAPE), "microseconds": microseconds, "ratio": overhead}
    finish(__file__, result, save=options.save)


if __name__ == "__main__":
    main()
