"""The settings for RabbitMQ: a part of `Settings`, and sufficient for some commands."""

from typing import Annotated, Any, ClassVar
from urllib.parse import unquote, urlsplit

from pydantic import PrivateAttr, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.settings.faults import PREFIX
from worker.settings.tls import CaFile, KeyFile, TlsFile
from worker.settings.urls import AMQP_PORTS, BrokerUrl, split_broker_urls
from worker.settings.values import DERIVED, ExchangeName, QueueName, RetryDelays, default

# RabbitMQ's default password is not a secret, and redacting "guest" would make messages unreadable.
PUBLIC_PASSWORDS = frozenset({"guest"})


class BrokerSettings(BaseSettings):
    """Connection to RabbitMQ, and the names of queues and exchanges."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        # Lists are comma-separated here, not JSON.
        enable_decoding=False,
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        validate_default=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )
    # Lists for which an empty value means "nothing is allowed".
    MAY_BE_EMPTY: ClassVar[tuple[str, ...]] = ()

    rabbitmq_url: BrokerUrl = SecretStr("amqp://guest:guest@localhost:5672/")
    """`amqp://user:password@host:port/vhost`, or `amqps://` for TLS. Percent-encode special characters in
    user name, password and vhost (the vhost `/` is the empty path or `%2F`). `?heartbeat=N` sets the
    heartbeat interval in seconds (20); a connection without traffic for three intervals is closed. For a
    cluster, a comma-separated list with a whole URL for each node, all with the same scheme and vhost: each
    connection picks one at random and tries the next one if it fails. Secret."""
    rabbitmq_ca_file: CaFile = None
    """PEM file with the CA certificates for RabbitMQ's certificate, only with `amqps://`. Default: the
    operating system's."""
    rabbitmq_cert_file: TlsFile = None
    """PEM file with the worker's client certificate, if RabbitMQ requires one; only with `amqps://` and
    together with `VQA_RABBITMQ_KEY_FILE`."""
    rabbitmq_key_file: KeyFile = None
    """PEM file with the unencrypted private key of `VQA_RABBITMQ_CERT_FILE`."""

    jobs_queue: QueueName = "vqa.jobs"
    """Queue with the jobs. Retry queues are named after it: `<jobs>.retry.<seconds>s`."""
    results_queue: QueueName = "vqa.results"
    """Queue for results of jobs without an allowed `reply_to`."""
    dead_letter_queue: Annotated[
        QueueName, default(lambda above: f"{above.get('jobs_queue', 'vqa.jobs')}.dead")
    ] = DERIVED
    """Dead-letter queue: jobs that used up their attempts, and messages that are not readable."""
    retry_delays: RetryDelays = (1, 5, 30, 120)
    """Comma-separated delays in whole seconds before the second, third, … attempt; the last one repeats. Each
    value has its own queue. Remove a value only when its queue is empty."""
    reply_exchange: ExchangeName = ""
    """Exchange that results are published to; the routing key is the name of the reply queue. A direct or
    topic exchange to which you bind the reply queues (the worker binds the results queue). Direct reply-to
    always uses the default exchange. See [permissions](permissions.md)."""
    jobs_exchange: ExchangeName = ""
    """Direct exchange used to republish jobs (retries, requeues, dead letters); the routing key is the queue
    name. With this and `VQA_REPLY_EXCHANGE` the worker needs no write permission on the default exchange,
    which reaches every queue: see [permissions](permissions.md)."""
    declare_topology: bool = True
    """Whether the worker declares its queues and exchanges at startup. `false`: it only verifies that they
    exist; create them with `vqa-worker topology apply`."""

    _unknown_variables: list[str] = PrivateAttr(default_factory=list)

    @field_validator("*", mode="before")
    @classmethod
    def _tidy(cls, value: Any, info: ValidationInfo) -> Any:
        """Strip whitespace (such as the CR of files from other systems); an empty value means not set."""
        if not isinstance(value, str):
            return value
        name = info.field_name or ""
        return value.strip() or ("" if name in cls.MAY_BE_EMPTY else cls.model_fields[name].default)

    @property
    def unknown_variables(self) -> list[str]:
        """Return warnings about variables with the settings' prefix that are not settings."""
        return self._unknown_variables

    @property
    def rabbitmq_address(self) -> str:
        """Return the broker's address without credentials; with several, a sorted comma-separated list."""
        return ",".join(sorted(map(_without_credentials, self._rabbitmq_urls)))

    def secret_values(self) -> tuple[str, ...]:
        """Return every secret value: the broker's passwords, encoded and decoded."""
        passwords = [urlsplit(url).password or "" for url in self._rabbitmq_urls]
        return secrets(*passwords, *map(unquote, passwords))

    @property
    def _rabbitmq_urls(self) -> list[str]:
        return split_broker_urls(self.rabbitmq_url.get_secret_value())


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}:{parts.port or AMQP_PORTS[parts.scheme]}{parts.path or '/'}"


def secrets(*values: str) -> tuple[str, ...]:
    """Return the values that are set and not public."""
    return tuple(value for value in values if value and value not in PUBLIC_PASSWORDS)
