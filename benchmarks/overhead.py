"""Cost of one call on a tiny tensor, where nothing but calls costs: a site against BatchNorm2d.

Forward plus backward in eager mode, with gradients of input, weight and bias. Two sites: ``alone``
shares its statistics with nobody; ``shared`` does, with the collective left out. Bar: at most 4
times ``nn.BatchNorm2d``. And evaluation, forward alone, of a site in a captured graph of its own.
"""

import statistics
import time
from collections.abc import Callable

import torch
from measure import arguments, finish, interleaved, leave_out_collectives, ratio
from torch import Tensor, nn

import bnrewrite

SHAPE = (2, 8, 4, 4)


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    inputs = (x, *layer.parameters())
    return lambda: torch.autograd.grad(layer(x), inputs, grad)


def _evaluation(rounds: int) -> dict[str, float]:
    """Microseconds of a forward with running statistics, without gradients."""
    models = {
        "evaluation": bnrewrite.convert(nn.Sequential(nn.BatchNorm2d(SHAPE[1]))).eval(),
        "evaluation by torch": nn.Sequential(nn.BatchNorm2d(SHAPE[1])).eval(),
    }
    x = torch.randn(SHAPE)
    with torch.no_grad():
        steps = {name: lambda model=model: model(x) for name, model in models.items()}
        seconds = interleaved(steps, rounds=rounds, calls=100, clock=time.process_time)
    return {name: 1e6 * statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    options = arguments(__doc__, rounds=60)
    torch.set_num_threads(1)
    leave_out_collectives()
    x, grad = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    layers = {
        "alone": bnrewrite.convert(nn.BatchNorm2d(SHAPE[1]), mode="local"),
        "shared": bnrewrite.convert(nn.BatchNorm2d(SHAPE[1]), mode="sync"),
        "torch": nn.BatchNorm2d(SHAPE[1]),
    }
    steps = {name: step(layer, x, grad) for name, layer in layers.items()}
    seconds = interleaved(steps, rounds=options.rounds, calls=100, clock=time.process_time)
    microseconds = {name: 1e6 * statistics.median(times) for name, times in seconds.items()}
    ratios = {name: ratio(seconds, name, "torch") for name in ("alone", "shared")}
    evaluation = _evaluation(options.rounds)
    for name, value in (microseconds | evaluation).items():
        print(f"{name:>20}: {value:7.1f} us per call")
    print(f"ratio alone {ratios['alone']:.2f}, shared {ratios['shared']:.2f} (bar 4)")
    result = {
        "shape": list(SHAPE), "microseconds": microseconds, "ratios": ratios,
        "evaluation_microseconds": evaluation,
    }  # fmt: skip
    finish(__file__, result, save=options.save)


if __name__ == "__main__":
    main()
