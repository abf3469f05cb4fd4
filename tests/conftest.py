"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run: a test that fails now and then tells nobody anything.
settings.register_profile("pathswitch", deadline=None, derandomize=True)
settings.load_profile("pathswitch")
