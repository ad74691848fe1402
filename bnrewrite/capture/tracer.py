"""Tracing one module's own forward, children as calls, without leaving a trace behind.

``torch.fx`` records what happens to proxies and bakes in everything else. This tracer notes what it
bakes in, so that a captured graph is used only while that still holds, and refuses a forward whose
graph would do something else than the forward: one that enters ``no_grad`` or ``autocast``, calls
an ``autograd.Function`` or a checkpoint, draws random numbers in Python, sets attributes, computes
on tensors of its own, branches on data, or does what others notice, such as to warn or to write.
"""

import contextlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn

from bnrewrite.capture.assumptions import Assumptions
from bnrewrite.capture.comparisons import refuse_caught
from bnrewrite.capture.elements import Element, element_of
from bnrewrite.capture.forms import PLAIN, Form, Refused, arguments_of, call_with
from bnrewrite.capture.frames import compares_class, user_frame, where, where_of
from bnrewrite.capture.literals import CONTAINERS, PLAIN_TYPES, literal
from bnrewrite.capture.noting import noting_reads, plainly
from bnrewrite.capture.patches import (
    CONTEXT,
    RefuseEffects,
    context,
    keeping_random_state,
    patched,
    record_functions,
)
from bnrewrite.capture.proxy import Proxy
from bnrewrite.capture.reads import Reads
from bnrewrite.capture.restore import keeping_attributes
from bnrewrite.capture.returns import never_returns_none
from bnrewrite.passes.torch_calls import Does, layer_does
from bnrewrite.sites.classes import below, original_class
from bnrewrite.sites.tracing import Tracing
from bnrewrite.torch_versions import fx_tracing


class OwnerTracer(fx.Tracer):
    """Traces the forward of one module; children are leaves, but for those to trace through.

    After :meth:`trace`, ``assumptions`` is what it took for granted, ``asked`` are the arguments
    that were asked for their type, ``compared`` those that were compared with None, and
    ``elements`` the parts of arguments that were asked either, by their nodes. Nodes have the path
    of the module whose forward made them as ``meta["scope"]``, and as ``meta["call"]`` the number
    of that run of the forward.

    Args:
        through: paths of children whose forwards become part of the graph.
        form: which calls the graph is for.
    """

    def __init__(self, through: Collection[str] = (), form: Form = PLAIN) -> None:
        super().__init__(param_shapes_constant=False)
        self._autowrap_search = []
        self._through = through
        self._form = form
        self._scopes = [("", 0)]
        self._num_calls = 1
        self.proxy_buffer_attributes = True
        self.assumptions = Assumptions()
        self.reads = Reads(self)
        self.asked: set[str] = set()
        self.compared: set[str] = set()
        self.elements: dict[str, Element] = {}
        self.refusal: Refused | None = None
        self.recording = False
        self.thread = threading.get_ident()
        self.parameter_proxies: dict[str, fx.Proxy] = {}
        self.kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def note_refusal(self, reason: str) -> None:
        """Has the trace refused at its end, unless it is already."""
        self.refusal = self.refusal or Refused(reason)

    def keep_attributes(self, *more: nn.Module) -> None:
        """Has the modules keep the attributes that they have now, or ``more`` modules."""
        for one in more or (() if self.kept else (*self.paths, *self.reads.apart.known())):
            self.kept.append((vars(one), vars(one).copy()))

    def refuse(self, reason: str) -> None:
        """Ends the trace with ``reason`` and the line of the traced code it is about."""
        if self.refusal is None:
            place = where() or where_of(Refused(), type(self.root).forward)
            self.refusal = Refused(f"{reason}{place}")
            self.refusal.scope = self._scopes[-1][0]
        raise self.refusal

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of ``root``'s forward with its optional arguments at their defaults.

        Raises:
            Refused: the forward cannot be traced, or its graph would not do the same.
        """
        forward = type(root).forward
        self._context = context()
        paths = {module: name for name, module in root.named_modules()}
        self.paths = paths
        # By whatever name the forward calls them.
        self._inside = {below(root, path) for path in self._through}
        before, Tracing.tracer = Tracing.tracer, self
        try:
            with (
                patched(),
                keeping_attributes(self),
                self.reads.noting(),
                noting_reads(paths, self),
                keeping_random_state(self),
                RefuseEffects(self),
            ):
                graph = self._record_graph(root, paths)
        except Exception as error:
            if self.refusal is None:
                place = where_of(error, forward)
                text = str(error).strip().split("\n", 1)[0].split(". ", 1)[0]
                self.refusal = Refused(f"cannot be traced: {text or type(error).__name__}{place}")
                self.refusal.scope = self._scopes[-1][0]
            self.reads.undo()
            self.assumptions.finish(root, paths, self.reads)
            self.refusal.assumptions = self.assumptions
            raise self.refusal from error
        finally:
            Tracing.tracer = before
        changed = self.reads.undo()
        self.assumptions.finish(root, paths, self.reads)
        if changed:
            self.note_refusal(changed)
        if self.refusal is not None:
            self.refusal.assumptions = self.assumptions
            raise self.refusal
        return graph

    def _record_graph(self, root: nn.Module, paths: dict[nn.Module, str]) -> fx.Graph:
        """What ``fx.Tracer.trace`` does; it changes torch for each trace and back."""
        forward = type(root).forward
        self.root = root
        self.root_module_name = root._get_name()
        self.submodule_paths = paths
        self.tensor_attrs = {}
        self.graph = fx.Graph(tracer_cls=type(self))
        self.reads.apart.start()
        self._see_forward(root)
        function, arguments = self.create_args_for_root(forward, is_module=True)
        with fx_tracing():
            self.create_node("output", "output", (self.create_arg(function(*arguments)),), {})
        self.reads.see_imports()
        return self.graph

    def _see_forward(self, module: nn.Module) -> None:
        """Notes that the forward of a module becomes part of the graph, before it runs."""
        self.reads.see_forward(original_class(module))
        record_functions(getattr(inspect.unwrap(type(module).forward), "__globals__", {}))

    # What fx.Tracer asks of its subclasses

    def to_bool(self, obj: fx.Proxy) -> bool:
        """No value is known, nor the shape of one."""
        self.refuse("branches on a computed value or shape")
        return False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Children stay calls, but for those to trace through."""
        return m not in self._inside

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that takes notes."""
        return Proxy(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        """A proxy of a new node."""
        new = plainly(super().create_proxy, *args, **kwargs)
        if self.recording:
            refuse_caught(self)
        return new

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        """Placeholders for the arguments of the form; the others keep their defaults."""
        names = arguments_of(root_fn, self._form)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def call(root: nn.Module, *values: Any) -> Any:
            self.recording = True
            try:
                return call_with(root_fn, root, names, values)
            finally:
                self.recording = False

        return call, [self.root, *proxies]

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Refuses operations in a context that a graph does not keep."""
        now = context()
        if now != self._context:
            changed = [
                what
                for what, one, two in zip(CONTEXT, now, self._context, strict=True)
                if one != two
            ]
            self.refuse(f"enters {changed[0]}")
        # See passes/nodes.py about arguments.
        node = super().create_node(kind, target, (), {}, name, type_expr)
        node.args = args
        if kwargs:
            node.kwargs = kwargs
        node.meta["scope"], node.meta["call"] = self._scopes[-1]
        # fx can record whole stacks, which costs more than the trace; one line is what is read.
        frame = user_frame() if node.op in ("call_module", "call_function") else None
        if frame is not None:
            code = frame.f_code
            line = f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
            node.meta["stack_trace"] = line
        return node

    def create_arg(self, a: Any) -> Any:
        """Refuses tensors that fx would make constants of, and containers that it would change."""
        kind = type(a)
        if kind is Proxy:
            return a.node
        if kind in PLAIN_TYPES:
            return a
        plain = literal(a)
        if plain is not None:
            return plain
        if kind is OrderedDict:
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        if kind is Tensor:
            self.refuse("uses a tensor that is not an argument, parameter or buffer")
        if (
            isinstance(a, (dict, list, tuple))
            and kind not in CONTAINERS
            and not hasattr(a, "_fields")
        ):
            self.refuse(f"makes a {kind.__name__}, which a graph would turn into a plain container")
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """A call; what fx reads of the module on the way is not the forward's doing."""
        with self.paused():
            path = self.path_of_module(m)
            if not path:
                self.refuse("calls itself")
            called = None
            if m not in self._inside:
                called = self.create_proxy("call_module", path, args, kwargs)
        if called is not None:
            refuse_caught(self)
            return called
        self.assumptions.note_inlined(path, m)
        self._see_forward(m)
        self._scopes.append((path, self._num_calls))
        self._num_calls += 1
        result = forward(*args, **kwargs)
        # After an error the innermost scope is what it is about, so there is no "finally".
        self._scopes.pop()
        return result

    # Watching the traced code

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is read meanwhile is not the forward's doing."""
        recording, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = recording

    def has_attribute(self, value: Any, name: str) -> bool:
        """The answer to ``hasattr`` about a value: what is no tensor's may be there or not."""
        if not hasattr(Tensor, name):
            self.refuse(f"asks whether a value has the attribute {name!r}")
        return self.passes_for(value, Tensor)

    def passes_for(self, proxy: fx.Proxy, classes: Any) -> bool:
        """The answer to ``isinstance``: all arguments that are asked are of one type."""
        if proxy.node.op == "placeholder":
            self.asked.add(proxy.node.name)
            return issubclass(list if self._form.lists else Tensor, classes)
        if not (self.is_layer(proxy.node) or self.takes_for_tensor(proxy.node)):
            self.refuse("branches on the type of a computed value")
        return issubclass(Tensor, classes)

    def takes_for_tensor(self, node: fx.Node) -> bool:
        """Whether ``node`` is an element of an argument; notes that it is a tensor."""
        element = element_of(node)
        if element is None:
            return False
        self.elements[node.name] = element
        return True

    def note_instance(self, module: nn.Module, classes: Any, answer: bool) -> None:
        """Notes what ``isinstance`` said of a module."""
        path = self.paths.get(module)
        if path is not None:
            self.assumptions.instances[path, classes] = answer

    def class_of(self, module: nn.Module, frame: FrameType) -> type[nn.Module]:
        """The class of a module for code in ``frame`` that asks: that from before conversion."""
        cls = original_class(module)
        path = self.paths.get(module)
        if path is not None:
            self.assumptions.layers[path] = cls
            if compares_class(frame):
                place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                self.assumptions.asked.setdefault(path, place)
        return cls

    def is_layer(self, node: fx.Node) -> bool:
        """Whether ``node`` calls a layer of torch's that makes a tensor; notes that it does."""
        if node.op != "call_module":
            return False
        path = str(node.target)
        layer = self.root.get_submodule(path)  # pyright: ignore
        cls = self._take_layer(path, layer)
        # In a sequence the last one makes the result.
        while cls is nn.Sequential and layer._modules:
            names = self.assumptions.children[path] = tuple(layer._modules)
            path, layer = f"{path}.{names[-1]}", below(layer, names[-1])
            cls = self._take_layer(path, layer)
        return Does.TENSOR in layer_does(cls)

    def gives_a_value(self, node: fx.Node) -> bool:
        """Whether the module that ``node`` calls never returns None; notes why."""
        path = str(node.target)
        with self.paused():
            return never_returns_none(below(self.root, path), path, self.assumptions)

    def _take_layer(self, path: str, layer: nn.Module) -> type:
        """Class of a layer; notes that its forward alone makes what a call gives."""
        self.assumptions.layers[path] = cls = original_class(layer)
        self.assumptions.methods[path, "forward"] = cls.forward
        self.assumptions.unhooked.add(path)
        return cls
