"""Generate the pages that are derived from the code: `python docs/generate.py [--check]`."""
# ruff: noqa: INP001  # a script next to the pages, not a package

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Final
from unittest.mock import patch

import typer.main
from pydantic import BaseModel, SecretStr
from typer.core import TyperCommand, TyperGroup

from deploy.rabbitmq.__main__ import PLACE, STRICT, STRICT_SETTINGS, topology_with
from deploy.rabbitmq.rights import KEDA, OPERATOR, PUBLISHER, WORKER, intake, users
from vqa_worker.messages.error_codes import DESCRIPTIONS, ErrorCode
from vqa_worker.messages.job import Job
from vqa_worker.messages.result import Result
from vqa_worker.rabbitmq.outgoing import CONTENT_TYPE, ENQUEUED_HEADER
from worker.cli.commands import build
from worker.errors import SERVICE_FAILURES
from worker.jobs.cancellation import REMEMBERED
from worker.observability.instruments import Declaration
from worker.observability.metrics import DECLARED
from worker.providers import GENERIC, Profile, Rule, load_profile, provider_names
from worker.providers.profile import Images, RequestFields
from worker.rabbitmq import messages, properties
from worker.rabbitmq.schemas import asyncapi
from worker.rabbitmq.topology import Topology
from worker.settings import Settings, variable

HERE: Final = Path(__file__).parent

# Settings are listed in the order of the class; a section begins at the field that is its key.
SETTINGS_SECTIONS: Final = {
    "rabbitmq_url": "RabbitMQ",
    "max_attempts": "Jobs and retries",
    "s3_endpoint_url": "Images",
    "provider": "Model API",
    "result_store": "Results",
    "tenant_from": "Costs by tenant",
    "http_host": "Process",
}

DEFAULTS_IN_WORDS: Final = {
    "dead_letter_queue": "`<jobs>.dead`",
    "allowed_reply_to": "the results queue, `vqa.results.*`, `amq.rabbitmq.reply-to.*`, `amq.gen-*`",
    "reply_exchange": "the default exchange",
    "jobs_exchange": "the default exchange",
    "s3_endpoint_url": "none: AWS",
    "allowed_buckets": "required",
    "provider": "from the base URL's host",
    "model_api_key": "required",
    "allowed_models": "the value of `VQA_MODEL`",
    "image_processes": "CPUs, 4 at most",
    "max_result_bytes": "the broker's limit",
    "initial_concurrency": "`32`, or `VQA_MAX_CONCURRENCY` if that is less",
    "log_format": "`json` on a pipe, `console` on a terminal",
}

SETTINGS_INTRODUCTION: Final = """\
# Settings

<!-- Generated from worker/settings/ by docs/generate.py: change the source and run `make docs`. -->

Settings are environment variables. Precedence: environment, then a `.env` file in the working directory, then
the folder `VQA_SECRETS_DIR`, which has one file per variable.

- An empty value means "not set", except for `VQA_ALLOWED_REPLY_TO` and `VQA_ALLOWED_LINK_HOSTS`, where it
  means that nothing is allowed.
- Lists are comma-separated; globs support `*`, `?` and `[…]`; sizes are in bytes, times in seconds.
- All settings are validated before the first connection. If any is invalid, the worker exits with code 78 and
  prints one line for each error on stderr.
- Unknown variables that begin with `VQA_` cause a warning at startup.
- S3 credentials and region: the AWS SDK's default chain (variables, files, roles). Proxies and certificates:
  `HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE`.
- Tracing is configured with the standard `OTEL_*` variables, in the environment only: [traces](tracing.md).
"""

COMMANDS_INTRODUCTION: Final = """\
# Commands

<!-- Generated from worker/cli/ by docs/generate.py: change the source and run `make docs`. -->

The help of every command. [Command line](cli.md) describes how to use them.
"""

# Facts of a provider profile, by field.
_FACTS: Final = {
    (Images, "types"): "Image types",
    (Images, "max_bytes"): "Bytes of an image",
    (Images, "max_request_bytes"): "Bytes of a request",
    (Images, "max_count"): "Images in a request",
    (Images, "links"): "Links to images",
    (Images, "detail"): "`detail` of an image",
    (RequestFields, "token_limit"): "Token limit",
    (RequestFields, "system_with_images"): "System message with images",
    (RequestFields, "json_schema"): "JSON schema",
    (RequestFields, "json_object"): "JSON mode",
    (RequestFields, "stream_only_models"): "Models that only stream",
}

# Added by the Prometheus client library, on Linux.
PROCESS_METRICS: Final = {
    "process_cpu_seconds_total": ("counter", "seconds", "CPU time, user and system."),
    "process_resident_memory_bytes": (
        "gauge",
        "bytes",
        "Resident memory, which a container's memory limit applies to.",
    ),
    "process_virtual_memory_bytes": ("gauge", "bytes", "Virtual memory."),
    "process_start_time_seconds": ("gauge", "Unix time", "Start time of the process."),
    "process_open_fds": ("gauge", "files", "Open file descriptors, including connections."),
    "process_max_fds": ("gauge", "files", "Maximum number of open file descriptors."),
    "python_asyncio_tasks": (
        "gauge",
        "tasks",
        "Number of asyncio tasks; a steady increase indicates a leak.",
    ),
    "python_gc_collections_total": (
        "counter",
        "collections",
        "Garbage collections, by generation.",
    ),
    "python_gc_objects_collected_total": ("counter", "objects", "Objects freed."),
    "python_gc_objects_uncollectable_total": ("counter", "objects", "Objects that could not be freed."),
    "python_info": ("gauge", "", "Version of Python in labels; always 1."),
}

# RabbitMQ's metrics that the dashboard and the alerts use, at `/metrics/detailed`.
BROKER_METRICS: Final = {
    "rabbitmq_detailed_queue_messages_ready": "Messages ready for delivery.",
    "rabbitmq_detailed_queue_messages_unacked": "Messages delivered and not yet acknowledged.",
    "rabbitmq_detailed_queue_messages": "Sum of both.",
    "rabbitmq_detailed_queue_consumers": "Consumers: one or a few for each worker that is consuming.",
}

SHORT_JOB: Final = {
    "id": "order-4711-photo",
    "question": "Which fruit is on the table, and how many pieces of it?",
    "images": ["s3://photos/2030/table.jpg"],
    "params": {"max_tokens": 200},
    "deadline": "2030-01-31T12:00:00Z",
    "metadata": {"order": 4711},
}
LONG_JOB: Final = {
    "id": "comparison-17",
    "messages": [
        {"role": "system", "content": "Answer in one sentence."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Before:"},
                {"type": "image_url", "image_url": {"url": "s3://photos/17/before.png"}},
                {"type": "text", "text": "After:"},
                {"type": "image_url", "image_url": {"url": "https://cdn.example/17/after.png"}},
                {"type": "text", "text": "What has changed?"},
            ],
        },
    ],
}
SUCCESS: Final = {
    "id": SHORT_JOB["id"],
    "status": "succeeded",
    "answer": "Three apples.",
    "model": Settings.model_fields["model"].default,
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 1624, "completion_tokens": 5, "total_tokens": 1629, "cost_usd": 0.00057},
    "provider": "deepinfra",
    "answered_model": Settings.model_fields["model"].default,
    "timings": {"queued_s": 0.42, "fetch_s": 0.031, "model_s": 2.18, "total_s": 2.22},
    "metadata": SHORT_JOB["metadata"],
}
FAILURE: Final = {
    "id": SHORT_JOB["id"],
    "status": "failed",
    "model": Settings.model_fields["model"].default,
    "timings": {"queued_s": 0.42, "fetch_s": 0.012, "total_s": 0.013},
    "metadata": SHORT_JOB["metadata"],
    "error": {
        "code": ErrorCode.IMAGE_NOT_FOUND,
        "message": "images[0] (s3://photos/2030/table.jpg): S3 has no such object (NoSuchKey)",
        "retryable": False,
    },
}


def settings_page() -> str:
    """Return the settings reference."""
    return SETTINGS_INTRODUCTION + "".join(_settings_lines())


def _settings_lines() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        if name in SETTINGS_SECTIONS:
            yield f"\n## {SETTINGS_SECTIONS[name]}\n\n| Variable | Default | Meaning |\n|---|---|---|\n"
        yield _row(f"`{variable(name)}`", default_text(name), field.description or "")


def _row(*cells: str) -> str:
    """Return a table row; wrapped text becomes one line."""
    return f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in cells)} |\n"


def default_text(name: str) -> str:
    """Return a setting's default as a user would write it, or in words if it is derived."""
    written = _written(Settings.model_fields[name].default)
    return DEFAULTS_IN_WORDS.get(name) or (f"`{written}`" if written else "none")


def _written(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case SecretStr():
            return value.get_secret_value()
        case tuple():
            return ",".join(map(_written, value))
        case dict() if not value:
            return "{}"
    return str(value)


def default_settings() -> Settings:
    """Return the settings with only the required ones set."""
    # Without the variables of this machine.
    with patch.dict(os.environ, {"VQA_ALLOWED_BUCKETS": "any", "VQA_MODEL_API_KEY": "any"}, clear=True):
        return Settings(_env_file=None)


def commands_page() -> str:
    """Return the reference of commands."""
    app = typer.main.get_command(build(lambda _: 0))
    return COMMANDS_INTRODUCTION + "".join(_help_sections(app, None, "vqa-worker"))


def _help_sections(command: TyperCommand, parent: Any, path: str) -> Iterator[str]:
    """Yield a section with the help of a command, and those of the commands in a group."""
    context = command.make_context(
        path.rpartition(" ")[2], [], parent=parent, resilient_parsing=True, terminal_width=80
    )
    yield f"\n## {path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    if isinstance(command, TyperGroup):
        for name in command.list_commands(context):
            yield from _help_sections(command.commands[name], context, f"{path} {name}")


def messages_page() -> str:
    """Return the reference of jobs, results and queues."""
    settings = default_settings()
    template = (HERE / "templates" / "messages.md").read_text(encoding="utf-8")
    return Template(template).substitute(
        jobs_queue=settings.jobs_queue,
        results_queue=settings.results_queue,
        dead_letter_queue=settings.dead_letter_queue,
        job_fields=_fields_table(Job),
        short_job=_example(Job, SHORT_JOB),
        long_job=_example(Job, LONG_JOB),
        result_fields=_fields_table(Result),
        success=_example(Result, SUCCESS),
        failure=_example(Result, FAILURE),
        error_codes=_table(("Code", "When"), ((f"`{code}`", DESCRIPTIONS[code]) for code in ErrorCode)),
        queues=_queues_table(Topology.from_settings(settings)),
        control_exchange=Topology.from_settings(settings).control.name,
        cancellation=json.dumps({"cancel": SHORT_JOB["id"]}),
        remembered=f"{REMEMBERED:,}",
        content_type=CONTENT_TYPE,
        result_type=messages.RESULT_TYPE,
        app_id=messages.APP_ID,
        undeliverable_header=messages.UNDELIVERABLE_HEADER,
        error_code_header=messages.ERROR_CODE_HEADER,
        error_message_header=messages.ERROR_MESSAGE_HEADER,
        attempts_header=properties.ATTEMPTS_HEADER,
        died_at_header=properties.DIED_AT_HEADER,
        expires_at_header=properties.EXPIRES_AT_HEADER,
        enqueued_header=ENQUEUED_HEADER,
        traceparent=properties.TRACEPARENT,
        tracestate=properties.TRACESTATE,
    )


def metrics_page() -> str:
    """Return the reference of metrics."""
    template = (HERE / "templates" / "metrics.md").read_text(encoding="utf-8")
    bad, neutral = SERVICE_FAILURES, set(ErrorCode) - SERVICE_FAILURES
    kinds = "Metric", "Type", "Unit", "Meaning"
    return Template(template).substitute(
        worker=_table(kinds, map(_metric_row, DECLARED.values())),
        buckets="\n".join(map(_buckets_line, (it for it in DECLARED.values() if it.buckets))),
        process=_table(kinds, ((f"`{name}`", *about) for name, about in PROCESS_METRICS.items())),
        broker=_table(("Metric", "Meaning"), ((f"`{name}`", it) for name, it in BROKER_METRICS.items())),
        bad=" or ".join(f"`{code}`" for code in sorted(bad)),
        neutral=", ".join(f"`{code}`" for code in sorted(neutral)),
    )


def _metric_row(metric: Declaration) -> tuple[str, str, str, str]:
    labels = "".join(f"<br>`{label.name}`: {label.values}" for label in metric.labels)
    return f"`{metric.name}`", metric.kind, metric.unit, f"{metric.meaning}{labels}"


def _buckets_line(metric: Declaration) -> str:
    return f"- `{metric.name}`: {', '.join(f'{bound:.10g}' for bound in metric.buckets)}"


def asyncapi_document() -> str:
    """Return the AsyncAPI document for default settings."""
    return json.dumps(asyncapi(default_settings()), indent=2, ensure_ascii=False) + "\n"


def _example(model: type[BaseModel], example: Mapping[str, Any]) -> str:
    """Return a validated example as JSON; a result with all its fields."""
    valid = model.model_validate_json(json.dumps(example))
    shown = valid.model_dump(mode="json") if model is Result else example
    return json.dumps(shown, indent=2, ensure_ascii=False)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join((_row(*heads), f"|{'---|' * len(heads)}\n", *(_row(*row) for row in rows))).rstrip()


def _fields_table(model: type[BaseModel]) -> str:
    return _table(("Field", "Type", "Meaning"), _field_rows(model.model_json_schema(), "#", ""))


def _field_rows(schema: Mapping[str, Any], ref: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield a row for each field of a model, followed by the fields of a nested object."""
    for name, field in _resolve(schema, ref)["properties"].items():
        inner = next((kind["$ref"] for kind in _kinds(field) if "$ref" in kind), "")
        held = _resolve(schema, inner) if inner else {}
        meaning = field.get("description") or held.get("description", "")
        yield f"`{prefix}{name}`", _type_in_words(schema, field), meaning
        if "properties" in held:
            yield from _field_rows(schema, inner, f"{prefix}{name}.")


def _resolve(schema: Mapping[str, Any], ref: str) -> Mapping[str, Any]:
    return schema if ref == "#" else schema["$defs"][ref.rsplit("/", 1)[1]]  # type: ignore[no-any-return]  # JSON


def _kinds(field: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return field.get("anyOf", [field])


def _type_in_words(schema: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    """Return a field's type in words, without null."""
    words = []
    for kind in _kinds(field):
        found = _resolve(schema, kind["$ref"]) if "$ref" in kind else kind
        if "enum" in found and "$ref" not in kind:
            words.append(" or ".join(f"`{value}`" for value in found["enum"]))
        elif "type" not in found:
            words.append("any JSON value")
        elif found["type"] == "array":
            words.append(f"list of {_type_in_words(schema, found['items']).replace(' or ', 's or ')}s")
        elif found.get("format") == "date-time":
            words.append("string (time)")
        elif found["type"] != "null":
            words.append(found["type"])
    return " or ".join(words)


def permissions_page() -> str:
    """Return the page about users and permissions."""
    plain, strict = topology_with({}), topology_with(STRICT)
    template = (HERE / "templates" / "permissions.md").read_text(encoding="utf-8")
    return Template(template).substitute(
        user_rows="\n".join(_row(f"`{user.name}`", user.purpose).rstrip() for user in users(plain)),
        all_users=" ".join(user.name for user in users(plain)),
        worker=WORKER,
        publisher=PUBLISHER,
        keda=KEDA,
        operator=OPERATOR,
        vhost=PLACE.vhost,
        cluster=PLACE.cluster,
        strict_settings="\n".join(f"{name}={value}" for name, value in STRICT_SETTINGS.items()),
        reply_exchange=strict.reply_exchange,
        results_queue=strict.results,
        results_pattern=re.escape(strict.results),
        intake=intake(strict),
        plain_rights=_rights_table(plain),
        strict_rights=_rights_table(strict),
    )


def _rights_table(topology: Topology) -> str:
    return _table(("User", "Permission", "Names", "Purpose"), _rights_rows(topology))


def _rights_rows(topology: Topology) -> Iterator[tuple[str, str, str, str]]:
    for user in users(topology):
        named = {"configure": user.configure, "write": user.write, "read": user.read}
        for topic in user.topics:
            named |= {
                f"topic {topic.exchange}: write": topic.write,
                f"topic {topic.exchange}: read": topic.read,
            }
        if user.tags:
            yield f"`{user.name}`", "tag", f"`{', '.join(user.tags)}`", user.purpose
        for right, grants in named.items():
            if not grants:
                yield f"`{user.name}`", right, "none", ""
            for grant in grants:
                yield f"`{user.name}`", right, f"`{grant.pattern}`", grant.why


def _queues_table(topology: Topology) -> str:
    rows = (
        (
            f"`{queue.name}`",
            ", ".join(f"`{name}: {json.dumps(value)}`" for name, value in queue.arguments.items()),
        )
        for queue in topology.queues()
    )
    return _table(("Queue", "Arguments"), rows)


def providers_page() -> str:
    """Return the page about provider profiles."""
    template = (HERE / "templates" / "providers.md").read_text(encoding="utf-8")
    profiles = [load_profile(name) for name in provider_names() if name != GENERIC]
    generic = load_profile(GENERIC)
    return Template(template).substitute(
        profiles=_table(("`VQA_PROVIDER`", "API", "Hosts"), map(_profile_row, [generic, *profiles])),
        providers="\n\n".join(_provider_section(profile, generic) for profile in profiles),
        generic_rules="\n".join(map(_rule_line, generic.rules)),
        headers=", ".join(f"`{name}`" for name in generic.retry.headers),
        fields=", ".join(f"`{name}`" for name in generic.retry.body),
    )


def _profile_row(profile: Profile) -> tuple[str, str, str]:
    hosts = ", ".join(f"`{host}`" for host in profile.hosts) or "none: set `VQA_PROVIDER`"
    return f"`{profile.name}`", profile.title, "all others" if profile.name == GENERIC else hosts


def _provider_section(profile: Profile, generic: Profile) -> str:
    own = profile.rules[: len(profile.rules) - len(generic.rules)]
    rules = ("Its own rules:", "\n".join(map(_rule_line, own))) if own else ()
    return "\n\n".join(
        (
            f"## {profile.title}",
            _table(("Profile", f"`{profile.name}`"), _profile_facts(profile)),
            *rules,
            f"Sources: {', '.join(f'<{source}>' for source in profile.sources)}.",
            f"Not verified: {profile.unverified}",
        )
    )


def _profile_facts(profile: Profile) -> Iterator[tuple[str, str]]:
    yield "Base URL", f"`{profile.base_url}`"
    if profile.key_header != "authorization":
        yield "Header of the API key", f"`{profile.key_header}`"
    for part in (profile.images, profile.request):
        for name in type(part).model_fields:
            value = getattr(part, name)
            if value not in (None, ()):
                yield _FACTS[type(part), name], _fact_in_words(value)
    for name, tier in profile.tiers.items():
        yield f"Tier `{name}`", f"may wait {tier.timeout_s:g} s"


def _fact_in_words(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case tuple():
            return ", ".join(f"`{item}`" for item in value)
    return f"`{value}`" if "_" in value else str(value)


def _rule_line(rule: Rule) -> str:
    """Return an item of a list; a table could not contain the `|` of patterns."""
    conditions = [", ".join(map(str, rule.status)) or "any status"]
    if rule.code:
        conditions.append(f"code `{rule.code}`")
    if rule.names_model:
        conditions.append("the name of the model")
    if rule.words:
        conditions.append(f"words {', '.join(f'`{pattern}`' for pattern in rule.words)}")
    advice = f": {rule.advice}" if rule.advice else ""
    notes = [note for note in ("likely", "isolated") if getattr(rule, note)]
    category = f"**{rule.category}**{f' ({notes[0]})' if notes else ''}"
    return f"- {'; '.join(conditions)} → {category}{advice}"


PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "commands.md": commands_page,
    "settings.md": settings_page,
    "messages.md": messages_page,
    "permissions.md": permissions_page,
    "metrics.md": metrics_page,
    "providers.md": providers_page,
    "asyncapi.json": asyncapi_document,
}


def outdated(folder: Path) -> list[str]:
    """Return the pages that are missing from a folder or out of date."""
    return [name for name, page in PAGES.items() if _read(folder / name) != page()]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main(arguments: list[str] | None = None, folder: Path = HERE) -> int:
    """Write the pages, or with `--check` only compare them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    names = outdated(folder)
    if parser.parse_args(arguments).check:
        sys.stderr.writelines(f"docs/{name} is out of date: run docs/generate.py\n" for name in names)
        return 1 if names else 0
    for name in names:
        (folder / name).write_text(PAGES[name](), encoding="utf-8")
        sys.stdout.write(f"wrote docs/{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
