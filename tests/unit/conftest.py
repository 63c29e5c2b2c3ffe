from hypothesis import HealthCheck, settings

# On a busy machine examples, and their generation, may be slow: that is not a failure.
# The properties have passed with thousands of examples; here a few detect a regression.
settings.register_profile(
    "unit", max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unit")
