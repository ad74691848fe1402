"""The only file that communicates: process groups by name, and the all-reduce of packed sums.

Collectives are torch's functional collectives, so that a compiled graph shows each of them, and
they are created in program order, which is the same on every rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor
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


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(packed: Tensor, group: str) -> Tensor:
    """Sum of ``packed`` over the ranks of ``group``: the same bits on every rank.

    Args:
        packed: (K,), float64, of the same size on every rank.
        group: a name from :func:`active_group`; ``NO_GROUP`` returns ``packed`` itself.
    """
    if group == NO_GROUP:
        return packed
    if torch.is_grad_enabled() and packed.requires_grad:
        return _AllReduceSum.apply(packed, group)
    reduced = torch.ops._c10d_functional.all_reduce(packed, "sum", group)
    return torch.ops._c10d_functional.wait_tensor(reduced)


class _AllReduceSum(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients, to any order."""

    @staticmethod
    def forward(ctx, packed: Tensor, group: str) -> Tensor:
        ctx.group = group
        return all_reduce_sum(packed.detach(), group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad.contiguous(), ctx.group), None
