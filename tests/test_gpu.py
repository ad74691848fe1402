"""What only a GPU shows: a host that never waits, CUDA graphs, bits that repeat, accuracy."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import bnrewrite
from bnrewrite import reference as definition
from bnrewrite.kernels import cuda as aten_kernels
from bnrewrite.kernels import gpu as gpu_kernels
from bnrewrite.kernels.triton import launcher
from tests.kernel_cases import EPS, case, check_moments, laid_out

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Of torch, about what it calls itself.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

LAYOUTS = ["contiguous", "channels-last"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]

# Without types: cases pass arguments on in groups.
aten: Any = aten_kernels
gpu: Any = gpu_kernels
reference: Any = definition


@pytest.fixture
def group() -> Iterator[str]:
    """Name of a group of this process alone, whose collectives run on the GPU."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """Call it, and what makes the host wait for the device is an error until the test ends."""
    torch.use_deterministic_algorithms(False)
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 8, 6, 6), (0, 8, 6, 6), (16, 64, 28, 28)], ids=str)
def test_the_host_never_waits(
    group: str, no_waiting: Callable[[], None], shape: tuple[int, ...], layout: str
) -> None:
    def image() -> Tensor:
        return laid_out(torch.randn(shape, device="cuda"), layout).requires_grad_()

    x, residual = image(), image()
    C = x.size(1)
    weight, bias = (torch.ones(C, device="cuda").requires_grad_() for _ in range(2))
    running = (torch.zeros(C, device="cuda"), torch.ones(C, device="cuda"))
    tracked = torch.tensor(0, device="cuda")

    def step() -> None:
        y = torch.ops.bnrewrite.batch_norm_act(
            x, weight, bias, *running, tracked, True, True, 0.1, EPS, group, residual, "relu", 0.0
        )
        torch.autograd.grad(y, (x, weight, bias, residual), torch.ones_like(y))

    # Kernels are compiled, and NCCL forms its group.
    step()
    no_waiting()
    step()


@pytest.mark.parametrize("num_images", [0, 1, 5])
def test_a_cuda_graph_serves_uneven_and_empty_ranks(num_images: int) -> None:
    """What is replayed uses the sums that are there then, of however many values."""
    x = torch.randn(num_images, 6, 7, 5, device="cuda")
    others = [torch.randn(n, 6, 7, 5, device="cuda") for n in (3, 0, 4)]
    grad = torch.randn_like(x)
    weight, bias = torch.rand(6, device="cuda"), torch.randn(6, device="cuda")
    sent = gpu.moments(x).clone()
    totals = torch.zeros_like(sent)
    sums = torch.zeros(12, dtype=torch.float64, device="cuda")
    running = [torch.zeros(6, device="cuda"), torch.ones(6, device="cuda")]
    tracked = torch.tensor(0, device="cuda")

    def phases() -> tuple[Tensor, ...]:
        sent.copy_(gpu.moments(x))
        y, stats = gpu.normalize(
            x, totals, weight, bias, EPS, *running, tracked, None, False, None, "relu"
        )
        mine, _ = gpu.activation_backward_reduce(
            grad, x, stats, weight, bias, None, "relu", 0.0, False
        )
        dx = gpu.normalize_backward(grad, x, stats, totals, weight, sums, bias, None, "relu")
        return y, stats, mine, dx

    phases()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, stats, mine, dx = phases()
    for tensor, value in zip((*running, tracked), (0, 1, 0), strict=True):
        tensor.fill_(value)
    for other in others:
        x.normal_()
        everything = torch.cat([x, other])
        totals.copy_(reference.moments(x) + reference.moments(other))
        before = tracked.item()
        graph.replay()
        torch.testing.assert_close(sent, reference.moments(x), rtol=1e-5, atol=1e-4)
        assert tracked.item() == before + (everything.size(0) > 0)
        if everything.size(0):
            z = F.batch_norm(
                everything.double(), None, None, weight.double(), bias.double(), True, 0.1, EPS
            )
            torch.testing.assert_close(y.double(), F.relu(z)[:num_images], rtol=1e-5, atol=1e-5)
        behind = (weight, bias, None, "relu", 0.0)
        exact, _ = reference.activation_backward_reduce(grad, x, stats, *behind, False)
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-4)
        exact = reference.normalize_backward(
            grad, x, stats, totals, weight, sums, bias, None, "relu", 0.0
        )
        torch.testing.assert_close(dx, exact, rtol=1e-5, atol=1e-5)


def test_graphs_that_run_beside_each_other_share_nothing() -> None:
    """Two graphs replayed on two streams at a time, and launches of a third."""
    xs = [torch.randn(64, 64, 28, 28, device="cuda") + i for i in range(3)]
    expected = [reference.moments(x) for x in xs]
    gpu.moments(xs[0])
    graphs, results = [], []
    for x in xs[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(gpu.moments(x))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(50):
        for result in results:
            result.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = gpu.moments(xs[2])
        torch.cuda.synchronize()
        for found, exact in zip((*results, eager), expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("shape", [(4, 8, 6, 6), (16, 64, 28, 28)], ids=str)
def test_a_kernel_waits_for_what_it_reads(shape: tuple[int, ...], captured: bool) -> None:
    """It may start before what writes its input ends: a copy, zeroing, a kernel, a stream."""
    inputs = [torch.randn(shape, device="cuda") * (k % 4 > 0) * 2**k for k in range(8)]
    side = torch.cuda.Stream()

    def moments() -> list[Tensor]:
        x = torch.empty(shape, device="cuda")
        results = []
        for turn, values in enumerate(inputs):
            if turn % 4 == 0:
                x.zero_()
            elif turn % 2:
                x.copy_(values)
            else:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    torch.mul(values, 1.0, out=x)
                torch.cuda.current_stream().wait_stream(side)
            results.append(gpu.moments(x))
            x.fill_(torch.nan)
        return results

    expected = []
    for values in inputs:
        torch.cuda.synchronize()
        expected.append(gpu.moments(values))
    results = moments()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            results = moments()
    for _ in range(20):
        if captured:
            graph.replay()
        else:
            results = moments()
        for mine, its in zip(results, expected, strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (16, 512, 7, 7), (4, 3, 200, 200)], ids=str)
def test_the_same_input_gives_the_same_bits(shape: tuple[int, ...], layout: str) -> None:
    x, grad = (laid_out(torch.randn(shape, device="cuda"), layout) for _ in range(2))
    packed = gpu.moments(x)
    stats = reference.statistics(packed, EPS, torch.float32)
    sums = gpu.normalize_backward_reduce(grad, x, stats)
    for _ in range(20):
        assert torch.equal(gpu.moments(x), packed)
        assert torch.equal(gpu.normalize_backward_reduce(grad, x, stats), sums)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
def test_no_less_accurate_than_aten(dtype: torch.dtype, layout: str, offset: float) -> None:
    """Errors against float64 are at most twice those of the kernels of ``nn.SyncBatchNorm``."""
    t = case((32, 24, 40, 40), layout, dtype, torch.device("cuda"), offset=offset)
    x, grad, totals, stats = t["x"], t["grad"], t["totals"], t["stats"]
    affine = (t["weight"], t["bias"])
    nothing = [None] * 4

    def results(kernels: Any) -> list[Tensor]:
        _, mean, var = reference.finalize(kernels.moments(x))
        y, _ = kernels.normalize(x, totals, *affine, EPS, *nothing)
        sums = kernels.normalize_backward_reduce(grad, x, stats)
        dx = kernels.normalize_backward(grad, x, stats, totals, affine[0], t["sums"])
        return [mean, var, y, sums, dx]

    values = x.double().movedim(1, 0).flatten(1)
    wide = [one.double() for one in (grad, x, stats)]
    exact = [
        values.mean(1),
        values.var(1, correction=0),
        reference.normalize(x.double(), totals, *affine, EPS, None, "identity", 0.0)[0],
        reference.normalize_backward_reduce(*wide),
        reference.normalize_backward(*wide, totals, affine[0].double(), t["sums"]),
    ]
    largest = x.abs().max().item()
    for mine, its, best in zip(results(gpu), results(aten), exact, strict=True):
        errors = [(one.double() - best).abs().max().item() for one in (mine, its)]
        # A unit in the last place of what is summed, where ATen happens to be exact.
        unit = torch.finfo(mine.dtype).eps if mine.dtype in FLOATS else 2**-24
        assert errors[0] <= 2 * errors[1] + unit * max(best.abs().max().item(), largest)


def test_unaligned_tensors_do_not_run_code_for_aligned_ones() -> None:
    memory = torch.randn(2 * 8 * 64 + 1, device="cuda")
    aligned = memory[:-1].view(2, 8, 64)
    unaligned = memory[1:].view(2, 8, 64)
    for x in (aligned, unaligned, aligned, unaligned):
        check_moments(gpu.moments(x), x)


def test_another_launch_is_not_compiled_again() -> None:
    x = torch.randn(3, 40, 11, device="cuda")
    gpu.moments(x)
    known = dict(launcher._COMPILED)
    gpu.moments(torch.randn_like(x))
    assert known == launcher._COMPILED


def test_known_code_gives_what_code_just_compiled_gives() -> None:
    x = torch.randn(5, 24, 9, device="cuda", dtype=torch.bfloat16)
    packed = gpu.moments(x)
    assert torch.equal(gpu.moments(x), packed)
    check_moments(packed, x)


def test_a_counter_on_the_cpu_counts() -> None:
    norms: list[Any] = [nn.BatchNorm1d(6).cuda() for _ in range(2)]
    bnrewrite.convert(norms[1], mode="local")
    x = torch.randn(7, 6, device="cuda")
    for norm in norms:
        norm.num_batches_tracked = torch.tensor(0)
        norm(x)
        assert norm.num_batches_tracked.item() == 1
    torch.testing.assert_close(norms[1].running_var, norms[0].running_var)


def test_a_parameter_on_the_cpu_is_named() -> None:
    norm = bnrewrite.convert(nn.BatchNorm1d(6), mode="local")
    with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=r"weight is on cpu.*cuda:0"):
        norm(torch.randn(7, 6, device="cuda"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_values(layout: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of the GPU's memory")
    x = torch.empty(2**16 + 8, 128, 16, 16, dtype=torch.bfloat16, device="cuda")
    if layout == "channels-last":
        x = x.to(memory_format=torch.channels_last)
    x.normal_()
    x[-1, -1] = 100.0
    packed = gpu.moments(x)
    y, _ = gpu.normalize(x, packed, None, None, EPS, *[None] * 4)
    last = x[:, -1].float()
    mean, var = last.mean(dtype=torch.float64), last.double().var(correction=0)
    torch.testing.assert_close(packed[128] / packed[0], mean, rtol=1e-4, atol=1e-6)
    expected = (last.double() - mean) / (var + EPS).sqrt()
    torch.testing.assert_close(y[:, -1].double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_trains_like_one_with_local_batch_norm(group: str, compiled: bool) -> None:
    """One rank's statistics are those of all: steps agree with torch's own BatchNorm."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)
    ).cuda()
    ours: Any = bnrewrite.convert(copy.deepcopy(plain))
    evaluated = torch.compile(ours, fullgraph=True) if compiled else ours
    x = torch.randn(8, 3, 20, 20, device="cuda")
    for _ in range(3):
        results = []
        for model, run in ((plain, plain), (ours, evaluated)):
            model.zero_grad()
            y = run(x)
            y.square().mean().backward()
            results.append([y, *[p.grad for p in model.parameters()], *model.buffers()])
        for mine, its in zip(*results, strict=True):
            # TF32 is off by default for convolutions' results of this size only up to their order.
            torch.testing.assert_close(mine, its, rtol=2e-3, atol=2e-3)
