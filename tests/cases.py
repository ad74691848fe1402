"""Small models, each with one kind of trouble that real models give to graph capture.

A case is a model factory, a maker of call arguments, and what to expect of it: how many BatchNorm
evaluations per training step go past the ops by right (standardized weights, instance norm,
scripted code), and whether the model branches on data.
"""

import dataclasses
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True)
class Case:
    """One model with arguments for it.

    Attributes:
        name: what it shows.
        model: makes the model; the caller seeds.
        arguments: makes positional and keyword arguments for a batch of the given size.
        num_other: BatchNorm evaluations per training step that are no sites.
        compiles: whether the plain model trains under ``torch.compile(fullgraph=True)``.
        rtol: for float64 sums in another order; lower precision inside needs more.
        double: whether the model can be converted to float64.
        splits: whether ranks that share a batch are meant to do what one process does with all of
            it; not so with random draws, statistics over part of a batch, or branches on the batch.
    """

    name: str
    model: Callable[[], nn.Module]
    arguments: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    num_other: int = 0
    compiles: bool = True
    rtol: float = 1e-9
    double: bool = True
    splits: bool = True


CASES: list[Case] = []


def images(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(n, 3, 8, 8)."""
    return (torch.randn(n, 3, 8, 8),), {}


def vectors(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(n, 6)."""
    return (torch.randn(n, 6),), {}


def case(
    arguments: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]] = images, **expected: Any
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers a module class as a case."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        CASES.append(Case(cls.__name__, cls, arguments, **expected))
        return cls

    return register


def block(inputs: int = 3, outputs: int = 4) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Simple(nn.Module):
    """Base of cases: a convolution and a BatchNorm."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4) if norm is None else norm


@case(lambda n: ((torch.randn(n, 5, 1, 1),), {}))
class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(5, 8, 4, 1, 0, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


@case(lambda n: ((torch.randn(n, 5, 1, 1), torch.randn(n, 3, 8, 8)), {}))
class GanStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = Generator()
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 4)
        )

    def forward(self, z: Tensor, real: Tensor) -> Tensor:
        fake = self.generator(z)
        return self.discriminator(real) - self.discriminator(fake)


@case(lambda n: ((torch.randn(n, 3, 7),), {}))
class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 1)
        self.bn1 = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 5)
        self.bn2 = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(x)))
        x = torch.max(x, 2)[0]
        return F.relu(self.bn2(self.fc(x)))


@case(lambda n: ((torch.randn(n, 1, 5, 6, 7),), {}))
class UNet3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 4, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm3d(4)
        self.up = nn.ConvTranspose3d(4, 2, 2, stride=2)
        self.bn2 = nn.BatchNorm3d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.down(x)))
        y = self.bn2(self.up(y))
        sizes = [a - b for a, b in zip(y.shape[2:], x.shape[2:], strict=True)]
        y = F.pad(y, [0, -sizes[2], 0, -sizes[1], 0, -sizes[0]])
        return torch.cat([x, y], 1)


@case(lambda n: ((torch.randn(n, 3, 8, 8), torch.randn(n, 3, 8, 8)), {}))
class MocoPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = block(), block()
        for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
            k.data.copy_(q.data)
            k.requires_grad = False

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        out = self.query(q)
        with torch.no_grad():
            for a, b in zip(self.query.parameters(), self.key.parameters(), strict=True):
                b.data.mul_(0.9).add_(a.data, alpha=0.1)
            target = self.key(k)
        return (out * target).sum((1, 2, 3))


@case()
class NoGradTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = block(), block()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return (self.student(x) - target).pow(2)


@case()
class OwnNoGrad(Simple):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.bn(self.conv(x))
        return self.conv(x) + y


@case()
class FunctionalOwnBuffers(nn.Module):
    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.batch_norm(x, self.mean, self.var, self.weight, None, self.training, 0.2)


def _normalize(x: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
    return F.batch_norm(x, mean, var, training=training)


@case()
class FunctionalInHelper(nn.Module):
    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return _normalize(self.conv(x), self.mean, self.var, self.training)


@case()
class TorchBatchNorm(Simple):
    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        assert isinstance(bn, nn.BatchNorm2d)
        x, y = self.conv(x), (bn.running_mean, bn.running_var, self.training, 0.1, 1e-5, False)
        return torch.batch_norm(x, bn.weight, bn.bias, *y)


class WeightStandardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@case(num_other=1)
class WeightStandardization(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = WeightStandardized(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class GhostBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if not self.training or n % 2:
            return super().forward(x)
        x = x.view(n // 2, 2, c, h, w).transpose(0, 1).reshape(2 * (n // 2), c, h, w)
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            True,
            self.momentum or 0.0,
        )
        return y.view(2, n // 2, c, h, w).transpose(0, 1).reshape(n, c, h, w)


@case(lambda n: ((torch.randn(4, 3, 8, 8),), {}), splits=False)
class GhostNet(Simple):
    def __init__(self) -> None:
        super().__init__(GhostBatchNorm(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@case()
class SharedTwice(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv2(self.bn(self.conv(x)).relu()))


@case()
class Aliased(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.norm = self.bn
        self.again = nn.Sequential(nn.Conv2d(4, 4, 1), self.bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.norm(self.conv(x)))


class _ConvNormAct(nn.Module):
    """Registers its layers by name and in the sequence that calls them, as nnU-Net's do."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, 3, padding=1)
        self.norm = nn.BatchNorm2d(num_out)
        self.nonlin = nn.LeakyReLU(inplace=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, self.nonlin)

    def forward(self, x: Tensor) -> Tensor:
        return self.all_modules(x)


@case()
class RegisteredTwice(nn.Module):
    """Layers whose first name is not that by which they are called; one branch has two such."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (_ConvNormAct(num, 4) for num in (3, 4, 4))
        self.stages = nn.ModuleList([nn.Sequential(self.left), nn.Sequential(self.right)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return sum(stage(x) for stage in self.stages)  # pyright: ignore[reportReturnType]


class SuperForward(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@case()
class SubclassSuperForward(Simple):
    def __init__(self) -> None:
        super().__init__(SuperForward(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class NoOverride(nn.BatchNorm2d):
    extra = 3


@case()
class SubclassNoOverride(Simple):
    def __init__(self) -> None:
        super().__init__(NoOverride(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class AnyDim(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


@case(lambda n: ((torch.randn(n, 4, 5),), {}))
class DimensionAgnostic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = AnyDim(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) + self.bn(x.unsqueeze(-1)).squeeze(-1)


class ExplicitBase(nn.BatchNorm2d):
    """Calls torch's forward by name, past any method resolution order."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        return nn.BatchNorm2d.forward(self, x)


@case(compiles=False)
class SubclassExplicitBase(Simple):
    def __init__(self) -> None:
        super().__init__(ExplicitBase(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class _Checkpointed(nn.Module):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.block = block()
        for module in self.block.modules():
            # torch's own layers would move their statistics once more when they are recomputed.
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)
        return self.bn(x)


@case(compiles=False)
class CheckpointNonReentrant(_Checkpointed):
    pass


@case(compiles=False)
class CheckpointReentrant(_Checkpointed):
    reentrant = True


@case(lambda n: ((torch.randn(n, 4, 3, 8, 8),), {}))
class LoopOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Conv2d(7, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), 4, 8, 8)
        for t in range(x.size(1)):
            h = torch.tanh(self.bn(self.cell(torch.cat([x[:, t], h], 1))))
        return h


@case(lambda n: ((torch.randn(n, 3, 3, 8, 8),), {}))
class LoopOverModuleList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = [norm(self.conv(x[:, t])) for t, norm in enumerate(self.norms)]
        return torch.stack(y).sum(0)


class _Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def _scaled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 1.5


@case()
class HookOnBatchNorm(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.bn.register_forward_hook(_scaled)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@case()
class BatchNormInHook(nn.Module):
    """A BatchNorm that no forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.conv.register_forward_hook(self._normalize)

    def _normalize(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return self.bn(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@case()
class HookOnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = block()
        self.block.register_forward_hook(_scaled)
        self.head = block(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


@case()
class WeightNorm(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class _Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


@case()
class ParametrizedBatchNorm(Simple):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrize.register_parametrization(self.bn, "weight", _Positive())

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@case()
class OddFlags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4, affine=False)
        self.bn2 = nn.BatchNorm2d(4, track_running_stats=False)
        self.bn3 = nn.BatchNorm2d(4, momentum=None)
        self.bn4 = nn.BatchNorm2d(4)
        self.bn4.track_running_stats = False

    def forward(self, x: Tensor) -> Tensor:
        return self.bn4(self.bn3(self.bn2(self.bn1(self.conv(x)))))


@case(lambda n: (({"image": torch.randn(n, 3, 8, 8)},), {}))
class DictInOut(Simple):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        y = self.bn(self.conv(batch["image"]))
        return {"out": y, "pooled": y.mean((2, 3))}


@case(lambda n: (([torch.randn(n, 3, 8, 8), torch.randn(n, 3, 6, 6)],), {}))
class ListOfScales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [module(x) for module, x in zip(self.blocks, xs, strict=True)]


@case(lambda n: ((torch.randn(n, 3, 8, 8),), {"mask": torch.rand(n, 1, 8, 8)}))
class OptionalMask(Simple):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = self.bn(self.conv(x)) * scale
        return x if mask is None else x * mask


@case()
class AuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.main, self.aux = block(), block(4, 4), block(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        if self.training:
            return self.main(x), self.aux(x)
        return self.main(x)


@case(splits=False)
class FunctionalDropout(Simple):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.bn(self.conv(x)), 0.3, self.training)


@case(lambda n: ((torch.randn(n, 3, 4),), {}))
class LeafOfTorchNN(nn.Module):
    """A layer of torch.nn that holds BatchNorm modules, which fx would not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.layer.norm1 = nn.BatchNorm1d(3)  # pyright: ignore
        self.layer.norm2 = nn.BatchNorm1d(3)  # pyright: ignore
        # The fast path of evaluation reads attributes that only LayerNorm has.
        self.layer.activation_relu_or_gelu = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@case()
class IntrinsicBNReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn_relu = torch.ao.nn.intrinsic.BNReLU2d(nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_relu(self.conv(x))


# bfloat16 has 8 bits: one rounding is 4e-3 of an entry, and sums of a few gradients follow it.
@case(double=False, rtol=3e-2, splits=False)
class AutocastInside(Simple):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.conv(x)
            x = self.bn(x)
        return x.float()


@case(compiles=False, splits=False)
class BranchOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(), block()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if x.mean() > 0 else self.b(x)
        return self.bn(y)


@case()
class FrozenByTrain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(), block(4, 4)

    def train(self, mode: bool = True) -> "FrozenByTrain":
        super().train(mode)
        for module in self.a.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@case()
class OnlyInTraining(Simple):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) if self.training else x * 2


@case()
class OnlyInEvaluation(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv(x))
        return x if self.training else self.bn(x)


@case()
class ReadsChildFlag(Simple):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y * 2 if self.bn.training else y


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 3


@case()
class CallsAutogradFunction(Simple):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(_Double.apply(self.conv(x)))  # pyright: ignore


@case(num_other=1, splits=False)
class InstanceNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.InstanceNorm2d(4, track_running_stats=True)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.norm(self.conv(x)))


@case(num_other=1)
class AdaptiveInstanceNorm(nn.Module):
    """Spelled as a BatchNorm over samples times channels, as in MUNIT and FUNIT."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.style = nn.Linear(3, 8)
        self.bn = nn.BatchNorm2d(4)
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.style(x.mean((2, 3))).chunk(2, dim=1)
        x = self.conv(x)
        n, c, h, w = x.shape
        mean, var = self.mean.repeat(n), self.var.repeat(n)
        samples = x.contiguous().view(1, n * c, h, w)
        samples = F.batch_norm(
            samples, mean, var, weight.reshape(-1), bias.reshape(-1), True, 0.1, 1e-5
        )
        return self.bn(samples.view(n, c, h, w))


class StandardizedRows(nn.Module):
    """Of a weight with four."""

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.reshape(1, 4, -1)
        return F.batch_norm(rows, None, None, training=True).reshape_as(weight)


@case(num_other=1)
class StandardizesByParametrization(Simple):
    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.conv, "weight", StandardizedRows())

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@case(compiles=False)
class CountsCalls(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        return self.bn(self.conv(x)) * self.calls


@case(compiles=False, splits=False)
class DrawsInPython(Simple):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x * random.random() if self.training else x


@case(compiles=False, splits=False)
class DrawsATensor(Simple):
    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x * torch.rand(1) if self.training else x


@case()
class OtherMethods(nn.Module):
    """The parent calls methods of its child that are not forward."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.bn = nn.BatchNorm2d(4)

        def encode(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Encoder()
        self.head = nn.Linear(4, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.encoder.encode(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


@case()
class TypeOfArgument(Simple):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        x = x if isinstance(x, Tensor) else torch.cat(x)
        return self.bn(self.conv(x))


@case()
class KeywordToBatchNorm(Simple):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(x))


@case()
class NeverRuns(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.dead = nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@case(vectors)
class InPlaceActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.fc(x))
        return F.relu_(y) + y


@case(num_other=1, splits=False)
class ScriptedChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = torch.jit.script(_Scripted())
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.child(x))


@case(compiles=False, double=False, rtol=1e-4, splits=False)
class QuantizationAware(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        self.conv = torch.ao.nn.intrinsic.qat.ConvBn2d(3, 4, 3, qconfig=config)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@case()
class SyncBatchNormInput(Simple):
    def __init__(self) -> None:
        super().__init__(nn.SyncBatchNorm(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@case()
class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.DataParallel(block())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Output(dict):
    """Values by name and by position, as model libraries return them."""

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = block()
        self.right = block()

    def forward(self, x: Tensor) -> Any:
        return _Output(left=self.left(x), right=self.right(x))


@case()
class OutputOfItsOwnClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = _Branches()

    def forward(self, x: Tensor) -> Tensor:
        out = self.branches(x)
        return out[0] + out["right"]


@case()
class BranchesInLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(block() for _ in range(3))
        self.merge = _MergeLists()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.merge([branch(x) for branch in self.branches])
        return first * second


class _MergeLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(4)
        self.second = nn.BatchNorm2d(4)

    def forward(self, values: list[Tensor]) -> list[Tensor]:
        values[0] = self.first(values[0] + values[2])
        values.append(self.second(values[1]))
        return [values[0], values[3]]


@case()
class CallsForwardOfChildren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = block()
        self.residual = nn.ModuleList([block(4, 4), block(4, 4)])
        self.inner = Simple()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn.forward(self.block.forward(x))
        for layer in self.residual:
            x = x + layer.forward(x)
        return x * self.inner.bn.forward(x)


@case(lambda n: ((torch.randn(n, 3, 8, 8), torch.randn(n, 3, 8, 8)), {}))
class SecondArgumentFirst(nn.Module):
    """What the second argument goes through takes longer, so that it begins first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.short = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(y))))
        return self.short(x) - y


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, 4, 1)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        features = [x] if isinstance(x, Tensor) else x
        return F.dropout(self.conv(self.bn(torch.cat(features, 1))), 0.1, self.training)


@case(splits=False)
class DenseLayers(nn.Module):
    """The same layers are called with tensors and with lists."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _DenseLayer(3), _DenseLayer(7)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        features.append(self.first(features))
        features.append(self.first(x))
        return self.second(features[:2]) * features[2]


@case(lambda n: ((torch.randn(n, 3, 8, 8), None if n % 2 else torch.rand(n, 1, 8, 8)), {}))
class NoneForRequired(Simple):
    """The caller must name the argument, and may give None."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.bn(self.conv(x))
        return x if mask is None else x * mask


@case()
class OrderedOutput(Simple):
    """As backbones of torchvision's detectors return their features."""

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        out = OrderedDict(second=self.conv(x))
        out["first"] = self.bn(out["second"])
        return out


class _WithShortcut(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, shortcut: Tensor | None = None, scale: Any = None) -> Tensor:
        y = self.bn(self.conv(x)) + (x if shortcut is None else shortcut)
        return y if scale is None else y * scale


@case()
class OptionalFromParent(Simple):
    """The parent gives optional arguments, by position and by name, as DLA's trees do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _WithShortcut()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        y = self.inner(self.inner(x), x)
        return self.inner(y, scale=self.inner(y, None, x.sigmoid()))
