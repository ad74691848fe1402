"""``torch.export`` of converted models, in eval and in train mode, and AOTInductor packages."""

import copy
import inspect
import io

import pytest
import torch
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind

import bnrewrite
from tests.export_models import Block, random_image, randomize
from tests.models import ResidualNet

BATCH = torch.export.Dim("batch", min=2, max=64)


class Plain(nn.Module):
    """Owners at two levels, a subclass, and a layer without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.last = nn.BatchNorm1d(5, track_running_stats=False)
        self.cumulative = nn.BatchNorm1d(5, momentum=None)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.cumulative(self.block(image)))


# torch copies the pytrees of a program in a way that it deprecates itself.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.")


@pytest.fixture(params=["sync", "local", "shuffle", "frozen"])
def model(request) -> nn.Module:
    made = randomize(Plain())
    frozen = {"last": "local", "*": "frozen"}
    return bnrewrite.convert(made, frozen if request.param == "frozen" else request.param)


def mutated(program: torch.export.ExportedProgram) -> set[str]:
    return {
        str(spec.target)
        for spec in program.graph_signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION
    }


@pytest.mark.parametrize("strict", [False, True])
def test_eval_mode_exports_with_the_eager_numbers_and_mutates_nothing(model, strict):
    model.eval()
    x, other = random_image(), random_image(5, 3, 8, 9)
    program = torch.export.export(model, (x,), dynamic_shapes={"image": {0: BATCH}}, strict=strict)
    assert mutated(program) == set()
    program = program.run_decompositions()
    assert mutated(program) == set()
    for example in (x, other):
        # The same kernels in the same order: equal but for the compiler's decompositions.
        torch.testing.assert_close(program.module()(example), model(example))


@pytest.mark.parametrize("strict", [False, True])
def test_train_mode_exports_with_the_eager_numbers_and_running_statistics(model, strict):
    model.train()
    eager = copy.deepcopy(model)
    x, other = random_image(), random_image(5, 3, 8, 9)
    program = torch.export.export(model, (x,), dynamic_shapes={"image": {0: BATCH}}, strict=strict)
    exported = program.module()
    for example in (x, other, x):
        torch.testing.assert_close(exported(example), eager(example))
    state = exported.state_dict()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=name)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # By torch 2.11.
@pytest.mark.parametrize("training", [False, True])
def test_a_program_that_was_saved_is_the_same(training):
    model = bnrewrite.convert(ResidualNet()).train(training)
    x = random_image()
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: BATCH}})
    # A round that sites share is two ops, of which one gives nothing but a list.
    assert ("start_batch_norm" in str(program.graph)) is training
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for example in (x, random_image(5, 3, 8, 9)):
        torch.testing.assert_close(loaded(example), model(example))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, msg=name)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is")
@pytest.mark.parametrize("mode", ["sync", pytest.param("frozen", marks=pytest.mark.slow)])
def test_aotinductor_packages_the_eval_form(mode, tmp_path):
    model = bnrewrite.convert(randomize(Block()), mode).eval()
    x = random_image()
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes={"image": {0: BATCH}})
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "m.pt2")
        )
        packaged = torch._inductor.aoti_load_package(path)
        for example in (x, random_image(5, 3, 8, 9)):
            # Inductor fuses and reorders float32 sums.
            torch.testing.assert_close(packaged(example), model(example), rtol=1e-4, atol=1e-5)


def test_a_converted_model_shows_the_arguments_of_its_forward():
    model = Plain()
    before = inspect.signature(model.forward)
    bnrewrite.convert(model)
    assert inspect.signature(model.forward) == before
    assert inspect.signature(type(model.block).forward) == inspect.signature(Block.forward)
