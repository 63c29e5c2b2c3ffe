from hypothesis import HealthCheck, settings

# A busy machine is no failure: neither a slow example nor slow making of examples says anything of the code.
# The properties have been run with thousands of examples; here they only have to notice a change.
settings.register_profile(
    "unit", max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unit")
