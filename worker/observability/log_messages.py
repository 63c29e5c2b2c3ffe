"""One sentence in plain English for each log event, made from the record's own fields."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

Fields: TypeAlias = Mapping[str, Any]


def message_of(event: Any, fields: Fields) -> Any:
    """Return the sentence for a record.

    Args:
        event: the name of the event. Anything that is not in `MESSAGES` is returned as it is.
        fields: of the record, as they are logged: redacted and rounded.
    """
    template = MESSAGES.get(event) if isinstance(event, str) else None
    if template is None:
        return event
    try:
        return template(fields) if callable(template) else template.format_map(_Readable(fields))
    except (KeyError, TypeError, ValueError):  # a field is missing or has another type: log the record anyway
        return event.replace("_", " ")


class _Readable(dict[str, Any]):
    """The fields, with lists as comma-separated text."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return "; ".join(map(str, value)) if isinstance(value, list) else value


def _job_finished(fields: Fields) -> str:
    name = f"Job {fields['job_id']}" if fields["job_id"] else "A job without a readable id"
    took = f"in {fields['total_s']:g} s"
    attempts = f"{fields['attempts']} attempt{'s' * (fields['attempts'] != 1)}"
    if fields["outcome"] != "succeeded":
        end = "was dead-lettered" if fields["outcome"] == "dead_lettered" else "failed"
        return f"{name} {end} {took}, {attempts} ({fields['error']}): {fields['reason']}."
    tokens = f", {fields['total_tokens']} tokens" if "total_tokens" in fields else ""
    cost = f", {fields['cost_usd']:.6f} USD" if "cost_usd" in fields else ""
    return f"{name} succeeded {took}, {attempts}{tokens}{cost}."


def _stopped(fields: Fields) -> str:
    if fields["everything_finished"]:
        return "The worker stopped; all jobs in flight finished."
    return "The worker stopped; unfinished jobs were requeued."


def _result_store_write_failed(fields: Fields) -> str:
    reason = fields.get("reason") or "an unexpected exception"
    return f"An answer could not be stored in the result store ({reason}); its result is published anyway."


def _events_suppressed(fields: Fields) -> str:
    reason = f" ({fields['reason']})" if "reason" in fields else ""
    name = f"{fields['suppressed_event']}{reason}"
    return f"{fields['count']} more records of {name} within {fields['window_s']:g} s were not logged."


MESSAGES: Final[Mapping[str, str | Callable[[Fields], str]]] = {
    "cancellation_forbidden": "Jobs cannot be cancelled: RabbitMQ refuses the use of exchange {exchange}"
    " ({reason}). To permit it, {advice}.",
    "cancelled_jobs_unavailable": "Cancellations cannot be read from or written to the result store:"
    " {reason}; next try in {next_try_s:g} s.",
    "configuration_warning": "Check the configuration: {warning}.",
    "consumption_paused": "Consumption is paused, because {dependency} is unavailable: {reason}.",
    "consumption_resumed": "Consumption resumed after {after_s:g} s.",
    "control_exchange_missing": "The exchange {exchange} is missing; cancellations do not arrive until it"
    " exists again.",
    "control_exchange_rebound": "Cancellations arrive again from the exchange {exchange}.",
    "control_message_ignored": "A message on the control exchange was ignored: {reason}.",
    "crashed": "An unexpected exception ended the worker; RabbitMQ redelivers its jobs. Please report it.",
    "events_suppressed": _events_suppressed,
    "grace_period_expired": "Jobs in flight did not finish within {after_s:g} s; they are cancelled and"
    " requeued.",
    "in_flight_job": "Job {job_id} was received {age_s:g} s ago, in stage {stage} for {stage_s:g} s.",
    "in_flight_summary": "{jobs} jobs are in flight; the worker's status is {status}.",
    "internal_error": "Processing job {job_id} raised an unexpected exception. Please report it.",
    "job_cancelled": "A cancellation of job {job_id} was received.",
    "job_finished": _job_finished,
    "job_published_elsewhere": "A redelivered job was only acked: another worker has published its outcome.",
    "job_left_to_broker": "Job {job_id} could not be republished and was returned to RabbitMQ.",
    "job_requeued": "Job {job_id} was requeued without counting an attempt: {reason}.",
    "job_retried": "Job {job_id} failed with a transient error ({reason}); it is retried in {delay_s} s,"
    " attempts so far: {attempts}.",
    "large_result_write_failed": "A large result could not be written to S3: {reason}; next try in"
    " {next_try_s:g} s.",
    "large_results_unavailable": "Large results cannot be written to S3: {reason}.",
    "model_paused": "The model {model} is paused, because it is unavailable: {reason}. Jobs for other models"
    " continue.",
    "model_resumed": "The model {model} is used again after {after_s:g} s.",
    "model_substituted": "{answered_model} answered instead of {model}: the provider forwards requests, or"
    " the name is an alias.",
    "out_of_memory": "The worker is out of memory and exits; RabbitMQ redelivers its jobs.",
    "prefetch_changed": "The prefetch changed from {before} to {allowed}.",
    "publish_failed": "A message to {routing_key} was not published: {reason}; retrying.",
    "publish_recovered": "Publishing to {routing_key} works again.",
    "publish_unconfirmed": "A message to {routing_key} waits: {reason}.",
    "queue_missing": "The queue {queue} does not exist; it is declared again.",
    "rabbitmq_connected": "Connected to RabbitMQ at {node}; consuming {queue} with prefetch {prefetch}.",
    "rabbitmq_connection_lost": "Lost the connection to {node} ({purpose}): {reason}; reconnecting.",
    "rabbitmq_request_lost": "A request to RabbitMQ was lost with its connection.",
    "rabbitmq_shutdown_timeout": "RabbitMQ did not answer during the shutdown: {what}.",
    "rabbitmq_unreachable": "RabbitMQ is unreachable ({purpose}): {reason}; next try in {next_try_s:g} s.",
    "rate_limit_lasts": "For {after_s:g} s the model API has limited the rate of every request for {model}:"
    " {reason}.",
    "result_store_unreachable": "The result store is unreachable: {reason}; retrying.",
    "result_store_write_failed": _result_store_write_failed,
    "settlement_failed": "Settling a job raised an unexpected exception; RabbitMQ moves the job to the"
    " dead-letter queue. Please report it.",
    "started": "vqa-worker {version} started; RabbitMQ: {rabbitmq}; HTTP port: {http_port}.",
    "stopped": _stopped,
    "stopping": "The worker is stopping; jobs in flight have {grace_s:g} s to finish.",
    "topology_check_forbidden": "The worker starts without checking {parts}: {reason}.",
    "topology_mismatch": "The queues or exchanges are not as configured: {faults}.",
    "topology_redeclare_failed": "Missing queues could not be declared again: {reason}; retrying.",
    "trace_export_failed": "The trace collector did not accept the last spans within {after_s:g} s.",
}
