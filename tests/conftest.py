"""Settings for all tests."""

import os

from hypothesis import settings

# The same examples on every machine and in every run; a busy machine is not a failure.
# HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))
