"""Backends of ``torch.compile`` that hide the collectives of BatchNorm behind weight gradients.

    torch.compile(model, backend="bnrewrite")               Inductor
    torch.compile(model, backend="bnrewrite_aot_eager")     no code generation, for debugging

In the backward graph, the all-reduce of a site stands between the input gradient of the next
convolution and everything before it. The *weight* gradient of that convolution depends on neither.
Both gradients come from one node, ``convolution_backward``. The pass splits it, then reorders the
graph: it launches collectives as early as possible, waits for them as late as possible, and runs
weight gradients and whatever else is ready in between. Every node computes what it computed before,
so gradients are bit-identical.

The passes run on the graphs of AOTAutograd, through Inductor's ``post_grad_custom_post_pass`` and
the compilers of ``aot_eager``. The names are entry points, so nothing needs to be imported.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from bnrewrite.collectives import WAIT, is_launch
from bnrewrite.passes import schedule

_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


class HideCollectives(CustomGraphPass):
    """Splits and schedules one graph of AOTAutograd; graphs without collectives stay as they are.

    To use it with another backend name, set it as
    ``torch._inductor.config.post_grad_custom_post_pass``.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites ``graph`` in place."""
        if not any(is_launch(node.target) for node in graph.nodes):
            return
        split_convolution_backward(graph)
        hide_collectives(graph)
        graph.lint()

    def uuid(self) -> bytes:
        """Identifies the pass in Inductor's caches."""
        return get_hash_for_files((__file__, schedule.__file__))


def split_convolution_backward(graph: fx.Graph) -> None:
    """Splits each ``convolution_backward`` in two: gradients of the input, of weight and bias."""
    for node in list(graph.find_nodes(op="call_function", target=_CONVOLUTION_BACKWARD)):
        *others, (for_input, for_weight, for_bias) = node.args
        if not for_input or not (for_weight or for_bias):
            continue
        halves = {}
        for index, mask in ((0, (True, False, False)), (1, (False, for_weight, for_bias))):
            with graph.inserting_before(node):
                halves[index] = graph.call_function(node.target, (*others, list(mask)))
            halves[index].meta.update(node.meta)
            if "val" in node.meta:
                values = zip(node.meta["val"], mask, strict=True)
                halves[index].meta["val"] = tuple(v if wanted else None for v, wanted in values)
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise AssertionError(f"{user} reads {node} otherwise than by index")
            user.replace_input_with(node, halves[min(int(user.args[1]), 1)])  # pyright: ignore
        graph.erase_node(node)


def hide_collectives(graph: fx.Graph) -> None:
    """Puts launches first, then what the next launch needs, then other work, and waits last."""
    nodes = list(graph.nodes)
    before = {node: set(node.all_input_nodes) for node in nodes}
    launches, ordered = 0, None
    needed = dict.fromkeys(nodes, len(nodes))
    for node in nodes:
        if is_launch(node.target) or _has_effects(node):
            # All ranks launch in the same order, and effects stay where they are among themselves.
            if ordered is not None:
                before[node].add(ordered)
            ordered = node
        if is_launch(node.target):
            needed[node] = launches
            launches += 1
    _keep_writes_in_place(nodes, before)
    for node in reversed(nodes):
        for source in before[node]:
            needed[source] = min(needed[source], needed[node])

    def rank(node: fx.Node, position: int) -> tuple[int, int, int]:
        if node.op == "placeholder":
            return 0, 0, position
        if is_launch(node.target):
            return 1, needed[node], position
        return (3 if node.target is WAIT else 2), needed[node], position

    schedule.reorder(graph, before, (), rank)


def _has_effects(node: fx.Node) -> bool:
    """Whether a node does more than making its value: it writes, or draws random numbers."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target is not WAIT
        and (target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags)
    )


def _keep_writes_in_place(nodes: Sequence[fx.Node], before: dict[fx.Node, set[fx.Node]]) -> None:
    """Keeps everything that comes before a write in place before it, and all after it after."""
    write, since = None, []
    for node in nodes:
        if write is not None and node.op not in ("placeholder", "output"):
            before[node].add(write)
        since.append(node)
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            before[node].update(one for one in since if one is not node)
            write, since = node, []


def inductor(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """The backend ``bnrewrite``: Inductor with :class:`HideCollectives`.

    ``mode`` and ``options`` are those of Inductor, with the same restrictions.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    # dynamic, which no mode asks for, is not told to backends.
    wanted = torch._TorchCompileInductorWrapper(mode, options, None).config
    present = wanted.get(_POST_PASS, config.post_grad_custom_post_pass)
    if present is not None and not isinstance(present, HideCollectives):
        raise ValueError(
            f"torch._inductor.config.{_POST_PASS} is already set, to {present!r}. Call "
            "bnrewrite.compiler.HideCollectives() in it, and compile with backend='inductor'."
        )
    # It would put waits where they free memory soonest.
    patches = {"reorder_for_peak_memory": False, **wanted, _POST_PASS: HideCollectives()}
    return compile_fx(graph, list(example_inputs), config_patches=patches)


_POST_PASS = "post_grad_custom_post_pass"


def aot_eager(graph: fx.GraphModule, example_inputs: Sequence[Any], **wanted: Any) -> Any:
    """The backend ``bnrewrite_aot_eager``: the scheduled graphs of AOTAutograd, run as they are.

    Raises:
        TypeError: a mode or options are given; only Inductor has those.
    """
    if wanted:
        said = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
        raise TypeError(
            f"backend 'bnrewrite_aot_eager' generates no code and does not accept {said}. Remove "
            "it, or compile with backend='bnrewrite'."
        )
    from torch._dynamo.backends.debugging import aot_eager, boxed_nop

    hide = HideCollectives()

    def compiler(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        hide(module.graph)
        module.recompile()
        return boxed_nop(module, inputs)

    return aot_eager(graph, example_inputs, fw_compiler=compiler, bw_compiler=compiler)  # pyright: ignore
