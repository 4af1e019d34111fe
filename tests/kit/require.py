"""What a test needs that may not be there: skipped with a clear line, or a failure where everything is required."""

import os
from typing import NoReturn

import pytest


def unavailable(what: str, why: str) -> NoReturn:
    """Skip; with HEADWATER_REQUIRE_ALL=1 fail."""
    message = f"{what} is not available: {why}"
    if os.environ.get("HEADWATER_REQUIRE_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)
