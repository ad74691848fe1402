"""``check``: whether all ranks are about to run the same collectives."""

from torch import nn

from bnrewrite.agreement import View, agree, can_agree, default_group
from bnrewrite.sites.schedule import schedule_of


def check(model: nn.Module) -> None:
    """Compares what ``model`` will communicate on each rank, and raises if ranks differ.

    Every rank of every group that the model communicates in must call it. Training makes the same
    comparison before the first collective, and again when flags have changed, unless the
    environment sets ``BNREWRITE_CHECK=0``. Without a process group, or with one rank, there is
    nothing to compare.

    Args:
        model: a module that ``convert`` returned, or one that contains it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is not converted on any rank.
        ScheduleError: the ranks differ; the message names the first site that differs and what two
            of the ranks say about it.
        PeerError: a rank did not answer within the timeout of the group.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {type(model).__name__}.")
    found = [schedule_of(module) for module in model.modules()]
    schedules = [schedule for schedule in dict.fromkeys(found) if schedule is not None]
    if not schedules:
        group = default_group()
        if group is not None and can_agree(group):
            said = (("the conversion", "there is none: the model is not converted"),)
            agree(group.group_name, View("", said, empty=True), by_hand=True)
        raise ValueError(
            f"{type(model).__name__} is not converted. Call bnrewrite.convert(model) first."
        )
    for schedule in schedules:
        schedule.look(by_hand=True)
