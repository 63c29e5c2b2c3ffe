"""The settings of the broker and of what is there: a part of `Settings`, and enough for some commands."""

from typing import Annotated, Any, ClassVar
from urllib.parse import unquote, urlsplit

from pydantic import PrivateAttr, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.settings.faults import PREFIX
from worker.settings.tls import CaFile, KeyFile, TlsFile
from worker.settings.urls import AMQP_PORTS, BrokerUrl
from worker.settings.values import DERIVED, ExchangeName, QueueName, RetryDelays, default

# A password that every RabbitMQ is delivered with is no secret, and "guest" is a word that messages may need.
PUBLIC_PASSWORDS = frozenset({"guest"})


class BrokerSettings(BaseSettings):
    """How to reach the broker, and the names of the queues and exchanges."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        # Lists are comma lists here, not JSON.
        enable_decoding=False,
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        validate_default=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )
    # Lists for which an empty value is an answer: nothing is allowed.
    MAY_BE_EMPTY: ClassVar[tuple[str, ...]] = ()

    rabbitmq_url: BrokerUrl = SecretStr("amqp://guest:guest@localhost:5672/")
    """The broker: `amqp://user:password@host:port/vhost`, or `amqps://` for TLS. Special characters in user
    name, password and vhost are percent-encoded (the vhost `/` is the empty path or `%2F`). `?heartbeat=N`
    sets the seconds between heartbeats (20); a connection that is silent for three times as long is given up.
    A secret."""
    rabbitmq_ca_file: CaFile = None
    """PEM file with the certificates that the broker's certificate is checked against, with `amqps://` only.
    Without it the operating system's are used."""
    rabbitmq_cert_file: TlsFile = None
    """PEM file with the worker's own certificate, for a broker that asks for one; with `amqps://` only, and
    together with `VQA_RABBITMQ_KEY_FILE`."""
    rabbitmq_key_file: KeyFile = None
    """PEM file with the unencrypted private key of `VQA_RABBITMQ_CERT_FILE`."""

    jobs_queue: QueueName = "vqa.jobs"
    """The queue that jobs are taken from. The retry queues are named after it: `<jobs>.retry.<seconds>s`."""
    results_queue: QueueName = "vqa.results"
    """The queue for results of jobs without a (permitted) `reply_to`."""
    dead_letter_queue: Annotated[
        QueueName, default(lambda above: f"{above.get('jobs_queue', 'vqa.jobs')}.dead")
    ] = DERIVED
    """The queue for jobs that a person must look at: attempts used up, or not readable."""
    retry_delays: RetryDelays = (1, 5, 30, 120)
    """Comma list of whole seconds to wait before the second, third, … attempt; the last one repeats. Each
    value is a queue of its own. Take a value away only when its queue is empty."""
    reply_exchange: ExchangeName = ""
    """The exchange that results are published to, with the reply queue's name as routing key: a direct or a
    topic exchange, to which you bind the reply queues (the results queue is bound for you). Direct reply-to
    always goes by the default exchange. See [permissions](permissions.md)."""
    jobs_exchange: ExchangeName = ""
    """The direct exchange that jobs go back to their queues by (retries, jobs given back, dead letters), with
    the queue's name as routing key. With this and `VQA_REPLY_EXCHANGE` the worker's user need not be allowed
    to write to the default exchange, which reaches every queue: see [permissions](permissions.md)."""
    declare_topology: bool = True
    """Whether the worker declares its queues and exchanges at the start. `false`: it only checks that they
    are there, and `vqa-worker topology apply` makes them."""

    _strays: list[str] = PrivateAttr(default_factory=list)

    @field_validator("*", mode="before")
    @classmethod
    def _tidy(cls, value: Any, info: ValidationInfo) -> Any:
        """Without outer blanks (files edited on some systems bring a CR along); nothing left is no value."""
        if not isinstance(value, str):
            return value
        name = info.field_name or ""
        return value.strip() or ("" if name in cls.MAY_BE_EMPTY else cls.model_fields[name].default)

    @property
    def strays(self) -> list[str]:
        """Warnings about variables that look like settings and are none."""
        return self._strays

    @property
    def rabbitmq_address(self) -> str:
        """Where the broker is, without credentials, fit for logs."""
        parts = urlsplit(self.rabbitmq_url.get_secret_value())
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        return f"{parts.scheme}://{host}:{parts.port or AMQP_PORTS[parts.scheme]}{parts.path or '/'}"

    def secret_values(self) -> tuple[str, ...]:
        """Every value that must never be shown: the broker's password, as written and decoded."""
        password = urlsplit(self.rabbitmq_url.get_secret_value()).password or ""
        return secrets(password, unquote(password))


def secrets(*values: str) -> tuple[str, ...]:
    """Those of the values that are there, and are known to few."""
    return tuple(value for value in values if value and value not in PUBLIC_PASSWORDS)
