"""Bad inputs: each is refused with a message that names the place and the way out."""

import concurrent.futures
import errno
import importlib.util
import logging
import os
import queue
import re
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F

import bnrewrite
from bnrewrite import ExportError, export_onnx
from bnrewrite.demo.network import DigitsNet
from bnrewrite.export.quiet import quiet_stderr
from tests.export_models import Block, random_image, randomize


class Pair(nn.Module):
    """Two inputs, of which the second is optional."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.bn(x) if y is None else self.bn(x) + y


class AlwaysTraining(nn.Module):
    """``F.batch_norm`` that would change its running statistics in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)


class Branches(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) if x.sum() > 0 else self.bn(-x)


class Scales(nn.Module):
    """Computes something else when it is exported, unless the width is 9."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) * (1.0 if torch.compiler.is_exporting() else x.shape[3] / 9)


class Strange(nn.Module):
    """Returns what its argument says."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.result = result

    def forward(self, x: Tensor) -> object:
        return (self.bn(x), self.result) if self.result is not None else None


def sequence(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def with_buffer(name: str, value: float) -> nn.Module:
    model = sequence(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model.get_buffer(f"1.{name}")[1] = value
    return model


def without_buffer(name: str) -> nn.Module:
    model = sequence(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    setattr(model[1], name, None)
    return model


X = random_image()
ONE_VALUE = torch.ones(1, 3, 1, 1)
NO_STATS = nn.BatchNorm2d(3, track_running_stats=False)

MODELS = {
    "not a module": (lambda: 3, X, TypeError, "Module, but it is int"),
    "exported program": (
        lambda: torch.export.export(Block().eval(), (X,)), X, TypeError, "ExportedProgram",
    ),
    "always training": (
        AlwaysTraining, X, ExportError, r"test_export_errors.py:\d+.*training=True and running",
    ),
    "data-dependent": (Branches, X, ExportError, "torch.export cannot trace.*control flow"),
    "meta": (lambda: Block().to("meta"), X, ExportError, "conv1.weight is on the meta device"),
    "lazy": (
        lambda: sequence(nn.LazyConv2d(3, 1), nn.BatchNorm2d(3)), X, ExportError,
        "0.weight is lazy",
    ),
    "bfloat16": (
        lambda: Block().bfloat16(), X.bfloat16(), ExportError, "conv1.weight is bfloat16.*22",
    ),
    "NaN mean": (
        lambda: with_buffer("running_mean", float("nan")), X, ExportError,
        "1.running_mean holds NaN",
    ),
    "infinite var": (
        lambda: with_buffer("running_var", float("inf")), X, ExportError,
        "1.running_var holds NaN or inf",
    ),
    "negative var": (
        lambda: with_buffer("running_var", -1.0), X, ExportError,
        "1.running_var holds negative variances.*-1",
    ),
    "no mean": (
        lambda: without_buffer("running_mean"), X, ExportError, "1 has no running_mean",
    ),
    "no var": (lambda: without_buffer("running_var"), X, ExportError, "1 has no running_var"),
    "no features": (
        lambda: sequence(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(0)), X, ExportError,
        "1 has num_features=0",
    ),
    "one value": (
        lambda: sequence(nn.Identity(), NO_STATS), ONE_VALUE, ExportError,
        "in 1: .*more than 1 value per channel when batch statistics are used",
    ),
    "strange output": (
        lambda: Strange(SimpleNamespace()), X, ExportError, "returns an object of type Simple",
    ),
    "no output": (lambda: Strange(None), X, ExportError, "returns no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_model_that_cannot_be_exported_is_refused(name, tmp_path):
    make, x, error, message = MODELS[name]
    with pytest.raises(error, match=message) as caught:
        export_onnx(make(), (x,), tmp_path / "m.onnx")
    assert len(str(caught.value).splitlines()[0]) > 40
    assert not list(tmp_path.iterdir())


def test_control_flow_that_depends_on_values_is_named_in_one_line(capfd):
    """torch.export prints the graphs of both ways of tracing on stderr before it raises."""
    with pytest.raises(ExportError) as caught:
        export_onnx(Branches(), (X,))
    line = Branches.forward.__code__.co_firstlineno + 1
    assert str(caught.value).startswith(f"{__file__}:{line}: torch.export cannot trace")
    assert capfd.readouterr() == ("", "")


def test_other_threads_go_on_printing_while_a_trace_is_quiet(capsys):
    with quiet_stderr() as kept:
        print("graph", file=sys.stderr)
        other = threading.Thread(target=print, args=("other",), kwargs={"file": sys.stderr})
        other.start()
        other.join()
    assert (kept.getvalue(), capsys.readouterr().err) == ("graph\n", "other\n")


def test_exports_of_two_threads_wait_for_each_other():
    """Also after one that failed, and where a forward exports another model."""
    before = sys.stderr, logging.getLogger("torch.onnx").level
    # Not a list, which would be put back with all that the model refers to.
    inner: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def export_inside(_module: nn.Module, _args: Any) -> None:
        if not torch.compiler.is_exporting():
            inner.put(export_onnx(Block(), (X,)))

    def work(_number: int) -> list[Any]:
        barrier.wait()
        with pytest.raises(ExportError, match="cannot trace"):
            export_onnx(Branches(), (X,))
        model = Block()
        model.register_forward_pre_hook(export_inside)
        return [export_onnx(model, (X,)), export_onnx(Block(), (X,))]

    barrier = threading.Barrier(2)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        reports = [one for found in threads.map(work, range(2)) for one in found]
    reports += [inner.get_nowait() for _ in range(2)]
    assert [one.num_batch_norm for one in reports] == [2] * 6
    assert (sys.stderr, logging.getLogger("torch.onnx").level) == before


ARGUMENTS = {
    "list": ([X], TypeError, "args must be a tensor or a tuple.*list"),
    "array": ((X.numpy(),), ExportError, r"args\[0\] is of type ndarray.*from_numpy"),
    "dict": (({"x": X},), ExportError, r"(?s)fails in eval mode.*image_x: .*named.*kwargs="),
    "list inside": (([X],), ExportError, r"fails in eval mode.*image_0: \(2, 3, 8, 9\) float32"),
    "array inside": (([X, X.numpy()],), ExportError, r"args\[0\]\[1\] is of type ndarray.*from_"),
    "object inside": (({"x": X, "y": X.size},), ExportError, r"args\[0\]\['y'\] is of type"),
    "integers": ((X.long(),), ExportError, r"fails in eval mode.*image: \(2, 3, 8, 9\) int64"),
    "meta": ((X.to("meta"),), ExportError, r"args\[0\] is a meta tensor"),
    "complex": ((X.to(torch.complex64),), ExportError, r"args\[0\] is torch.complex64"),
    "sparse": ((X.to_sparse(),), ExportError, r"args\[0\] is torch.sparse_coo"),
    "empty batch": ((X[:0],), ExportError, r"args\[0\] has no elements.*\(0, 3, 8, 9\)"),
    "empty space": ((X[:, :, :0],), ExportError, r"no elements.*\(2, 3, 0, 9\)"),
    "nothing": ((), ExportError, "do not fit forward|no example input"),
    "no tensor": ((3,), ExportError, "no example input"),
    "too many": ((X, X), ExportError, "do not fit forward"),
    "wrong shape": ((X[0, 0],), ExportError, "in conv1: RuntimeError"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_that_cannot_be_an_input_is_refused(name):
    args, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        export_onnx(Block(), args)


OPTIONS = {
    "opset too low": ({"opset_version": 14}, ExportError, "opset_version 14.*15 to 26"),
    "opset too high": ({"opset_version": 27}, ExportError, "opset_version 27.*15 to 26"),
    "opset zero": ({"opset_version": 0}, ExportError, "opset_version 0"),
    "opset negative": ({"opset_version": -1}, ExportError, "opset_version -1"),
    "opset bool": ({"opset_version": True}, TypeError, "opset_version.*True"),
    "opset float": ({"opset_version": 18.0}, TypeError, "opset_version.*18.0"),
    "input_names str": ({"input_names": "image"}, TypeError, "input_names.*str"),
    "too many input_names": ({"input_names": ["a", "b"]}, ExportError, "2 name.*has 1 input"),
    "too many output_names": ({"output_names": ["a", "b"]}, ExportError, "2 name.*has 1 output"),
    "no output_names": ({"output_names": []}, ExportError, "0 name.*has 1 output"),
    "name not str": ({"input_names": [1]}, TypeError, "input_names must hold strings"),
    "empty name": ({"input_names": [""]}, ExportError, "empty name"),
    "parameter's name": ({"input_names": ["fc.weight"]}, ExportError, "'fc.weight'.*parameter"),
    "input is output": (
        {"input_names": ["a"], "output_names": ["a"]}, ExportError, "'a'.*of an input",
    ),
    "kwargs no mapping": ({"kwargs": 3}, TypeError, "kwargs must map"),
    "unknown kwarg": ({"kwargs": {"z": X}}, ExportError, "do not fit forward"),
    "shapes no mapping": ({"dynamic_shapes": 3}, TypeError, "dynamic_shapes must map"),
    "shapes str": ({"dynamic_shapes": "batch"}, TypeError, "dynamic_shapes must map"),
    "wrong key": ({"dynamic_shapes": {"img": {0: "b"}}}, ExportError, "'img'.*are image"),
    "too many shapes": ({"dynamic_shapes": [{}, {}]}, ExportError, "2 entries.*1 inputs"),
    "axes no mapping": ({"dynamic_shapes": {"image": "b"}}, TypeError, "'image'.*str"),
    "axis out of range": (
        {"dynamic_shapes": {"image": {4: "b"}}}, ExportError, "axis 4 of 'image'.*4 axes",
    ),
    "axis negative": ({"dynamic_shapes": {"image": {-1: "b"}}}, ExportError, "axis -1 of 'image'"),
    "axis str": ({"dynamic_shapes": {"image": {"0": "b"}}}, TypeError, "axis of 'image'"),
    "axis value": ({"dynamic_shapes": {"image": {0: 1.5}}}, TypeError, "axis 0 of 'image'.*1.5"),
    "axis fixed": ({"dynamic_shapes": {"image": {0: 3}}}, ExportError, "fixes axis 0 .*to 3"),
    "wrong arity": ({"dynamic_shapes": {"image": ["b"]}}, ExportError, "1 axes for 'image'"),
    "dynamic channel": (
        {"dynamic_shapes": {"image": {0: "b", 1: "c"}}}, ExportError, "^axis 1 of 'image' cannot",
    ),
    "dynamic channel Dim": (
        {"dynamic_shapes": {"image": {1: torch.export.Dim("c")}}}, ExportError, "^axis 1 of 'ima",
    ),
    "fold": ({"fold": 1}, TypeError, "fold must be True or False"),
    "verify": ({"verify": "yes"}, TypeError, "verify must be True or False"),
    "external_data": ({"external_data": "m"}, TypeError, "external_data must be"),
    "rtol type": ({"rtol": "1"}, TypeError, "rtol must be a number"),
    "rtol negative": ({"rtol": -1.0}, ExportError, "rtol must not be negative"),
    "atol NaN": ({"atol": float("nan")}, ExportError, "atol must not be negative"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_cannot_be_met_is_refused(name):
    options, error, message = OPTIONS[name]
    with pytest.raises(error, match=message):
        export_onnx(Block(), (X,), **options)


@pytest.mark.parametrize("axis", ["c", torch.export.Dim("c")], ids=["name", "Dim"])
def test_an_axis_of_one_that_the_code_fixes_is_refused(axis):
    """torch.export says c from 1 to 2, because an axis of one is no constant to it."""
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(
        ExportError, match=r"^axis 1 of 'x' cannot be dynamic: .*fixes it.*Leave it"
    ):
        export_onnx(DigitsNet(), (x,), dynamic_shapes=[{1: axis}])


def test_each_dynamic_axis_is_compared_on_a_second_size():
    shapes = [{0: "n", 2: "height", 3: "width"}]
    with pytest.raises(ExportError, match=r"^axis 3 of 'x' of size 10: output 0 .output. differs"):
        export_onnx(Scales(), (X,), dynamic_shapes=shapes)


def test_an_example_that_a_derived_axis_cannot_have_is_refused():
    shapes = [{3: 4 * torch.export.Dim("w")}]
    with pytest.raises(ExportError, match=r"axis 3 of 'image' is 4\*w .* is 9, which no w"):
        export_onnx(Block(), (X,), dynamic_shapes=shapes)


def test_a_name_given_twice_is_refused():
    x = torch.randn(3, 4)
    with pytest.raises(ExportError, match="'a' more than once"):
        export_onnx(Pair(), (x, x), input_names=["a", "a"])


def test_one_name_for_axes_of_two_sizes_is_refused():
    x = torch.randn(3, 4)
    shapes = {"x": {0: "n"}, "y": {0: torch.export.Dim("n")}}
    with pytest.raises(ExportError, match=r"axis 0 of 'y' and axis 0 of 'x' are both called 'n'"):
        export_onnx(Pair(), (x, x[:1]), dynamic_shapes=shapes)


def test_two_names_for_one_axis_are_refused():
    x = torch.randn(3, 4)
    with pytest.raises(ExportError, match=r"axis 0 of 'y' is called 'b'.*called 'a'"):
        export_onnx(Pair(), (x, x), dynamic_shapes={"x": {0: "a"}, "y": {0: "b"}})


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("missing/m.onnx", ExportError, "directory of path does not exist"),
        ("", ExportError, "path is empty"),
        (".", ExportError, "path is a directory"),
        ("m/", ExportError, "path is a directory"),
        ("pipe", ExportError, "path is not a regular file.*'pipe'"),
        ("long" * 80, ExportError, "nothing can be written beside path.*too long"),
        (3, TypeError, "path must be a path or None"),
        (b"m.onnx", TypeError, "path must be"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_the_model_runs(
    path, error, message, tmp_path, monkeypatch
):
    class Untouchable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model ran")

    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(error, match=message):
        export_onnx(Untouchable(), (X,), path)
    assert os.listdir() == ["pipe"]


def test_a_folder_that_cannot_be_written_is_refused_whatever_its_permissions_say(monkeypatch):
    """Permissions say nothing of a read-only file system, or of root's own rights."""

    def fail(*args: object, **kwargs: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(ExportError, match=r"nothing can be written beside path 'm\.onnx'.*Read-on"):
        export_onnx(Block(), (X,), "m.onnx")


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    import onnx_ir as ir

    def fail(model: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ir, "save", fail)
    message = f"cannot be written to {re.escape(str(tmp_path))}: No space left"
    with pytest.raises(ExportError, match=message):
        export_onnx(Block(), (X,), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_before_the_model_runs(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda one, *rest: None if one == name else find(one, *rest)
    )
    with pytest.raises(ImportError, match=f"the package {name}, which is not.*pip install {name}"):
        export_onnx(Branches(), (X,))


def shard(model: nn.Module) -> Any:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def shard_flat(model: nn.Module) -> nn.Module:
    return nn.Sequential(FullyShardedDataParallel(model, device_id=torch.device("cpu")))


@pytest.mark.parametrize(
    ("wrap", "name"),
    [(shard, "conv1.weight"), (shard_flat, r"0 \(FullyShardedDataParallel\)")],
    ids=["fully_shard", "FullyShardedDataParallel"],
)
@pytest.mark.filterwarnings("ignore:FullyShardedDataParallel is deprecated")
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_a_sharded_model_is_refused(wrap, name):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = wrap(bnrewrite.convert(Block()))
        with pytest.raises(ExportError, match=f"^{name} is sharded.*get_model_state_dict"):
            export_onnx(model, (X,))
    finally:
        dist.destroy_process_group()


def test_a_scripted_model_is_refused():
    with pytest.warns((DeprecationWarning, FutureWarning), match=r"torch\.jit"):
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(ExportError, match=r"is a TorchScript module.*made from"):
        export_onnx(scripted, (X,))


def test_a_missing_kernel_is_named():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).double()
    with pytest.raises(ExportError, match=r"cannot load(.|\n)*Conv(.|\n)*verify=False"):
        export_onnx(model, (X.double(),))
    report = export_onnx(model, (X.double(),), verify=False)
    assert (report.verified, report.unverified) == ((), "verify=False")


def test_without_onnxruntime_the_report_says_that_nothing_was_compared(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = export_onnx(Block(), (X,))
    assert report.max_abs is None
    assert re.search("not verified +onnxruntime is not installed", str(report))


def test_random_outputs_fail_the_comparison():
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    with pytest.raises(ExportError, match=r"output 0 \(output\) differs from the model by"):
        export_onnx(Noise(), (X,))


def test_a_wrong_graph_fails_the_comparison(tmp_path, monkeypatch):
    from bnrewrite.export import pipeline

    def damage(model):
        weight = model.graph.initializers["bn1.weight"]
        weight.const_value = type(weight.const_value)(torch.full((7,), 1.01), name="bn1.weight")
        return 0

    monkeypatch.setattr(pipeline, "fold_batch_norms", damage)
    with pytest.raises(ExportError, match="differs from the model"):
        export_onnx(randomize(Block()), (X,), tmp_path / "m.onnx", fold=True)
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_must_agree():
    from bnrewrite.export.verify import Tolerance, compare

    nan = torch.tensor([1.0, float("nan"), float("inf")])
    tolerance = Tolerance(None, None)
    assert compare([nan], [nan.numpy()], ["y"], tolerance).max_abs == 0
    for wrong in ([1.0, 2.0, np.inf], [np.nan, 1.0, np.inf], [1.0, np.nan, -np.inf]):
        with pytest.raises(ExportError, match=r"output 0 \(y\) has"):
            compare([nan], [np.array(wrong, np.float32)], ["y"], tolerance)


def test_outputs_of_another_number_shape_or_dtype_fail_the_comparison():
    from bnrewrite.export.verify import Tolerance, compare

    wanted, tolerance = torch.ones(2, 3), Tolerance(None, None)
    with pytest.raises(ExportError, match="1 outputs, but the ONNX model has 2"):
        compare([wanted], [wanted.numpy()] * 2, ["y"], tolerance)
    for wrong in (np.ones((3, 2), np.float32), np.ones((2, 3), np.float64)):
        with pytest.raises(ExportError, match=r"output 0 \(y\) is .* in onnxruntime, but \(2, 3\)"):
            compare([wanted], [wrong], ["y"], tolerance)
    with pytest.raises(ExportError, match=r"differs in 1 of 2 torch\.int64"):
        compare([torch.tensor([1, 2])], [np.array([1, 3])], ["y"], tolerance)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.float64, 1e-9)]
)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_default_tolerance_is_relative_to_the_scale_of_the_output(dtype, rtol, scale):
    from bnrewrite.export.verify import Tolerance, compare

    wanted = torch.tensor([scale, scale / 100], dtype=dtype)
    for factor, passes in ((0.7, True), (1.5, False)):
        # The small value moves, by a part of what the large one would be allowed.
        got = wanted + torch.tensor([0.0, factor * rtol * scale], dtype=dtype)
        if passes:
            assert compare([wanted], [got.numpy()], ["y"], Tolerance(None, None)).max_rel > 0
        else:
            with pytest.raises(ExportError, match="differs from the model by"):
                compare([wanted], [got.numpy()], ["y"], Tolerance(None, None))


def test_a_failure_of_the_optimizer_is_an_error_of_the_export(monkeypatch):
    import onnxscript.optimizer

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Error during constant folding for node 'n' (::Op)")

    monkeypatch.setattr(onnxscript.optimizer, "fold_constants", fail)
    with pytest.raises(ExportError, match=r"onnxscript .* cannot simplify.*node 'n' \(::Op\)"):
        export_onnx(Block(), (X,))


def test_an_invalid_model_never_becomes_a_file(tmp_path, monkeypatch):
    from bnrewrite.export import pipeline

    def damage(model):
        # A type that full shape inference contradicts; a check of the nodes alone misses it.
        model.graph.outputs[0].shape = type(model.graph.outputs[0].shape)([2, 6])
        return 0

    monkeypatch.setattr(pipeline, "fold_batch_norms", damage)
    with pytest.raises(ExportError, match=r"onnx\.checker rejects"):
        export_onnx(randomize(Block()), (X,), tmp_path / "m.onnx", fold=True, verify=False)
    assert not list(tmp_path.iterdir())


def test_another_opset_or_a_foreign_operator_is_refused():
    import onnx_ir as ir

    from bnrewrite.export.translate import finish

    def model(domain: str) -> ir.Model:
        x = ir.Value(name="x")
        node = ir.Node(domain, "Relu", [x])
        graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18})
        return ir.Model(graph, ir_version=8)

    finish(model(""), 18)
    with pytest.raises(
        ExportError, match="opset_version 17 was requested, but the exporter produced opset 18"
    ):
        finish(model(""), 17)
    with pytest.raises(ExportError, match=r"com\.example::Relu is not a standard ONNX operator"):
        finish(model("com.example"), 18)


def test_an_operation_that_an_older_opset_lacks_is_named():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            one, other = torch.split(self.bn(x), [1, 2], 1)
            return one * other

    with pytest.raises(ExportError, match=r"to opset 17: No Adapter .*Split\. Pass .*=18 or"):
        export_onnx(Halves(), (X,), opset_version=17)


def test_an_operation_without_an_onnx_form_is_named():
    class Unsupported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.bn(x))

    with pytest.raises(ExportError, match=r"torch\.onnx cannot convert.*bessel_j0") as caught:
        export_onnx(Unsupported(), (X,))
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("args", "axes", "message"),
    [
        ((torch.ones(1, 4), torch.ones(3, 4)), [{0: "n"}, {0: "m"}], "The size of tensor a"),
        ((torch.ones(1, 4),), [{0: torch.export.Dim("n", max=1)}], "Invalid ranges"),
    ],
    ids=["sizes", "range"],
)
def test_torch_logs_nothing_of_a_failure_that_is_reported(args, axes, message, caplog):
    with pytest.raises(ExportError, match=message):
        export_onnx(Pair(), args, dynamic_shapes=axes)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_a_failing_op_keeps_torch_s_text_as_the_cause():
    with pytest.raises(ExportError) as caught:
        export_onnx(Branches(), (X,))
    assert caught.value.__cause__ is not None


def test_errors_are_those_of_the_package():
    assert issubclass(ExportError, bnrewrite.BnRewriteError)
    assert issubclass(ExportError, ValueError)
