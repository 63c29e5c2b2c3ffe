"""The settings: one frozen object, checked as a whole before any connection is made.

`model` says what there is, `broker` and `commands` are parts of it for commands that need no more; `values`,
`urls` and `tls` check it, `sources` reads it, `faults` says what is wrong with it; `traces` reads
OpenTelemetry's variables.
"""

import ssl

from worker.settings.broker import BrokerSettings
from worker.settings.commands import CommandSettings
from worker.settings.faults import SettingsError, variable
from worker.settings.model import BROKER_DELIVERY_LIMIT, Price, Settings
from worker.settings.sources import load_broker_settings, load_command_settings, load_settings
from worker.settings.tls import tls_context
from worker.settings.traces import trace_secrets, wants_traces
from worker.settings.values import retry_queue

__all__ = [
    "BROKER_DELIVERY_LIMIT",
    "BrokerSettings",
    "CommandSettings",
    "Price",
    "Settings",
    "SettingsError",
    "broker_ssl_context",
    "load_broker_settings",
    "load_command_settings",
    "load_settings",
    "retry_queue",
    "trace_secrets",
    "variable",
    "wants_traces",
]


def broker_ssl_context(settings: BrokerSettings) -> ssl.SSLContext | None:
    """How to speak TLS with the broker; None where it is not spoken."""
    if not settings.rabbitmq_address.startswith("amqps:"):
        return None
    return tls_context(settings.rabbitmq_ca_file, settings.rabbitmq_cert_file, settings.rabbitmq_key_file)
