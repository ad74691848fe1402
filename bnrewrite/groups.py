"""Process groups by name: modules hold names, which copy and pickle, and look groups up."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from bnrewrite.errors import GroupError

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
                f"{process_group.mesh_dim_names or tuple(process_group.shape)}; statistics are "
                "shared along one. Pass one dimension of it, e.g. mesh['dp']."
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
            "Pass, on each rank, the group that contains the rank."
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be None, a torch.distributed.ProcessGroup or a one-dimensional "
            f"DeviceMesh, but it is {type(process_group).__name__} ({process_group!r})."
        )
    return process_group.group_name


def find_group(name: str) -> dist.ProcessGroup:
    """The process group called ``name``.

    Raises:
        GroupError: there is none in this process.
    """
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, ValueError, KeyError) as error:
        raise GroupError(
            f"the process group {name!r} that convert() was given does not exist in this process: "
            "it was destroyed, or the model was loaded elsewhere. Call bnrewrite.convert(model, "
            "process_group=...) again with a living group."
        ) from error


def active_group(name: str, training: bool) -> str:
    """Name of the group to communicate with now, or ``NO_GROUP`` if there is nothing to do.

    Nothing is communicated outside training, without a process group, and in groups of one rank.
    A compiler specialises on the answer and asks again when the default group changes.
    """
    if not training or name == NO_GROUP:
        return NO_GROUP
    if name != DEFAULT_GROUP:
        return _active_explicit_group(name)
    # Dynamo guards on this attribute; dist.is_initialized() it would take for a constant.
    group = dist.distributed_c10d._world._default_pg
    if group is None or group.size() == 1:
        return NO_GROUP
    return group.group_name


@torch.compiler.assume_constant_result
def _active_explicit_group(name: str) -> str:
    return name if find_group(name).size() > 1 else NO_GROUP


def place_in(group: str) -> tuple[int, int]:
    """Rank of this process in ``group`` and the number of its ranks; (0, 1) for ``NO_GROUP``.

    Who sends what to whom is part of a compiled graph, so these numbers are found outside the ops
    and given to them: compilers guard on them, and no cache mixes graphs of different ranks.

    Args:
        group: a name from :func:`active_group`.
    """
    if group == NO_GROUP:
        return 0, 1
    # Dynamo guards on this attribute, and on the group's size by way of active_group.
    default = dist.distributed_c10d._world._default_pg
    if default is not None and group == default.group_name:
        return default.rank(), default.size()
    return _place_in_explicit_group(group)


@torch.compiler.assume_constant_result
def _place_in_explicit_group(name: str) -> tuple[int, int]:
    group = find_group(name)
    return group.rank(), group.size()


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
