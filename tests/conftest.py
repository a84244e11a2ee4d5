"""Settings for every test."""

from hypothesis import HealthCheck, settings

# Machines that run this are shared and slow at times: a test fails for wrong values, never for being late.
settings.register_profile("trainer", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trainer")
