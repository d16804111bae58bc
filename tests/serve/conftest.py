from __future__ import annotations

from pathlib import Path

import pytest

from .schedulers import Parts


@pytest.fixture(scope="session")
def parts(tiny_bundle: Path) -> Parts:
    """The tiny bundle with what schedulers need of it."""
    return Parts.of(tiny_bundle)
