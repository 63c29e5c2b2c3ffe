"""JSON Schemas of the messages and an AsyncAPI document of the worker.

The schemas come from `Job` and `Result`, the AsyncAPI document from these and the topology.
"""

from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import core_schema

from vqa_worker.messages.job import Job
from vqa_worker.messages.result import Result, Usage
from vqa_worker.rabbitmq.addresses import split_urls, virtual_host
from vqa_worker.rabbitmq.outgoing import CONTENT_TYPE, ENQUEUED_HEADER
from worker import __version__
from worker.rabbitmq import messages, properties
from worker.rabbitmq.topology import Topology
from worker.settings import BrokerSettings

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
ASYNCAPI: Final = "3.0.0"
BINDINGS: Final = "0.3.0"


def _header(name: str, description: str, kind: str = "string", **more: str) -> dict[str, Any]:
    return {name: {"type": kind, **more, "description": description}}


_TRACE: Final = {
    **_header(properties.TRACEPARENT, "W3C Trace Context."),
    **_header(properties.TRACESTATE, "W3C Trace Context."),
}
_ENQUEUED: Final = _header(
    ENQUEUED_HEADER,
    "When the job was published, in Unix milliseconds; set by RabbitMQ's interceptor.",
    "integer",
)


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
    urls = split_urls(settings.rabbitmq_address)
    return {
        "asyncapi": ASYNCAPI,
        "info": {
            "title": "vqa-worker",
            "version": __version__,
            "description": "Answers questions about images. Jobs and results are RabbitMQ messages.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {
            f"rabbitmq-{nth}" if nth > 1 else "rabbitmq": {
                "host": address.netloc,
                "protocol": address.scheme,
                "protocolVersion": "0.9.1",
            }
            for nth, address in enumerate(map(urlsplit, urls), start=1)
        },
        "channels": _channels(Topology.from_settings(settings), virtual_host(urls[0])),
        "operations": _operations(),
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _channels(topology: Topology, vhost: str) -> dict[str, Any]:
    queues = {queue.name: queue for queue in topology.queues()}

    def channel(name: str | None, message: str, description: str) -> dict[str, Any]:
        ref = {message: {"$ref": f"#/components/messages/{message}"}}
        return {"address": name, "description": description, "messages": ref}

    def queue(name: str, message: str, description: str) -> dict[str, Any]:
        about = {"name": name, "durable": True, "exclusive": False, "autoDelete": False, "vhost": vhost}
        return {
            **channel(name, message, description),
            "bindings": {"amqp": {"is": "queue", "queue": about, "bindingVersion": BINDINGS}},
            "x-queue-arguments": dict(queues[name].arguments),
        }

    control = {
        "name": topology.control.name,
        "type": topology.control.type.value,
        "durable": True,
        "autoDelete": False,
        "vhost": vhost,
    }
    return {
        "jobs": queue(topology.jobs, "job", "The jobs queue."),
        "results": queue(
            topology.results, "result", "The results queue, for jobs without an allowed `reply_to`."
        ),
        "replies": channel(
            None, "result", "The queue in the job's `reply_to`, if `VQA_ALLOWED_REPLY_TO` permits it."
        ),
        "deadLetters": queue(
            topology.dead_letters, "deadLetter", "The dead-letter queue: see `vqa-worker dlq list`."
        ),
        "control": {
            **channel(
                topology.control.name,
                "cancellation",
                "Messages to all workers; the routing key is ignored.",
            ),
            "bindings": {"amqp": {"is": "routingKey", "exchange": control, "bindingVersion": BINDINGS}},
        },
    }


def _operations() -> dict[str, Any]:
    def operation(action: str, channel: str, summary: str) -> dict[str, Any]:
        return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "summary": summary}

    address = {
        "location": "$message.header#/reply_to",
        "description": "The AMQP property `reply_to`.",
    }
    reply = {"address": address, "channel": {"$ref": "#/channels/replies"}}
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
        **_header(messages.ERROR_CODE_HEADER, "The error's code."),
        **_header(messages.ERROR_MESSAGE_HEADER, "The last error."),
        **_header(properties.ATTEMPTS_HEADER, "The number of counted attempts.", "integer"),
        **_header(properties.DIED_AT_HEADER, "When it was dead-lettered.", "string", format="date-time"),
    }
    undeliverable = _header(
        messages.UNDELIVERABLE_HEADER,
        "The `reply_to` queue that could not take the result; absent otherwise.",
    )
    return {
        "job": {
            "payload": {"$ref": "#/components/schemas/Job"},
            "correlationId": correlation,
            "title": "Job",
            "headers": {"type": "object", "properties": {**_TRACE, **_ENQUEUED}},
        },
        "deadLetter": {
            "title": "Dead letter",
            "summary": "The unchanged message, with the error in its headers. It may be an invalid job.",
            "correlationId": correlation,
            "payload": {},
            "headers": {"type": "object", "properties": {**_TRACE, **_ENQUEUED, **died}},
        },
        "result": {
            "title": "Result",
            "payload": {"$ref": "#/components/schemas/Result"},
            "correlationId": correlation,
            "headers": {"type": "object", "properties": {**_TRACE, **undeliverable}},
            "bindings": {"amqp": {"messageType": messages.RESULT_TYPE, "bindingVersion": BINDINGS}},
        },
        "cancellation": {"title": "Cancellation", "payload": {"$ref": "#/components/schemas/Cancellation"}},
    }


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {
        "Cancellation": {
            "type": "object",
            "properties": {"cancel": {"type": "string", "description": "The id of the job to cancel."}},
            "required": ["cancel"],
            "additionalProperties": False,
        }
    }
    template = "#/components/schemas/{model}"
    for name, schema in (("Job", job_schema(template)), ("Result", result_schema(template))):
        del schema["$schema"]
        schemas |= schema.pop("$defs")
        schemas[name] = schema
    return schemas
