"""The Python client for programs that publish jobs: `Client`, and `AsyncClient` for asyncio."""

from vqa_worker.async_client import AsyncClient, NoSuchQueueError, ReplyLostError
from vqa_worker.client import Client
from vqa_worker.large_results import LargeResultError
from vqa_worker.local_images import Image
from vqa_worker.messages.decoding import InvalidJobError
from vqa_worker.messages.error_codes import ErrorCode
from vqa_worker.messages.job import Job
from vqa_worker.rabbitmq.connection import BrokerRefusedError, BrokerUnreachableError, TopologyError
from vqa_worker.rabbitmq.outgoing import RefusedError, TooLargeError
from vqa_worker.rabbitmq.requests import Replies
from vqa_worker.results import Failure, JobFailedError, Result
from vqa_worker.structured import NoValueError

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "BrokerRefusedError",
    "BrokerUnreachableError",
    "Client",
    "ErrorCode",
    "Failure",
    "Image",
    "InvalidJobError",
    "Job",
    "JobFailedError",
    "LargeResultError",
    "NoSuchQueueError",
    "NoValueError",
    "RefusedError",
    "Replies",
    "ReplyLostError",
    "Result",
    "TooLargeError",
    "TopologyError",
]
