"""The parts that exist as long as the worker runs."""

from dataclasses import dataclass

from worker.clock import Clock
from worker.jobs.cancellation import CancelledJobs
from worker.jobs.in_flight_jobs import InFlightJobs
from worker.jobs.other_workers import OtherWorkers
from worker.observability.tenants import Tenants
from worker.rabbitmq.consumer import Consumer
from worker.rabbitmq.control import Control
from worker.rabbitmq.publisher import Publisher
from worker.rabbitmq.topology import Topology
from worker.resilience.concurrency_limiter import ConcurrencyLimiter
from worker.resilience.consumer_controller import ConsumerController
from worker.resilience.outage_detector import OutageDetector
from worker.resilience.outage_reports import OutageReports


@dataclass(frozen=True)
class Parts:
    """All parts except the processor, which is built after the SDKs are loaded."""

    clock: Clock
    publisher: Publisher
    consumer: Consumer
    in_flight: InFlightJobs
    controller: ConsumerController
    detector: OutageDetector
    outage_reports: OutageReports
    limiter: ConcurrencyLimiter
    control: Control
    other_workers: OtherWorkers
    cancelled_jobs: CancelledJobs
    topology: Topology
    tenants: Tenants
