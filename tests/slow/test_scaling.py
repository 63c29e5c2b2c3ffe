"""From zero to the most and back by real workers, a real broker and the decisions of KEDA and the HPA.

Time passes sixty times as fast as in a cluster. The number of workers follows from the chart's ScaledObject,
as Helm renders it, and from the length of the queue, as the broker reports it to KEDA.
"""

import itertools
from collections.abc import Sequence
from typing import Final

import pytest

from deploy.local.stack import Stack
from tests.conftest import PutImage
from tests.scaling.load import Phase
from tests.scaling.record import Sample, difference
from tests.scaling.release import Release
from tests.scaling.run import Ended, Plan, run

# Where many things run beside, it is the workers' start that takes long.
pytestmark = pytest.mark.timeout(300)

FACTOR: Final = 60
MOST: Final = 3
CONCURRENCY: Final = 4
CALL_S: Final = 1.0
MOST_PER_S: Final = MOST * CONCURRENCY / CALL_S

# How far the simulation may be off: the area between the two courses of the number of pods as a share of that
# under the real one, which is 0.01 to 0.05, on a busy machine too; and seconds.
SHARE_OFF: Final = 0.15
SECONDS_OFF: Final = 3.0


def all_are_ready(samples: Sequence[Sample]) -> bool:
    return samples[-1].ready == MOST


def has_gone_down(samples: Sequence[Sample]) -> bool:
    return samples[-1].replicas < MOST


TIDES: Final = (
    Phase(4, 0.1 * MOST_PER_S, 0.9 * MOST_PER_S),
    # However long workers take to start on a busy machine, no more come meanwhile.
    Phase(0, 0, 0, until=all_are_ready),
    # So few that not all are needed, and so many that each has something in hand.
    Phase(0, 0.42 * MOST_PER_S, 0.42 * MOST_PER_S, until=has_gone_down),
    Phase(5, 0.42 * MOST_PER_S, 2.2 * MOST_PER_S),
)


@pytest.fixture(scope="module")
async def ended(stack: Stack, put_image: PutImage, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    release = Release.of(stack, name="scaling", concurrency=CONCURRENCY, provider=MOST * CONCURRENCY)
    plan = Plan(release, FACTOR, CALL_S, TIDES, put_image())
    return await run(stack, tmp_path_factory.mktemp("scaling"), plan)


@pytest.fixture(scope="module")
def simulated(ended: Ended) -> list[Sample]:
    return ended.simulated()


def test_it_goes_by_the_scaled_object_that_the_chart_renders(ended: Ended) -> None:
    numbers = ended.plan.release.numbers
    assert (numbers.queue, numbers.value, numbers.maximum) == ("scaling.jobs", CONCURRENCY, MOST)
    assert (numbers.minimum, numbers.activation) == (0, 0)
    assert ended.plan.numbers.cooldown_s == numbers.cooldown_s / FACTOR


def test_from_none_to_the_most_and_back_to_none(ended: Ended) -> None:
    samples = ended.samples
    assert (samples[0].replicas, samples[-1].replicas, samples[-1].ending) == (0, 0, 0)
    assert max(it.ready for it in samples) == MOST
    # And in between it went down and up again.
    changes = [later.replicas - earlier.replicas for earlier, later in itertools.pairwise(samples)]
    directions = [key for key, _ in itertools.groupby(change > 0 for change in changes if change)]
    assert directions == [True, False, True, False]


def test_every_job_is_answered_once_and_paid_once_though_pods_were_stopped_in_the_middle_of_calls(
    ended: Ended,
) -> None:
    assert ended.faults() == []
    assert ended.interrupted()


def test_the_simulation_tells_what_really_happened(ended: Ended, simulated: list[Sample]) -> None:
    assert difference(ended.samples, simulated, lambda it: it.replicas) < SHARE_OFF
    really, foretold = ended.summary_of(ended.samples), ended.summary_of(simulated)
    assert foretold.most_replicas == really.most_replicas
    assert foretold.jobs == really.jobs
    for figure in ("first_pod_s", "most_s", "drain_s", "empty_s"):
        assert getattr(foretold, figure) == pytest.approx(getattr(really, figure), abs=SECONDS_OFF), figure
