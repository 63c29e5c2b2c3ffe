"""The chart, rendered for this machine's services: the control loop and the workers go by what it says."""

from dataclasses import dataclass
from typing import Self

from deploy.local.stack import Stack
from tests.scaling.scaled_object import Numbers
from tests.slow.helm.rendering import decoded, keda, render


@dataclass(frozen=True)
class Release:
    """A release of the chart, scaled by KEDA.

    Attributes:
        numbers: of its ScaledObject.
        settings: of its pods.
        hook: the arguments of its hook, which makes the queues before there is any pod.
        user: as whom KEDA asks the broker; and `password`.
    """

    numbers: Numbers
    settings: dict[str, str]
    hook: list[str]
    user: str
    password: str

    @property
    def concurrency(self) -> int:
        """Calls that one pod makes at once, at most."""
        return int(self.settings["VQA_MAX_CONCURRENCY"])

    @classmethod
    def of(cls, stack: Stack, *, name: str, concurrency: int, provider: int) -> Self:
        """One for a provider that takes so many calls at once; `name` begins the queues' names."""
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
    def usual(cls, *, pods: int) -> Self:
        """With the chart's own values, for a provider that can do with so many pods."""
        concurrency = cls._read({}).concurrency
        return cls._read({"provider": {"maxConcurrentRequests": pods * concurrency}})

    @classmethod
    def _read(cls, changes: dict[str, object]) -> Self:
        rendered = render(keda(changes))
        manifest = rendered.one("ScaledObject")
        (hook,) = rendered.one("Job")["spec"]["template"]["spec"]["containers"]
        login = decoded(rendered.one("Secret", f"{manifest['metadata']['name']}-keda"))
        return cls(
            numbers=Numbers.of(manifest),
            settings={**rendered.settings, **rendered.secrets},
            hook=hook["args"],
            user=login["username"],
            password=login["password"],
        )
