"""The contract of ``convert``, ``revert``, ``report`` and ``graphs`` in one process."""

import copy
import gc
import io
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import bnrewrite
from bnrewrite import Local, Sync
from bnrewrite.demo.network import DigitsNet
from tests.cases import RegisteredTwice
from tests.models import ActivatedNorm, Block, Functional, FunctionalNorm, ResidualNet, perturb
from tests.parity import assert_same_training

MODES: dict[str, Any] = {
    "sync": "sync",
    "local": Local(),
    "frozen": "frozen",
    "mapping": {"layer1.*": "frozen", "layer2.bn?": Sync(), "*": "local"},
}


class Zoo(nn.Module):
    """Every kind of site in one model: plain, subclass, shared, aliased, functional, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.activated = ActivatedNorm(3)
        self.functional_norm = FunctionalNorm(3)
        self.alias = self.first
        self.block = Block(3, 3, 1)
        self.again = self.block
        self.sync = nn.SyncBatchNorm(3)
        self.listed = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None)])
        self.functional = Functional(3)
        self.plain = 7

    def forward(self, x: Tensor) -> Tensor:
        x = self.functional_norm(self.activated(self.first(x)))
        x = self.again(self.block(self.alias(x)))
        x = x.flatten(2)
        for norm in self.listed:
            x = norm(x)
        return self.functional(x)


def _zoo() -> Zoo:
    torch.manual_seed(2)
    model = perturb(Zoo().double())
    assert isinstance(model, Zoo)
    return model


def _x(shape: tuple[int, ...] = (4, 3, 5, 6)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def _snapshot(model: nn.Module) -> list[Any]:
    """Classes and the identity of everything that modules hold, in order."""

    def identity(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, id(item)) for key, item in value.items()]
        return id(value) if isinstance(value, (Tensor, nn.Module)) else repr(value)

    return [
        (name, type(module), id(module), [(k, identity(v)) for k, v in vars(module).items()])
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def _step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of one training step."""
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    y.square().sum().backward()
    grads = [p.grad for p in (x, *model.parameters()) if p.grad is not None]
    return [y.detach(), *(grad.clone() for grad in grads), *(b.clone() for b in model.buffers())]


def _assert_equal(results: list[Tensor], expected: list[Tensor]) -> None:
    assert len(results) == len(expected)
    for a, b in zip(results, expected, strict=True):
        # Sums of float64 in another order, through a dozen layers; zero gradients are rounding.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class TestTheObjectStays:
    """Conversion changes what forward does and nothing else."""

    @pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
    def test_identity_names_and_isinstance(self, mode: Any) -> None:
        model = ResidualNet()
        names = [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]
        classes = [type(m) for m in model.modules()]
        tensors = [(n, id(t)) for n, t in (*model.named_parameters(), *model.named_buffers())]
        keys, text = list(model.state_dict()), repr(model)
        assert bnrewrite.convert(model, mode) is model
        assert [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)] == names
        assert [
            (n, id(t)) for n, t in (*model.named_parameters(), *model.named_buffers())
        ] == tensors
        assert list(model.state_dict()) == keys
        assert repr(model) == text
        for module, cls in zip(model.modules(), classes, strict=True):
            assert isinstance(module, cls)
            assert type(module).__name__ == cls.__name__
            assert type(module).__module__ == cls.__module__
        assert model.NUM_SITES == 7

    def test_attributes_methods_and_indexing_stay(self) -> None:
        model = bnrewrite.convert(_zoo())
        assert model.plain == 7
        assert model.alias is model.first
        assert model.again is model.block
        assert isinstance(model.listed[1], nn.BatchNorm1d)
        assert model.first.extra_repr().startswith("3, eps=")
        model.first.reset_running_stats()
        assert model.first.num_batches_tracked == 0
        assert next(model.first.parameters()) is model.first.weight

    def test_hooks_of_modules_and_parameters_run(self) -> None:
        model = bnrewrite.convert(_zoo())
        called: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, a, n=name: called.append(f"before {n}"))
            module.register_forward_hook(lambda m, a, o, n=name: called.append(f"after {n}"))
        plain = _zoo()
        expected: list[str] = []
        for name, module in plain.named_modules():
            module.register_forward_pre_hook(lambda m, a, n=name: expected.append(f"before {n}"))
            module.register_forward_hook(lambda m, a, o, n=name: expected.append(f"after {n}"))
        _assert_equal(_step(model, _x()), _step(plain, _x()))
        assert called == expected

    def test_a_hook_before_conversion_and_its_removal(self) -> None:
        model: Any = ResidualNet().double()
        plain: Any = ResidualNet().double()
        plain.load_state_dict(model.state_dict())
        called = []
        handle = model.bn.register_forward_hook(lambda m, a, out: called.append(1) or out + 1)
        same = plain.bn.register_forward_hook(lambda m, a, out: out + 1)
        bnrewrite.convert(model)
        _assert_equal(_step(model, _x()), _step(plain, _x()))
        assert called == [1]
        handle.remove()
        same.remove()
        _assert_equal(_step(model, _x()), _step(plain, _x()))

    def test_global_hooks_run(self) -> None:
        model = bnrewrite.convert(ResidualNet())
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(m))
        try:
            model(torch.randn(2, 3, 8, 8))
        finally:
            handle.remove()
        assert sum(isinstance(m, _BatchNorm) for m in seen) == ResidualNet.NUM_SITES

    def test_a_forward_that_is_replaced_later_is_called(self) -> None:
        model = bnrewrite.convert(ResidualNet().double())
        expected = _step(copy.deepcopy(model), _x())
        seen = []
        original = model.bn.forward

        def forward(input: Tensor) -> Tensor:
            seen.append(input.shape)
            return original(input)

        model.bn.forward = forward
        _assert_equal(_step(model, _x()), expected)
        assert seen == [(4, 8, 5, 6)]

    def test_a_layer_that_is_replaced_later_is_called(self) -> None:
        model = bnrewrite.convert(ResidualNet().double())
        model.bn = nn.Identity()
        model.layer1.bn1 = nn.GroupNorm(2, 8).double()
        plain = ResidualNet().double()
        plain.bn = nn.Identity()
        plain.layer1.bn1 = nn.GroupNorm(2, 8).double()
        plain.load_state_dict(model.state_dict())
        _assert_equal(_step(model, _x()), _step(plain, _x()))


class TestResults:
    """One rank and no process group: what the unconverted model computes."""

    @pytest.mark.parametrize("mode", ["sync", "local"])
    @pytest.mark.parametrize("make", [_zoo, lambda: perturb(ResidualNet().double())])
    def test_training_equals_the_plain_model(
        self, mode: str, make: Callable[[], nn.Module]
    ) -> None:
        torch.manual_seed(0)
        plain = make()
        model = bnrewrite.convert(copy.deepcopy(plain), mode)
        for _ in range(2):
            if any(isinstance(m, nn.SyncBatchNorm) for m in plain.modules()):
                assert isinstance(plain, Zoo)
            _assert_equal(_step(model, _x()), _step(plain, _x()))

    @pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_evaluation_is_bit_equal(self, mode: Any, dtype: torch.dtype, layout: Any) -> None:
        plain = perturb(ResidualNet()).eval().to(dtype)
        model = bnrewrite.convert(copy.deepcopy(plain), mode)
        x = _x().to(dtype).contiguous(memory_format=layout)
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x), plain(x))

    def test_evaluation_of_every_kind_of_site_is_bit_equal(self) -> None:
        plain = _zoo().eval()
        assert torch.equal(bnrewrite.convert(_zoo()).eval()(_x()), plain(_x()))

    @pytest.mark.parametrize("kind", ["alone", "plain", "subclass", "functional subclass", "owner"])
    def test_frozen_uses_and_keeps_the_running_statistics(self, kind: str) -> None:
        make: dict[str, Callable[[], nn.Module]] = {
            "alone": lambda: nn.BatchNorm2d(3),
            "plain": lambda: nn.BatchNorm2d(3),
            "subclass": lambda: ActivatedNorm(3),
            "functional subclass": lambda: FunctionalNorm(3),
            "owner": lambda: nn.Sequential(nn.Flatten(2), Functional(3)),
        }
        plain = perturb(nn.Sequential(make[kind]())).double()
        if kind == "alone":
            # Without an owner the layer evaluates itself.
            plain = plain.get_submodule("0")
        model = bnrewrite.convert(copy.deepcopy(plain), "frozen").train()
        before = copy.deepcopy(list(model.buffers()))
        results = _step(model, _x())
        expected = _step(plain.eval(), _x())
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(model.buffers(), before, strict=True):
            assert torch.equal(a, b)
        assert model.training

    def test_a_mapping_gives_each_site_the_mode_of_its_first_pattern(self) -> None:
        model = bnrewrite.convert(ResidualNet(), MODES["mapping"])
        model(torch.randn(4, 3, 8, 8))
        counts = {n: int(b) for n, b in model.named_buffers() if "num_batches" in n}
        for name, count in counts.items():
            assert count == (0 if name.startswith("layer1.") else 1), name
        modes = {site.name: site.mode for site in bnrewrite.report(model).sites}
        assert modes["layer1.bn2"] == "frozen"
        assert modes["layer2.bn1"] == "sync"
        assert modes["layer2.downsample.1"] == "local"

    def test_sites_without_a_pattern_are_left_alone(self) -> None:
        model = bnrewrite.convert(ResidualNet(), {"layer1.*": "frozen"}, strict=True)
        assert type(model.bn) is nn.BatchNorm2d
        assert {site.name for site in bnrewrite.report(model).sites} == {"layer1.bn1", "layer1.bn2"}
        left = {skip.name for skip in bnrewrite.report(model).skipped}
        assert "bn" in left

    @pytest.mark.parametrize("mode", ["sync", "local"])
    def test_flags_and_numbers_are_read_at_every_call(self, mode: str) -> None:
        plain = perturb(ResidualNet().double())
        model = bnrewrite.convert(copy.deepcopy(plain), mode)
        for change in (
            lambda m: m.layer1.bn1.eval(),
            lambda m: setattr(m.bn, "momentum", 0.7),
            lambda m: setattr(m.bn, "momentum", None),
            lambda m: setattr(m.layer2.bn1, "eps", 0.5),
            lambda m: setattr(m.layer2.bn1, "track_running_stats", False),
            lambda m: m.eval(),
            lambda m: m.layer1.train(),
            lambda m: m.train(),
            lambda m: m.bn.weight.requires_grad_(False),
            lambda m: setattr(m.bn, "weight", None),
        ):
            change(model)
            change(plain)
            _assert_equal(_step(model, _x()), _step(plain, _x()))

    def test_update_bn_works(self) -> None:
        plain = perturb(ResidualNet().double())
        model = bnrewrite.convert(copy.deepcopy(plain))
        for one in (model, plain):
            torch.optim.swa_utils.update_bn([_x(), _x() * 2 + 1, _x() - 1], one)
        _assert_equal(list(model.buffers()), list(plain.buffers()))

    def test_a_layer_whose_statistics_were_taken_away(self) -> None:
        """As test-time adaptation does it."""
        plain = perturb(ResidualNet().double())
        model = bnrewrite.convert(copy.deepcopy(plain))
        for one in (model, plain):
            for module in one.modules():
                if isinstance(module, _BatchNorm):
                    module.track_running_stats = False
                    module.running_mean = module.running_var = None
            one.eval()
        _assert_equal(_step(model, _x()), _step(plain, _x()))

    def test_activation_checkpointing(self) -> None:
        plain = perturb(Block(3, 3, 1).double())
        model = bnrewrite.convert(copy.deepcopy(plain))
        results = []
        for one in (model, plain):
            x = _x().requires_grad_()
            # The recomputation of torch's own layers would move their statistics once more.
            y: Any = one(x) if one is plain else checkpoint(one, x, use_reentrant=False)
            y.square().sum().backward()
            results.append([x.grad, *(p.grad for p in one.parameters()), *one.buffers()])
        _assert_equal(*results)

    def test_functional_call_and_a_second_order_gradient(self) -> None:
        plain = perturb(Block(3, 3, 1).double())
        model = bnrewrite.convert(copy.deepcopy(plain))
        parameters = {n: p.detach() * 1.5 for n, p in model.named_parameters()}
        y = torch.func.functional_call(model, parameters, _x())
        expected = torch.func.functional_call(plain, parameters, _x())
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_torch_export(self, training: bool) -> None:
        model = bnrewrite.convert(Block(3, 3, 1).double()).train(training)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(copy.deepcopy(model), (_x(),))
            y = program.module()(_x())
        torch.testing.assert_close(y, model(_x()), rtol=1e-12, atol=1e-12)

    def test_wrong_dimensions_raise_as_in_torch(self) -> None:
        x = torch.randn(3, 3, 3)
        for model in (nn.BatchNorm2d(3), bnrewrite.convert(nn.BatchNorm2d(3))):
            with pytest.raises(ValueError, match="expected 4D input"):
                model(x)


class TestCopies:
    """deepcopy, pickle, torch.save and state dicts."""

    @pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies_are_converted_and_independent(self, how: str, mode: Any) -> None:
        mode = mode if isinstance(mode, (str, Local)) else {"block.*": "frozen", "*": "sync"}
        model = bnrewrite.convert(_zoo(), mode)
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        before = copy.deepcopy(model.state_dict())
        results = _step(other, _x())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        _assert_equal(results, _step(model, _x()))
        assert str(bnrewrite.report(other)) == str(bnrewrite.report(model))
        assert list(bnrewrite.graphs(other)) == list(bnrewrite.graphs(model))
        assert other.alias is other.first
        bnrewrite.revert(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in _zoo().modules()]
        assert bnrewrite.report(model).sites

    def test_state_dicts_go_both_ways(self) -> None:
        plain = _zoo()
        model = bnrewrite.convert(Zoo().double())
        assert model.load_state_dict(plain.state_dict()) == ([], [])
        _assert_equal(_step(model, _x()), _step(plain, _x()))
        another = Zoo().double()
        assert another.load_state_dict(model.state_dict()) == ([], [])
        _assert_equal(_step(another, _x()), _step(model, _x()))

    def test_conversion_to_another_dtype_and_device_works_afterwards(self) -> None:
        model = bnrewrite.convert(ResidualNet()).double()
        assert model(_x()).dtype == torch.float64
        model.to("meta")
        assert model(_x().to("meta")).shape == (4, 3)

    def test_models_on_the_meta_device_convert(self) -> None:
        with torch.device("meta"):
            model = bnrewrite.convert(ResidualNet())
        model.to_empty(device="cpu")
        model.load_state_dict(ResidualNet().state_dict())
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 3)


class TestRevert:
    """The exact inverse."""

    @pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
    def test_classes_and_dictionaries_are_back(self, mode: Any) -> None:
        model = ResidualNet()
        before = _snapshot(model)
        bnrewrite.convert(model, mode)
        assert _snapshot(model) != before
        assert bnrewrite.revert(model) is model
        assert _snapshot(model) == before

    def test_every_kind_of_site_is_back(self) -> None:
        model = _zoo()
        before = _snapshot(model)
        bnrewrite.revert(bnrewrite.convert(model))
        assert _snapshot(model) == before
        bnrewrite.revert(model)
        assert _snapshot(model) == before

    def test_parts_that_were_converted_alone_are_back(self) -> None:
        model = ResidualNet()
        before = _snapshot(model)
        bnrewrite.convert(model.layer1, "frozen")
        bnrewrite.convert(model.layer2.bn1, "local")
        bnrewrite.convert(model)
        assert {site.mode for site in bnrewrite.report(model).sites} == {"sync"}
        bnrewrite.revert(model)
        assert _snapshot(model) == before
        bnrewrite.convert(model.layer1, "frozen")
        assert len(bnrewrite.report(model.layer1).sites) == 2
        assert is_converted(model.layer1.bn1)

    def test_only_modules_are_reverted(self) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but it is str"):
            bnrewrite.revert("model")  # pyright: ignore


def is_converted(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("bnrewrite") for cls in type(module).__mro__)


class TestConvertingAgain:
    """Twice is once; another mode replaces."""

    def test_twice_changes_nothing_more(self) -> None:
        model = bnrewrite.convert(_zoo())
        before = _snapshot(model)
        codes = {n: g.code for n, g in bnrewrite.graphs(model).items()}
        bnrewrite.convert(model)
        assert [row[:3] for row in _snapshot(model)] == [row[:3] for row in before]
        assert {n: g.code for n, g in bnrewrite.graphs(model).items()} == codes
        _assert_equal(_step(model, _x()), _step(_zoo(), _x()))

    def test_another_mode_replaces_the_first(self) -> None:
        model = _zoo()
        before = _snapshot(model)
        for mode in ("sync", {"listed.*": "frozen", "*": "sync"}, "local", "frozen", "sync"):
            bnrewrite.convert(model, mode)
            fresh = bnrewrite.convert(_zoo(), mode)
            assert bnrewrite.report(model).to_dict() == bnrewrite.report(fresh).to_dict()
        bnrewrite.revert(model)
        assert _snapshot(model) == before

    def test_layers_that_were_added_are_converted_too(self) -> None:
        model = bnrewrite.convert(ResidualNet())
        model.neck = nn.BatchNorm1d(8)
        bnrewrite.convert(model)
        assert is_converted(model.neck)
        assert len(bnrewrite.report(model).sites) == ResidualNet.NUM_SITES
        model.neck = nn.Sequential(Functional(8))
        bnrewrite.convert(model)
        assert "neck.0.batch_norm" in {site.name for site in bnrewrite.report(model).sites}

    def test_a_part_with_another_mode_is_converted_back(self) -> None:
        model = bnrewrite.convert(ResidualNet())
        bnrewrite.convert(model.layer1, "frozen")
        bnrewrite.convert(model)
        assert {site.mode for site in bnrewrite.report(model).sites} == {"sync"}
        model(torch.randn(4, 3, 8, 8))
        assert model.layer1.bn1.num_batches_tracked == 1


class TestSyncBatchNorm:
    """``torch.nn.SyncBatchNorm`` as input."""

    def test_it_trains_on_the_cpu_and_comes_back(self) -> None:
        torch.manual_seed(0)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(ResidualNet().double())
        before = _snapshot(model)
        plain = ResidualNet().double()
        plain.load_state_dict(model.state_dict())
        bnrewrite.convert(model)
        _assert_equal(_step(model, _x()), _step(plain, _x()))
        assert all(site.mode == "sync" for site in bnrewrite.report(model).sites)
        model.zero_grad()
        bnrewrite.revert(model)
        assert [row[:3] for row in _snapshot(model)] == [row[:3] for row in before]


class TestErrors:
    """Each names what was wrong, the value and the way out, and changes nothing."""

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"mode": "synk"}, ValueError, r"unknown mode 'synk'.*'sync', 'shuffle', 'local',"),
            ({"mode": 3}, TypeError, r"mode must be .* int \(3\)"),
            ({"mode": Sync}, TypeError, r"mode must be .*type"),
            ({"mode": {}}, ValueError, r"empty mapping.*\{'\*': 'sync'\}"),
            ({"mode": {3: "sync"}}, TypeError, r"patterns.*strings.*int \(3\)"),
            ({"mode": {"*": "synk"}}, ValueError, r"unknown mode 'synk'"),
            (
                {"mode": {"layer9.*": "sync", "*": "local"}},
                ValueError,
                r"'layer9\.\*' in mode matches none of the 7 .*bn, layer1\.bn1.*Correct",
            ),
            (
                {"mode": {"*": "sync", "layer1.*": "local"}},
                ValueError,
                r"'layer1\.\*' in mode has no effect.*'\*' matches layer1\.bn1 before.*front",
            ),
            ({"process_group": "0"}, TypeError, r"process_group must be .*str \('0'\)"),
            ({"keep": "layer1"}, TypeError, r"keep must be a sequence.*str \('layer1'\)"),
            ({"keep": [3]}, TypeError, r"keep must hold strings.*int"),
            ({"keep": ["layer9"]}, ValueError, r"'layer9' in keep matches no module"),
            ({"passes": ["fuze"]}, ValueError, r"unknown optimizing pass 'fuze'.*passes"),
            ({"passes": "fuze"}, TypeError, r"passes must be a sequence.*str \('fuze'\)"),
        ],
    )
    @pytest.mark.parametrize("state", ["plain", "converted", "part converted"])
    def test_wrong_arguments(
        self, arguments: dict[str, Any], error: type, message: str, state: str
    ) -> None:
        model = ResidualNet()
        if state == "converted":
            bnrewrite.convert(model, {"layer1.*": "frozen", "*": "sync"})
        elif state == "part converted":
            bnrewrite.convert(model.layer1, "local")
        before = _snapshot(model)
        with pytest.raises(error, match=message):
            bnrewrite.convert(model, **arguments)
        assert _snapshot(model) == before

    @pytest.mark.parametrize("wrong", [None, "model", nn.BatchNorm2d, 3])
    def test_not_a_module(self, wrong: Any) -> None:
        for function in (bnrewrite.convert, bnrewrite.revert, bnrewrite.report, bnrewrite.graphs):
            with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but it is"):
                function(wrong)

    def test_not_converted(self) -> None:
        with pytest.raises(ValueError, match=r"ResidualNet is not converted.*convert\(model\)"):
            bnrewrite.report(ResidualNet())

    def test_frozen_needs_running_statistics(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
        before = _snapshot(model)
        with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=r"1: mode 'frozen'.*mode"):
            bnrewrite.convert(model, "frozen")
        assert _snapshot(model) == before
        bnrewrite.convert(model, {"0": "frozen", "*": "local"})

    @pytest.mark.parametrize("affine", [True, False])
    def test_wrong_number_of_channels_names_the_site(self, affine: bool) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([nn.BatchNorm1d(3, affine=affine) for _ in range(3)])

            def forward(self, x: Tensor) -> Tensor:
                return self.layers[2](x)

        model = bnrewrite.convert(Net())
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=r"^layers\.2: .*3.*5"):
            model(torch.randn(4, 5))
        with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=r"^layers\.2: .*1 value"):
            model(torch.randn(1, 3))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def test_sites_without_tensors_and_functional_ones_are_named(self) -> None:
        class Block(nn.Module):
            mean: Tensor
            var: Tensor

            def __init__(self, functional: bool) -> None:
                super().__init__()
                self.bn = None if functional else nn.BatchNorm1d(3)
                self.bare = nn.BatchNorm1d(3, affine=False, track_running_stats=False)
                self.register_buffer("mean", torch.zeros(3))
                self.register_buffer("var", torch.ones(3))

            def forward(self, x: Tensor) -> Tensor:
                if self.bn is not None:
                    return self.bare(self.bn(x))
                x = F.batch_norm(x, self.mean, self.var, training=self.training)
                return self.bare(x)

        # The second block runs the graph of the first.
        model: Any = bnrewrite.convert(nn.ModuleList(Block(i > 1) for i in range(4)))
        assert bnrewrite.report(model).num_owners == 4
        x = torch.randn(4, 3)
        place = r"batch_norm \(.*test_convert\.py:\d+\)"
        for block, name in ((1, "1.bare"), (3, f"one of 3.bare, 3.{place}")):
            with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=f"^{name}: .*1 value"):
                model[block].eval()(x[:1])
        model[3].mean = torch.zeros(5)
        with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=f"{place}: running_mean.*5"):
            model[3](x)
        with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=rf"^3\.{place}: torch\.fx would"):
            torch.fx.symbolic_trace(model[3])

    def test_a_lone_layer_names_itself(self) -> None:
        with pytest.raises(bnrewrite.UnsupportedBatchNorm, match=r"^the model itself: weight"):
            bnrewrite.convert(nn.BatchNorm1d(3))(torch.randn(4, 5))

    def test_scripted_layers_are_named(self) -> None:
        with warnings.catch_warnings():
            # torch calls TorchScript deprecated.
            warnings.simplefilter("ignore")
            scripted: Any = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
            model: Any = nn.Sequential(nn.BatchNorm2d(3), scripted)
            # An attribute that scripted modules have, too.
            model.original_name = 3
            bnrewrite.convert(model)
        (skip,) = bnrewrite.report(model).skipped
        assert (skip.name, skip.reason) == ("1.0", "it is a TorchScript module")
        with pytest.raises(bnrewrite.CaptureError, match=r"1\.0: it is a TorchScript module"):
            bnrewrite.convert(model, strict=True)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
    def test_a_scripted_model_is_named(self) -> None:
        scripted: Any = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
        with pytest.warns(UserWarning, match=r"0 was left alone: it is a TorchScript module"):
            bnrewrite.convert(scripted)

    def test_a_forward_that_was_replaced_in_torch_is_named(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Sub(nn.BatchNorm2d):
            pass

        forward = nn.BatchNorm2d.forward
        for cls in (nn.BatchNorm2d, _BatchNorm):
            with monkeypatch.context() as patch:
                patch.setattr(cls, "forward", lambda self, x: forward(self, x))
                for model in (ResidualNet(), nn.Sequential(Sub(3))):
                    said = rf"{cls.__name__}\.forward of torch\.nn has been replaced"
                    with pytest.raises(bnrewrite.BnRewriteError, match=said):
                        bnrewrite.convert(model)
                    assert not any(is_converted(module) for module in model.modules())

    def test_a_revert_that_fails_changes_nothing(self) -> None:
        model = bnrewrite.convert(ResidualNet())
        last = [module for module in model.modules() if is_converted(module)][-1]
        last.__class__ = type("Sharded", (type(last),), {})
        before = _snapshot(model)
        with pytest.raises(bnrewrite.BnRewriteError, match="changed after conversion"):
            bnrewrite.revert(model)
        assert _snapshot(model) == before

    @pytest.mark.parametrize("collects", [True, False])
    def test_garbage_is_collected_as_before(self, collects: bool) -> None:
        gc_was_enabled = gc.isenabled()
        try:
            (gc.enable if collects else gc.disable)()
            bnrewrite.convert(ResidualNet())
            assert gc.isenabled() == collects
            with pytest.raises(ValueError, match="matches none"):
                bnrewrite.convert(ResidualNet(), {"nowhere": "sync"})
            assert gc.isenabled() == collects
        finally:
            (gc.enable if gc_was_enabled else gc.disable)()

    def test_strict_raises_for_what_cannot_be_rewritten(self) -> None:
        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm1d(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.bn(x) if x.sum() > 0 else x

        model: Any = nn.Sequential(Branches())
        before = _snapshot(model)
        with pytest.raises(bnrewrite.CaptureError, match=r"0: .*test_convert\.py:\d+(.|\n)*strict"):
            bnrewrite.convert(model, strict=True)
        assert _snapshot(model) == before
        bnrewrite.convert(model)
        (skip,) = bnrewrite.report(model).skipped
        assert skip.name == "0"
        assert is_converted(model[0].bn)

    def test_strict_accepts_every_model_that_is_rewritten(self) -> None:
        for model in (ResidualNet(), _zoo()):
            bnrewrite.convert(model, strict=True)
            assert bnrewrite.report(model).skipped == ()


class _Scaled(nn.Module):
    """A call of ``F.batch_norm`` behind an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.batch_norm(scale * x, self.mean, self.var, training=self.training)


class _Untold(_Scaled):
    """One with tensors that are none of the module's."""

    momentum = 0.1

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        mean, var = self.mean.detach(), self.var.detach()
        return F.batch_norm(scale * x, mean, var, None, None, self.training, self.momentum)


class TestWarnings:
    """Finding nothing is a warning that says what was looked for."""

    def test_nothing_to_convert(self) -> None:
        for model in (nn.Linear(3, 3), nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3))):
            with pytest.warns(UserWarning, match=r"nothing to convert: .* looked for.*batch_norm"):
                bnrewrite.convert(model)
            bnrewrite.revert(model)

    def test_standardized_weights_are_no_site(self) -> None:
        class Standardized(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 3, 3))

            def forward(self, x: Tensor) -> Tensor:
                rows = self.weight.reshape(1, 4, -1)
                return F.conv1d(x, F.batch_norm(rows, None, None, training=True).view(4, 3, 3))

        model = nn.Sequential(Standardized())
        with pytest.warns(UserWarning, match="nothing to convert"):
            bnrewrite.convert(model)
        assert bnrewrite.report(model).sites == ()

    def test_functional_calls_in_a_forward_that_cannot_be_traced(self) -> None:
        class Hidden(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if x.sum() > 0:
                    return F.batch_norm(x, None, None, training=True)
                return x

        model = nn.Sequential(nn.BatchNorm1d(3), Hidden())
        with pytest.warns(UserWarning, match=r"1 \(Hidden\).*local statistics.*use a BatchNorm"):
            bnrewrite.convert(model)

    @pytest.mark.parametrize("mode", ["frozen", "sync", "local"])
    def test_functional_calls_where_the_graph_does_not_stand_for_the_call(self, mode: str) -> None:
        """Nothing tells them there; with one rank only ``frozen`` differs from torch's."""
        model = bnrewrite.convert(_Untold(), mode)
        x = torch.randn(4, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
            model.eval()(x, 2.0)
        model.train()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            model(x, 2.0)
        messages = [str(one.message) for one in warned]
        assert len(messages) == (mode == "frozen")
        assert all("runs its own forward" in one and "test_convert.py:" in one for one in messages)
        assert [one.filename for one in warned] == [__file__] * len(messages)

    def test_functional_calls_where_an_attribute_changes(self) -> None:
        module: Any = _Untold()
        module.momentum = 0.1
        model: Any = bnrewrite.convert(module, "frozen")
        model.momentum = 0.2
        with pytest.warns(
            UserWarning, match=r"because momentum was 0\.1 and is 0\.2\. .*convert the model again"
        ):
            model(torch.randn(4, 3))

    def test_a_child_with_a_graph_of_its_own_loses_no_functional_call(self) -> None:
        class Parent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm1d(3)
                self.a, self.b = _Scaled(), _Scaled()

            def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
                x = self.bn(x) * scale
                return self.a(x) + self.b(x)

        model = bnrewrite.convert(Parent(), {"*batch_norm": "frozen", "*": "sync"})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.randn(4, 3), 2.0)

    def test_lazy_layers_are_reported(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(nn.LazyBatchNorm1d(), nn.BatchNorm1d(3))
        bnrewrite.convert(model)
        (skip,) = bnrewrite.report(model).skipped
        assert skip.name == "0"
        assert "lazy" in skip.reason
        model(torch.randn(4, 3))
        bnrewrite.convert(model)
        assert len(bnrewrite.report(model).sites) == 2


class TestReport:
    """What it says, as data and as text."""

    @pytest.mark.parametrize(("mode", "group"), [("sync", "default"), ("local", "")])
    def test_sites_that_share_nothing_have_no_group(self, mode: str, group: str) -> None:
        model = bnrewrite.convert(nn.Sequential(nn.BatchNorm1d(3), Functional(3)), mode)
        sites = bnrewrite.report(model).sites
        assert [site.name for site in sites] == ["0", "1.batch_norm"]
        assert [site.group for site in sites] == [group, group]

    def test_text_and_dictionary(self) -> None:
        model = bnrewrite.convert(_zoo())
        report = bnrewrite.report(model)
        names = [site.name for site in report.sites]
        assert sorted(names) == sorted(
            [
                "first",
                "activated",
                "functional_norm",
                "block.bn1",
                "block.bn2",
                "sync",
                "listed.0",
                "listed.1",
                "functional.batch_norm",
            ]
        )
        owners = {site.name: site.owner for site in report.sites}
        assert owners["first"] == ""
        assert owners["block.bn1"] == "block"
        assert owners["activated"] == "activated"
        assert owners["sync"] is None
        where = {site.name: site.where for site in report.sites}
        assert where["block.bn1"] is not None
        assert "models.py:" in where["block.bn1"]
        channels = {site.name: site.num_channels for site in report.sites}
        assert channels["first"] == 3
        as_dict = report.to_dict()
        assert json.loads(json.dumps(as_dict)) == json.loads(json.dumps(report.to_dict()))
        assert [site["name"] for site in as_dict["sites"]] == names
        text = str(report)
        assert text.startswith("Zoo: 9 BatchNorm sites, 8 in captured graphs, 1 on their own")
        assert "mode sync, world size 1" in text
        assert "replace_batch_norm" in text
        assert "none with one rank" in text
        assert report.skipped == ()

    def test_fusions_shared_collectives_and_inlined_modules(self) -> None:
        """The shortcut's site of ``layer2`` shares, the sites of ``layer1`` fuse."""
        report = bnrewrite.report(bnrewrite.convert(ResidualNet()))
        sites = {site.name: site for site in report.sites}
        assert sites["layer1.bn1"].fused == "relu"
        assert sites["layer1.bn2"].fused == "sum, relu"
        assert sites["layer1.bn1"].shares_with == ()
        assert sites["layer2.bn2"].shares_with == ("layer2.downsample.1",)
        assert sites["layer2.downsample.1"].shares_with == ("layer2.bn2",)
        assert (sites["layer2.bn2"].fused, sites["layer2.bn2"].group) == ("sum, relu", "default")
        assert sites["layer2.downsample.1"].fused == ""
        assert (report.collectives_forward, report.before_forward) == (6, 7)
        assert (report.collectives_backward, report.before_backward) == (6, 7)
        assert report.inlined() == ("layer2.downsample",)
        owners = {owner.name: owner for owner in report.owners}
        assert owners["layer2"].inlined == ("layer2.downsample",)
        assert owners["layer1"].inlined == ()
        assert owners["layer2"].differs
        plain = bnrewrite.report(bnrewrite.convert(ResidualNet(), passes=()))
        assert not any(owner.differs for owner in plain.owners)
        order = [one.sites for one in report.rounds]
        assert order[-2:] == [("layer2.downsample.1", "layer2.bn2"), ("neck",)]
        assert len(order) == 6
        text = str(report)
        assert "inlined to share collectives: layer2.downsample\n" in text
        assert "6 forward + 6 backward for 7 evaluations (7 + 7 before sharing)" in text
        (line,) = (line for line in report.table().splitlines() if line.startswith("layer1.bn2 "))
        assert line.split()[1:6] == ["sync", "default", "8", "sum,", "relu"]
        assert line.split()[6].endswith(
            f"models.py:{str(sites['layer1.bn2'].where).split(':')[-1]}"
        )

    def test_alone_and_frozen_sites_communicate_as_they_say(self) -> None:
        modes = {"layer1.bn1": "frozen", "layer1.bn2": "local", "*": "sync"}
        report = bnrewrite.report(bnrewrite.convert(ResidualNet(), modes, passes=()))
        assert (report.collectives_forward, report.before_forward) == (5, 5)
        silent = [one.sites for one in report.rounds if not one.collectives_forward]
        assert silent == [("layer1.bn1",), ("layer1.bn2",)]
        lone = bnrewrite.report(bnrewrite.convert(nn.BatchNorm1d(3)))
        (one,) = lone.rounds
        assert (one.sites, one.owner, one.collectives_backward) == (("",), None, 1)

    def test_what_a_pass_did_counts_in_the_graphs_that_a_step_runs(self) -> None:
        """Alone, both branches would fuse; inlined, they share."""
        branches = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in "ab"]

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = branches

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x) + self.b(x)

        report = bnrewrite.report(bnrewrite.convert(Both()))
        done = {one.name: (one.num_rewritten, len(one.skipped)) for one in report.passes}
        assert done["share_collectives"] == (2, 0)
        assert done["fuse_epilogue"] == (2, 0)
        assert done["overlap_backward"] == (2, 0)

    def test_calls_are_counted_not_layers(self) -> None:
        """``first`` is called twice by the model, ``block`` too, which one graph cannot tell."""

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm1d(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.bn(self.bn(x))

        report = bnrewrite.report(bnrewrite.convert(Twice()))
        assert len(report.sites) == 1
        assert report.collectives_forward == report.collectives_backward == 2


class Aliased(nn.Module):
    """A forward that changes a value in place under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        same = x
        same += 1
        same *= 2
        return x


def test_a_change_in_place_reaches_the_other_names_of_a_value() -> None:
    model = assert_same_training(Aliased, lambda n: ((torch.randn(4 + n, 3),), {}))
    assert bnrewrite.report(model).num_owners == 1


class TestGraphs:
    """The rewritten training graphs."""

    def test_nodes_are_calls_of_the_op(self) -> None:
        model = bnrewrite.convert(ResidualNet(), passes=())
        graphs = bnrewrite.graphs(model)
        assert sorted(graphs) == ["", "layer1", "layer2", "layer2.downsample"]
        ops = [
            node
            for graph in graphs.values()
            for node in graph.graph.nodes
            if node.target is torch.ops.bnrewrite.batch_norm.default
        ]
        assert len(ops) == ResidualNet.NUM_SITES
        for graph in graphs.values():
            assert isinstance(graph, fx.GraphModule)
            calls = {str(node.target) for node in graph.graph.find_nodes(op="call_module")}
            assert not any(isinstance(graph.get_submodule(c), _BatchNorm) for c in calls)
            assert "bnrewrite.batch_norm" in graph.print_readable(print_output=False)

    def test_they_run_and_may_be_edited(self) -> None:
        model = bnrewrite.convert(ResidualNet().double(), passes=())
        expected = copy.deepcopy(model)(_x())
        graph = bnrewrite.graphs(model)[""]
        torch.testing.assert_close(graph(_x()), expected, rtol=1e-12, atol=1e-12)
        for node in list(graph.graph.nodes):
            if node.target is F.relu:
                node.target, node.kwargs = torch.tanh, {}
        graph.recompile()
        fresh = bnrewrite.graphs(model)[""]
        assert "tanh" not in fresh.code
        assert not torch.equal(graph(_x()), expected)

    def test_a_model_that_is_not_converted_has_none(self) -> None:
        assert bnrewrite.graphs(ResidualNet()) == {}


class _Guarded(nn.Module):
    """Two branches that could share, and a question about a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.b = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if a.shape[-1] != b.shape[-1]:
            raise ValueError("sizes differ")
        return a + b


def test_the_report_says_why_children_share_nothing() -> None:
    report = bnrewrite.report(bnrewrite.convert(_Guarded()))
    (inlining,) = (one for one in report.passes if one.name == "inline_children")
    (skip,) = inlining.skipped
    assert skip.name == "the model itself"
    assert "branches on a computed value or shape" in skip.reason
    assert "test_convert.py:" in skip.reason
    assert skip.reason in str(report)
    # Each is distributed all the same.
    bnrewrite.convert(_Guarded(), strict=True)


@pytest.mark.parametrize("pattern", ["stages.0.shortcut", "conv", "stages.*.conv?"])
def test_patterns_that_match_other_modules_match_no_site(pattern: str) -> None:
    model = DigitsNet()
    with pytest.raises(ValueError, match="matches none of the 7 BatchNorm sites"):
        bnrewrite.convert(model, mode={pattern: "frozen", "*": "sync"})


class _TwoViews(nn.Module):
    """Runs one encoder twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.encoder(x) - self.encoder(y)


def test_a_site_that_shares_with_its_other_evaluation_says_so() -> None:
    (site,) = bnrewrite.report(bnrewrite.convert(_TwoViews())).sites
    assert site.shares_with == ("encoder.1",)


def test_layers_that_are_registered_twice_are_found_where_they_are_called() -> None:
    model = bnrewrite.convert(RegisteredTwice(), strict=True)
    report = bnrewrite.report(model)
    assert {site.name: site.owner is None for site in report.sites} == {
        f"{name}.norm": False for name in ("stem", "left", "right")
    }
    # The two branches share; each layer is counted once.
    assert report.collectives_forward == 2
    assert report.num_communicating == 3
