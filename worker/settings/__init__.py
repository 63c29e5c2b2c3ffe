"""The settings: one frozen object, validated as a whole before the first connection.

`model` declares all settings, `broker` and `commands` the parts that some commands need. `values`, `urls` and
`tls` validate, `sources` reads, `faults` formats error messages, `traces` reads OpenTelemetry's variables.
"""

import ssl

from worker.settings.broker import BrokerSettings
from worker.settings.commands import CommandSettings
from worker.settings.faults import SettingsError, variable
from worker.settings.model import BROKER_DELIVERY_LIMIT, Price, Settings
from worker.settings.sources import (
    load_broker_settings,
    load_command_settings,
    load_settings,
    setting_sources,
)
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
    "setting_sources",
    "trace_secrets",
    "variable",
    "wants_traces",
]


def broker_ssl_context(settings: BrokerSettings) -> ssl.SSLContext | None:
    """Return the TLS context for the broker, or None without TLS."""
    if not settings.rabbitmq_address.startswith("amqps:"):
        return None
    return tls_context(settings.rabbitmq_ca_file, settings.rabbitmq_cert_file, settings.rabbitmq_key_file)
