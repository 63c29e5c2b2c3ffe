"""Parse a ScaledObject; reject fields that the control loop does not support."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel)


class Policy(_Strict):
    """The maximum change in a period, in pods or percent."""

    type: Literal["Pods", "Percent"]
    value: int
    period_seconds: float


class Rules(_Strict):
    """One direction of `behavior`, with the Kubernetes defaults for scaling up."""

    # defaults.go of autoscaling/v2: defaultHPAScaleUpRules.
    stabilization_window_seconds: float = 0
    select_policy: Literal["Max", "Min", "Disabled"] = "Max"
    policies: tuple[Policy, ...] = (
        Policy(type="Pods", value=4, periodSeconds=15),
        Policy(type="Percent", value=100, periodSeconds=15),
    )

    def sped_up(self, factor: float) -> Self:
        """Return the rules with all durations divided by the factor."""
        policies = [
            it.model_copy(update={"period_seconds": it.period_seconds / factor}) for it in self.policies
        ]
        window_s = self.stabilization_window_seconds / factor
        return self.model_copy(update={"stabilization_window_seconds": window_s, "policies": tuple(policies)})


class DownRules(Rules):
    """The same for scaling down."""

    # defaultHPAScaleDownRules; the window is kube-controller-manager's
    # --horizontal-pod-autoscaler-downscale-stabilization.
    stabilization_window_seconds: float = 300
    policies: tuple[Policy, ...] = (Policy(type="Percent", value=100, periodSeconds=15),)


class _Behavior(_Strict):
    scale_up: Rules = Rules()
    scale_down: DownRules = DownRules()


class _HpaConfig(_Strict):
    name: str = ""
    behavior: _Behavior = _Behavior()


class _Advanced(_Strict):
    horizontal_pod_autoscaler_config: _HpaConfig = _HpaConfig()
    restore_to_original_replica_count: bool = False


def _as_text(value: object) -> object:
    """Reject values other than strings: the CRD defines the metadata as a map of strings."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")  # noqa: TRY004 - pydantic reports ValueErrors
    return value


_Number = Annotated[float, BeforeValidator(_as_text)]


class _Metadata(_Strict):
    """Fields of KEDA's rabbitmq scaler (rabbitmq_scaler.go)."""

    host: str
    protocol: Literal["http"]
    mode: Literal["QueueLength"]
    queue_name: str
    vhost_name: str = "/"
    value: _Number
    activation_value: _Number = 0
    exclude_unacknowledged: Literal["false"] = "false"
    use_regex: Literal["false"] = "false"


class _Trigger(_Strict):
    type: Literal["rabbitmq"]
    name: str = ""
    metric_type: Literal["AverageValue"] = "AverageValue"
    # With cached metrics the HPA would get the queue depth of KEDA's last poll.
    use_cached_metrics: Literal[False] = False
    metadata: _Metadata
    authentication_ref: Mapping[str, str] = Field(default_factory=dict)


class _Spec(_Strict):
    scale_target_ref: Mapping[str, str]
    # The defaults in scaledobject_types.go and scale_executor.go.
    polling_interval: float = 30
    cooldown_period: float = 300
    min_replica_count: int = 0
    max_replica_count: int = 100
    # Used only while the broker is unreachable, which the control loop does not cover.
    fallback: Mapping[str, Any] | None = None
    advanced: _Advanced = _Advanced()
    triggers: tuple[_Trigger]


@dataclass(frozen=True)
class ScalerConfig:
    """The configuration of KEDA and the HPA; times in seconds.

    Attributes:
        value: ready and unacknowledged messages per pod.
        activation: with more messages KEDA starts the first pod.
        sync_s: --horizontal-pod-autoscaler-sync-period of kube-controller-manager, 15 s.
    """

    host: str
    vhost: str
    queue: str
    value: float
    activation: float
    minimum: int
    maximum: int
    polling_s: float
    cooldown_s: float
    up: Rules
    down: Rules
    sync_s: float = 15.0

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Self:
        """Parse a manifest.

        Raises:
            pydantic.ValidationError: The control loop does not support a field or value.
        """
        spec = _Spec.model_validate(manifest["spec"])
        (trigger,) = spec.triggers
        behavior = spec.advanced.horizontal_pod_autoscaler_config.behavior
        return cls(
            host=trigger.metadata.host,
            vhost=trigger.metadata.vhost_name,
            queue=trigger.metadata.queue_name,
            value=trigger.metadata.value,
            activation=trigger.metadata.activation_value,
            minimum=spec.min_replica_count,
            maximum=spec.max_replica_count,
            polling_s=spec.polling_interval,
            cooldown_s=spec.cooldown_period,
            up=behavior.scale_up,
            down=behavior.scale_down,
        )

    def sped_up(self, factor: float) -> Self:
        """Return the configuration with all durations divided by the factor."""
        return replace(
            self,
            polling_s=self.polling_s / factor,
            cooldown_s=self.cooldown_s / factor,
            up=self.up.sped_up(factor),
            down=self.down.sped_up(factor),
            sync_s=self.sync_s / factor,
        )
