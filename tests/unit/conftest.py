from hypothesis import HealthCheck, settings

# A busy machine is not a failure: slow examples, or slow generation of them, say nothing about the code.
# The properties have been run with thousands of examples; here they only have to notice a change.
settings.register_profile(
    "unit", max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unit")
