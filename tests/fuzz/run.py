"""Running many random examples."""

from collections import Counter

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.check import Unfit, check
from tests.fuzz.strategies import examples
from tests.fuzz.worker import Example
from tests.ranks import RankPool

# Examples are large and slow on purpose.
_UNCHECKED = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.filter_too_much,
)


def fuzz(
    pool: RankPool,
    num_examples: int,
    *,
    seed: int | None = None,
    max_ranks: int = 4,
    counts: Counter[str] | None = None,
) -> None:
    """Checks random examples until one fails, which is then made as small as possible.

    Args:
        pool: the ranks.
        num_examples: how many networks to try.
        seed: of the random draws; None draws the same ones every time.
        max_ranks: at most so many ranks.
        counts: what became of the examples, by outcome.
    """
    counts = Counter() if counts is None else counts

    @settings(
        max_examples=num_examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=_UNCHECKED,
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(example=examples(max_ranks))
    def try_one(example: Example) -> None:
        try:
            shared = check(example, pool)
        except Unfit as reason:
            counts["unfit: " + str(reason).split(":")[0]] += 1
            hypothesis.reject()
        except BaseException:
            counts["failed"] += 1
            raise
        counts[f"{len(example['steps'][0]['sizes'])} ranks"] += 1
        counts["with shared collectives"] += shared

    if seed is not None:
        try_one = hypothesis.seed(seed)(try_one)
    try_one()
