"""Metrics by tenant: jobs, tokens and cost."""

from collections.abc import Collection, Mapping
from typing import Any, Final

from vqa_worker.messages.result import Usage
from worker.observability import metrics

OTHER: Final = "other"


class Tenants:
    """Counters by tenant, in addition to those by model; disabled without a key.

    Args:
        key: the metadata field that names the tenant (`VQA_TENANT_FROM`).
        names: the tenants to report separately (`VQA_TENANTS`). All others are counted as `other`, so a job
            cannot create time series.
    """

    def __init__(self, key: str | None = None, names: Collection[str] = ()) -> None:
        self._key = key
        self._names = frozenset(names)

    def of(self, metadata: Mapping[str, Any]) -> str | None:
        """Return a job's tenant, a string or an integer in its metadata; None if tenants are disabled."""
        if self._key is None:
            return None
        value = metadata.get(self._key)
        name = str(value) if isinstance(value, str | int) else OTHER
        return name if name in self._names else OTHER

    def ended(self, metadata: Mapping[str, Any], status: str) -> None:
        """Count a completed job."""
        tenant = self.of(metadata)
        if tenant is not None:
            metrics.series(metrics.TENANT_JOBS, tenant, status).inc()

    def billed(self, metadata: Mapping[str, Any], model: str, usage: Usage | None) -> None:
        """Count the tokens and the cost of a model response."""
        tenant = self.of(metadata)
        if tenant is None or usage is None:
            return
        metrics.series(metrics.TENANT_TOKENS, tenant, model, "prompt").inc(usage.prompt_tokens or 0)
        metrics.series(metrics.TENANT_TOKENS, tenant, model, "completion").inc(usage.completion_tokens or 0)
        metrics.series(metrics.TENANT_COST, tenant, model).inc(usage.cost_usd or 0.0)

    def initialize_series(self, models: Collection[str]) -> None:
        """Create every tenant's counters with value 0, as `metrics.initialize_series` does."""
        if self._key is None:
            return
        for tenant in (*self._names, OTHER):
            for status in ("succeeded", "failed"):
                metrics.series(metrics.TENANT_JOBS, tenant, status)
            for model in models:
                metrics.series(metrics.TENANT_COST, tenant, model)
                for kind in ("prompt", "completion"):
                    metrics.series(metrics.TENANT_TOKENS, tenant, model, kind)
