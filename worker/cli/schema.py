"""`vqa-worker schema`: JSON Schemas of the messages and an AsyncAPI document of the worker.

The schemas come from `Job` and `Result`, the AsyncAPI document from these and the topology.
"""

import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import core_schema

from vqa_worker.messages.job import Job
from vqa_worker.messages.result import Result, Usage
from vqa_worker.rabbitmq.outgoing import CONTENT_TYPE, ENQUEUED_HEADER
from worker import __version__
from worker.rabbitmq import messages, properties
from worker.rabbitmq.topology import QueueSpec, Topology
from worker.settings import BrokerSettings

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
ASYNCAPI: Final = "3.0.0"
BINDINGS: Final = "0.3.0"

_TRACE: Final = {
    properties.TRACEPARENT: {"type": "string", "description": "W3C Trace Context."},
    properties.TRACESTATE: {"type": "string", "description": "W3C Trace Context."},
}
_ENQUEUED: Final = {
    ENQUEUED_HEADER: {
        "type": "integer",
        "description": "When the job was published, in Unix milliseconds; set by RabbitMQ's interceptor.",
    }
}


class _Generator(GenerateJsonSchema):
    """Pydantic's generator without titles and without OpenAPI's `discriminator`."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - the library's signature
        return False

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        made = super().tagged_union_schema(schema)
        made.pop("discriminator", None)
        return made


def job_schema(ref_template: str = "#/$defs/{model}") -> dict[str, Any]:
    """Return the JSON Schema of jobs."""
    return _schema(Job, "validation", ref_template)


def result_schema(ref_template: str = "#/$defs/{model}") -> dict[str, Any]:
    """Return the JSON Schema of results. It allows unknown fields and error codes of later versions."""
    schema = _schema(Result, "serialization", ref_template)
    for part in (schema, *schema["$defs"].values()):
        if "properties" in part:
            del part["additionalProperties"]
            part["required"] = list(part["properties"])
    reported = Usage.model_fields.items()
    schema["$defs"]["Usage"]["required"] = [name for name, field in reported if field.exclude_if is None]
    code = schema["$defs"].pop("ErrorCode")
    failure = schema["$defs"]["JobFailure"]["properties"]
    failure["code"] = {"type": "string", "examples": code["enum"], "description": code["description"]}
    return schema


def _schema(model: type[BaseModel], mode: JsonSchemaMode, ref_template: str) -> dict[str, Any]:
    made = model.model_json_schema(mode=mode, ref_template=ref_template, schema_generator=_Generator)
    return {"$schema": DIALECT, **made}


def asyncapi(settings: BrokerSettings) -> dict[str, Any]:
    """Return an AsyncAPI document of the worker with the queue names of the settings."""
    topology = Topology.from_settings(settings)
    return {
        "asyncapi": ASYNCAPI,
        "info": {
            "title": "vqa-worker",
            "version": __version__,
            "description": "Answers questions about images. Jobs and results are RabbitMQ messages.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {"rabbitmq": _server(settings)},
        "channels": _channels(topology, _vhost(settings)),
        "operations": _operations(),
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _server(settings: BrokerSettings) -> dict[str, Any]:
    address = urlsplit(settings.rabbitmq_address)
    return {"host": address.netloc, "protocol": address.scheme, "protocolVersion": "0.9.1"}


def _vhost(settings: BrokerSettings) -> str:
    return unquote(urlsplit(settings.rabbitmq_address).path[1:]) or "/"


def _channels(topology: Topology, vhost: str) -> dict[str, Any]:
    queues = {queue.name: queue for queue in topology.queues()}

    def channel(name: str, message: str, description: str) -> dict[str, Any]:
        return {
            "address": name,
            "description": description,
            "messages": {message: {"$ref": f"#/components/messages/{message}"}},
            "bindings": {"amqp": _queue(queues[name], vhost)},
            "x-queue-arguments": dict(queues[name].arguments),
        }

    return {
        "jobs": channel(topology.jobs, "job", "The jobs queue."),
        "results": channel(
            topology.results, "result", "The results queue, for jobs without an allowed `reply_to`."
        ),
        "replies": {
            "address": None,
            "description": "The queue in the job's `reply_to`, if `VQA_ALLOWED_REPLY_TO` permits it.",
            "messages": {"result": {"$ref": "#/components/messages/result"}},
        },
        "deadLetters": channel(
            topology.dead_letters, "deadLetter", "The dead-letter queue: see `vqa-worker dlq list`."
        ),
        "control": {
            "address": topology.control.name,
            "description": "Messages to all workers; the routing key is ignored.",
            "messages": {"cancellation": {"$ref": "#/components/messages/cancellation"}},
            "bindings": {"amqp": _exchange(topology, vhost)},
        },
    }


def _queue(queue: QueueSpec, vhost: str) -> dict[str, Any]:
    flags = {"durable": True, "exclusive": False, "autoDelete": False}
    return {
        "is": "queue",
        "queue": {"name": queue.name, **flags, "vhost": vhost},
        "bindingVersion": BINDINGS,
    }


def _exchange(topology: Topology, vhost: str) -> dict[str, Any]:
    exchange = topology.control
    flags = {"durable": True, "autoDelete": False}
    return {
        "is": "routingKey",
        "exchange": {"name": exchange.name, "type": exchange.type.value, **flags, "vhost": vhost},
        "bindingVersion": BINDINGS,
    }


def _operations() -> dict[str, Any]:
    def operation(action: str, channel: str, summary: str) -> dict[str, Any]:
        return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "summary": summary}

    reply = {
        "address": {
            "location": "$message.header#/reply_to",
            "description": "The AMQP property `reply_to`.",
        },
        "channel": {"$ref": "#/channels/replies"},
    }
    return {
        "receiveJob": {**operation("receive", "jobs", "Consume a job."), "reply": reply},
        "sendResult": operation("send", "results", "Publish the result of a job."),
        "sendDeadLetter": operation("send", "deadLetters", "Dead-letter a job."),
        "receiveCancellation": operation("receive", "control", "Cancel a job."),
    }


def _messages() -> dict[str, Any]:
    correlation = {
        "location": "$message.header#/correlation_id",
        "description": "The AMQP property `correlation_id`; a result has the job's, or the job's id.",
    }
    died = {
        messages.ERROR_CODE_HEADER: {"type": "string", "description": "The error's code."},
        messages.ERROR_MESSAGE_HEADER: {"type": "string", "description": "The last error."},
        properties.ATTEMPTS_HEADER: {"type": "integer", "description": "The number of counted attempts."},
        properties.DIED_AT_HEADER: {
            "type": "string",
            "format": "date-time",
            "description": "When it was dead-lettered.",
        },
    }
    undeliverable = {
        messages.UNDELIVERABLE_HEADER: {
            "type": "string",
            "description": "The `reply_to` queue that could not take the result; absent otherwise.",
        }
    }
    job = {"payload": {"$ref": "#/components/schemas/Job"}, "correlationId": correlation}
    return {
        "job": {**job, "title": "Job", "headers": _headers({**_TRACE, **_ENQUEUED})},
        "deadLetter": {
            "title": "Dead letter",
            "summary": "The unchanged message, with the error in its headers. It may be an invalid job.",
            "correlationId": correlation,
            "payload": {},
            "headers": _headers({**_TRACE, **_ENQUEUED, **died}),
        },
        "result": {
            "title": "Result",
            "payload": {"$ref": "#/components/schemas/Result"},
            "correlationId": correlation,
            "headers": _headers({**_TRACE, **undeliverable}),
            "bindings": {"amqp": {"messageType": messages.RESULT_TYPE, "bindingVersion": BINDINGS}},
        },
        "cancellation": {"title": "Cancellation", "payload": {"$ref": "#/components/schemas/Cancellation"}},
    }


def _headers(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties)}


def _schemas() -> dict[str, Any]:
    template = "#/components/schemas/{model}"
    cancellation = {
        "type": "object",
        "properties": {"cancel": {"type": "string", "description": "The id of the job to cancel."}},
        "required": ["cancel"],
        "additionalProperties": False,
    }
    schemas = {"Cancellation": cancellation}
    for name, schema in (("Job", job_schema(template)), ("Result", result_schema(template))):
        del schema["$schema"]
        schemas |= schema.pop("$defs")
        schemas[name] = schema
    return schemas


def show(settings: BrokerSettings, what: str | None, *, compact: bool) -> str:
    """Return `job`, `result` or `asyncapi` as JSON, or all of them in one object."""
    objects = {"job": job_schema(), "result": result_schema(), "asyncapi": asyncapi(settings)}
    document = objects[what] if what else objects
    return json.dumps(document, ensure_ascii=False, indent=None if compact else 2)
