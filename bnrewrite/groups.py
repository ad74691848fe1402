"""Process groups by name: modules hold names, which copy and pickle, and look groups up.

The argument ``group`` of an op says more than the name if statistics may be gathered in the group:
"0/2" is group "0", whose two ranks gather. The number belongs there since it is part of a graph
that gathers, and all ranks must choose alike, whether they compile or not.
"""

import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from bnrewrite.errors import GroupError
from bnrewrite.guards import guard_answer, is_compiling, runs_in_python

NO_GROUP = ""
"""Name that stands for "nothing to communicate"."""

DEFAULT_GROUP = "default"
"""Name that stands for the default group, which is looked up at each call."""


def group_name(process_group: dist.ProcessGroup | DeviceMesh | None) -> str:
    """The name by which a converted module remembers ``process_group``.

    Args:
        process_group: None for the default group, a process group, or a one-dimensional mesh.

    Raises:
        TypeError: it is something else.
        ValueError: the mesh has several dimensions, or this rank is not a member of the group.
    """
    if process_group is None:
        return DEFAULT_GROUP
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group is a DeviceMesh with {process_group.ndim} dimensions "
                f"{process_group.mesh_dim_names or tuple(process_group.shape)}, but statistics are "
                "shared along one. Pass one of its dimensions, e.g. mesh['dp']."
            )
        if process_group.get_coordinate() is None:
            raise ValueError(
                f"this rank ({dist.get_rank()}) is not part of the DeviceMesh given as "
                "process_group. Pass the mesh that contains it."
            )
        return process_group.get_group().group_name
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"this rank ({dist.get_rank()}) is not a member of the group given as process_group. "
            "On each rank, pass the group that contains that rank."
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be None, a torch.distributed.ProcessGroup or a one-dimensional "
            f"DeviceMesh, but it is {type(process_group).__name__} ({process_group!r})."
        )
    return process_group.group_name


@runs_in_python
def find_group(name: str) -> dist.ProcessGroup:
    """The process group called ``name``.

    Raises:
        GroupError: there is none in this process.
    """
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, ValueError, KeyError) as error:
        raise GroupError(
            f"the process group {name!r} that the model was converted with does not exist in this "
            "process: it was destroyed, or the model was loaded in another process. Call "
            "bnrewrite.convert(model, process_group=...) again with an existing group."
        ) from error


@runs_in_python
def active_group(name: str, training: bool) -> str:
    """The argument ``group`` of an op now: ``NO_GROUP`` if there is nothing to communicate.

    Nothing is communicated outside training, without a process group, and in groups of one rank.
    A compiler specializes on the answer, and asks again before each call.

    Returns:
        For ops, and for the functions of :mod:`bnrewrite.collectives`: the name, and after a slash
        the number of ranks if they may gather statistics.

    Args:
        name: from :func:`group_name`, or ``NO_GROUP``.
        training: whether sites use the statistics of their batch.
    """
    if not training or name == NO_GROUP:
        return NO_GROUP
    if is_compiling():
        return _guarded_active_group(name)
    return _active_group(name)


@runs_in_python
def _active_group(name: str) -> str:
    group = dist.distributed_c10d._world._default_pg if name == DEFAULT_GROUP else find_group(name)
    if group is None:
        return NO_GROUP
    num_ranks = group.size()
    if num_ranks == 1:
        return NO_GROUP
    # Groups that people write may change their size.
    known_ranks, argument = _arguments.get(group, (0, ""))
    if known_ranks != num_ranks:
        argument = _argument(group.group_name, num_ranks if runs_on_gloo(group) else 0)
        _arguments[group] = num_ranks, argument
    return argument


_arguments: "weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[int, str]]"
_arguments = weakref.WeakKeyDictionary()


def _argument(name: str, num_ranks: int) -> str:
    # Names of torch have no slash, but people may choose others.
    return f"{name}/{num_ranks}" if num_ranks or "/" in name else name


def runs_on_gloo(group: dist.ProcessGroup) -> bool:
    """Whether gloo carries tensors on the CPU."""
    try:
        # The name of the group itself depends on what else a process has imported.
        return group._get_backend(_CPU).name() == "gloo"  # pyright: ignore
    except RuntimeError:
        # It carries none.
        return False


_CPU = torch.device("cpu")


@torch.compiler.assume_constant_result
def _guarded_active_group(name: str) -> str:
    if torch.compiler.is_exporting():
        # A program may be loaded in a group of another size.
        active = _active_group(name)
        return active and _argument(name_in(active), 0)
    return guard_answer("active_group", _active_group, name)


def group_of(group: str) -> dist.ProcessGroup:
    """The process group that the argument ``group`` of an op means.

    Raises:
        GroupError: there is none in this process.
    """
    return find_group(name_in(group))


def name_in(group: str) -> str:
    """Name of the process group in the argument ``group`` of an op."""
    return parts_of(group)[0]


def parts_of(group: str) -> tuple[str, int]:
    """Name in the argument ``group`` of an op, and its ranks if they may gather, or 0."""
    name, _, num_ranks = group.rpartition("/")
    return (name, int(num_ranks)) if name and num_ranks.isdecimal() else (group, 0)


def place_in(group: str) -> tuple[int, int]:
    """Rank of this process in ``group`` and the number of its ranks; (0, 1) for ``NO_GROUP``.

    Who sends what to whom is part of a compiled graph, so these numbers are found outside the ops
    and given to them: compilers guard on them, and no cache mixes graphs of different ranks.

    Args:
        group: from :func:`active_group`.
    """
    if group == NO_GROUP:
        return 0, 1
    if is_compiling():
        return _guarded_place_in(group)
    return _place_in(group)


def _place_in(group: str) -> tuple[int, int]:
    found = group_of(group)
    return found.rank(), found.size()


@torch.compiler.assume_constant_result
def _guarded_place_in(group: str) -> tuple[int, int]:
    return guard_answer("place_in", _place_in, group)


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def timeout_s(group: dist.ProcessGroup) -> float:
    """After how many seconds collectives of ``group`` give up."""
    # A group that is written in Python has no backends.
    backends = [group._get_backend(device) for device in group._device_types[:1]]
    options = getattr(backends[0], "options", None) if backends else None
    found = getattr(options, "_timeout", None)
    return (found or timedelta(minutes=30)).total_seconds()
