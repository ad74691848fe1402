"""Changes of a model that happen altogether or not at all."""

import contextlib
from collections.abc import Collection, Iterator

from torch import nn

from bnrewrite.sites.classes import assign_class
from bnrewrite.sites.schedule import schedule_of


@contextlib.contextmanager
def all_or_nothing(modules: Collection[nn.Module]) -> Iterator[None]:
    """Leaves all modules as they were if the body fails, and what DDP was told of them.

    The body takes conversions off; when it has succeeded, DDP broadcasts their buffers again. Not
    before: a rank that fails by itself goes on with the others, which broadcast as they did.
    """
    before = [(module, module.__class__, dict(vars(module))) for module in modules]
    schedules = dict.fromkeys(map(schedule_of, modules))
    left_out = [schedule.ddp_buffers for schedule in schedules if schedule is not None]
    undo = [buffers.undo() for buffers in left_out]
    try:
        yield
        for buffers in left_out:
            buffers.put_back()
    except BaseException:
        for module, cls, attributes in before:
            assign_class(module, cls)
            vars(module).clear()
            vars(module).update(attributes)
        for one in undo:
            one()
        raise
