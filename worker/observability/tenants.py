"""Whose jobs they are, as far as the one who runs the worker wants to tell: counts and costs by tenant."""

from collections.abc import Collection, Mapping
from typing import Any, Final

from worker.messages.result import Usage
from worker.observability import metrics

OTHER: Final = "other"


class Tenants:
    """Counts by tenant what is counted by model too; without a key, nothing.

    Args:
        key: the field of a job's metadata that names its tenant (`VQA_TENANT_FROM`).
        names: the tenants that are told apart (`VQA_TENANTS`); all others are one. A job may say what it
            likes: it makes no new time series.
    """

    def __init__(self, key: str | None = None, names: Collection[str] = ()) -> None:
        self._key = key
        self._names = frozenset(names)

    def of(self, metadata: Mapping[str, Any]) -> str | None:
        """A job's tenant, named by text or by a whole number, as ids often are; None where none are told."""
        if self._key is None:
            return None
        value = metadata.get(self._key)
        name = str(value) if isinstance(value, str | int) else OTHER
        return name if name in self._names else OTHER

    def ended(self, metadata: Mapping[str, Any], status: str) -> None:
        """A job came to its end."""
        tenant = self.of(metadata)
        if tenant is not None:
            metrics.series(metrics.TENANT_JOBS, tenant, status).inc()

    def paid(self, metadata: Mapping[str, Any], model: str, usage: Usage | None) -> None:
        """The API answered a call."""
        tenant = self.of(metadata)
        if tenant is None or usage is None:
            return
        metrics.series(metrics.TENANT_TOKENS, tenant, model, "prompt").inc(usage.prompt_tokens)
        metrics.series(metrics.TENANT_TOKENS, tenant, model, "completion").inc(usage.completion_tokens)
        metrics.series(metrics.TENANT_COST, tenant, model).inc(usage.cost_usd or 0.0)

    def initialize_series(self, models: Collection[str]) -> None:
        """Show every tenant's counters as 0 before anything happens, as `metrics.begin_at_zero` does."""
        if self._key is None:
            return
        for tenant in (*self._names, OTHER):
            for status in ("succeeded", "failed"):
                metrics.series(metrics.TENANT_JOBS, tenant, status)
            for model in models:
                metrics.series(metrics.TENANT_COST, tenant, model)
                for kind in ("prompt", "completion"):
                    metrics.series(metrics.TENANT_TOKENS, tenant, model, kind)
