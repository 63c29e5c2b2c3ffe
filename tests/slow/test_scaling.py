"""Scale real workers from zero to the maximum and back by the decisions of KEDA and the HPA.

Time is scaled by 60. The number of workers is computed from the chart's ScaledObject,
as Helm renders it, and from the queue depth, as the broker reports it to KEDA.
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
from tests.scaling.run import Plan, RunResult, run

# On a busy machine the workers start slowly.
pytestmark = pytest.mark.timeout(300)

FACTOR: Final = 60
MAX_PODS: Final = 3
CONCURRENCY: Final = 4
CALL_S: Final = 1.0
CAPACITY_PER_S: Final = MAX_PODS * CONCURRENCY / CALL_S

# Tolerances of the simulation. The area between the two curves of replicas, relative to the area
# under the real one, is typically 0.01 to 0.05.
MAX_DIFFERENCE: Final = 0.15
MAX_DIFFERENCE_S: Final = 3.0


def all_are_ready(samples: Sequence[Sample]) -> bool:
    return samples[-1].ready == MAX_PODS


def has_scaled_down(samples: Sequence[Sample]) -> bool:
    return samples[-1].replicas < MAX_PODS


LOAD: Final = (
    Phase(4, 0.1 * CAPACITY_PER_S, 0.9 * CAPACITY_PER_S),
    # No jobs until all workers have started.
    Phase(0, 0, 0, until=all_are_ready),
    # Fewer jobs than the capacity, but some for each worker.
    Phase(0, 0.42 * CAPACITY_PER_S, 0.42 * CAPACITY_PER_S, until=has_scaled_down),
    Phase(5, 0.42 * CAPACITY_PER_S, 2.2 * CAPACITY_PER_S),
)


@pytest.fixture(scope="module")
async def ended(stack: Stack, put_image: PutImage, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    release = Release.of(stack, name="scaling", concurrency=CONCURRENCY, provider=MAX_PODS * CONCURRENCY)
    plan = Plan(release, FACTOR, CALL_S, LOAD, put_image())
    return await run(stack, tmp_path_factory.mktemp("scaling"), plan)


@pytest.fixture(scope="module")
def simulated(ended: RunResult) -> list[Sample]:
    return ended.simulated()


def test_the_configuration_is_the_rendered_scaled_object(ended: RunResult) -> None:
    scaler = ended.plan.release.scaler
    assert (scaler.queue, scaler.value, scaler.maximum) == ("scaling.jobs", CONCURRENCY, MAX_PODS)
    assert (scaler.minimum, scaler.activation) == (0, 0)
    assert ended.plan.scaler.cooldown_s == scaler.cooldown_s / FACTOR


def test_the_workers_scale_from_zero_to_the_maximum_and_back(ended: RunResult) -> None:
    samples = ended.samples
    assert (samples[0].replicas, samples[-1].replicas, samples[-1].terminating) == (0, 0, 0)
    assert max(it.ready for it in samples) == MAX_PODS
    # With one scale-down and scale-up between.
    changes = [later.replicas - earlier.replicas for earlier, later in itertools.pairwise(samples)]
    directions = [key for key, _ in itertools.groupby(change > 0 for change in changes if change)]
    assert directions == [True, False, True, False]


def test_every_job_is_answered_and_billed_once_although_pods_are_stopped_during_requests(
    ended: RunResult,
) -> None:
    assert ended.errors() == []
    assert ended.interrupted()


def test_the_simulation_predicts_the_run(ended: RunResult, simulated: list[Sample]) -> None:
    assert difference(ended.samples, simulated, lambda it: it.replicas) < MAX_DIFFERENCE
    expected, found = ended.summary_of(ended.samples), ended.summary_of(simulated)
    assert found.max_replicas == expected.max_replicas
    assert found.jobs == expected.jobs
    for figure in ("first_pod_s", "all_ready_s", "drain_s", "scale_down_s"):
        assert getattr(found, figure) == pytest.approx(getattr(expected, figure), abs=MAX_DIFFERENCE_S), (
            figure
        )
