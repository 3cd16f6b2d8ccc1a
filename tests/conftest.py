"""Settings that hold for every test."""

import faulthandler
import signal

from hypothesis import HealthCheck, settings

faulthandler.register(signal.SIGUSR1)
settings.register_profile(
    "ci",
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ci")
