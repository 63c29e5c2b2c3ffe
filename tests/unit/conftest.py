from hypothesis import HealthCheck, settings

# A busy machine is no failure: neither a slow example nor slow making of examples says anything of the code.
settings.register_profile("unit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unit")
