"""The Python client for programs that publish jobs."""

from vqa_worker.async_client import (
    BrokerRefusedError,
    BrokerUnreachableError,
    Client,
    ErrorCode,
    Failure,
    InvalidJobError,
    Job,
    NoSuchQueueError,
    RefusedError,
    Replies,
    ReplyLostError,
    Result,
    TooLargeError,
    TopologyError,
)

__all__ = [
    "BrokerRefusedError",
    "BrokerUnreachableError",
    "Client",
    "ErrorCode",
    "Failure",
    "InvalidJobError",
    "Job",
    "NoSuchQueueError",
    "RefusedError",
    "Replies",
    "ReplyLostError",
    "Result",
    "TooLargeError",
    "TopologyError",
]
