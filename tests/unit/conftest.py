import pytest
from hypothesis import HealthCheck, settings

from worker.images import conversion_pool

# On a busy machine examples, and their generation, may be slow: that is not a failure.
# The properties have passed with thousands of examples; here a few detect a regression.
settings.register_profile(
    "unit", max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def patient_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a conversion take longer than in production: the machine that runs the tests may be slow."""
    monkeypatch.setattr(conversion_pool, "TIMEOUT_S", 100.0)
