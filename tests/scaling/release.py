"""The chart, rendered for local services: the configuration of the control loop and the workers."""

from dataclasses import dataclass
from typing import Self

from deploy.local.stack import Stack
from tests.scaling.scaled_object import ScalerConfig
from tests.slow.helm.rendering import decoded, keda, render


@dataclass(frozen=True)
class Release:
    """A release of the chart, scaled by KEDA.

    Attributes:
        scaler: the configuration of its ScaledObject.
        settings: the environment variables of its pods.
        hook: the arguments of the hook that declares the queues.
        user: KEDA's user at the broker.
        password: the password of this user.
    """

    scaler: ScalerConfig
    settings: dict[str, str]
    hook: list[str]
    user: str
    password: str

    @property
    def concurrency(self) -> int:
        """The maximum of concurrent model requests per pod."""
        return int(self.settings["VQA_MAX_CONCURRENCY"])

    @classmethod
    def of(cls, stack: Stack, *, name: str, concurrency: int, provider: int) -> Self:
        """Render a release for a provider's limit of concurrent requests; `name` prefixes the queues."""
        values = {
            "settings": {
                "jobsQueue": f"{name}.jobs",
                "resultsQueue": f"{name}.results",
                "maxConcurrency": concurrency,
                "retryDelays": [1],
                "allowedBuckets": ["*"],
                "s3EndpointUrl": stack.s3.endpoint_url,
                "modelBaseUrl": stack.model.base_url,
                "model": stack.model.models[0],
            },
            "secrets": {"rabbitmqUrl": stack.rabbitmq.url, "modelApiKey": stack.model.api_key},
            "provider": {"maxConcurrentRequests": provider},
            "autoscaling": {"keda": {"host": stack.rabbitmq.management_url}},
        }
        return cls._read(values)

    @classmethod
    def default(cls, *, pods: int) -> Self:
        """Render a release with default values, for a provider whose limit is `pods` pods."""
        concurrency = cls._read({}).concurrency
        return cls._read({"provider": {"maxConcurrentRequests": pods * concurrency}})

    @classmethod
    def _read(cls, changes: dict[str, object]) -> Self:
        rendered = render(keda(changes))
        manifest = rendered.one("ScaledObject")
        (hook,) = rendered.one("Job")["spec"]["template"]["spec"]["containers"]
        login = decoded(rendered.one("Secret", f"{manifest['metadata']['name']}-keda"))
        return cls(
            scaler=ScalerConfig.of(manifest),
            settings={**rendered.settings, **rendered.secrets},
            hook=hook["args"],
            user=login["username"],
            password=login["password"],
        )
