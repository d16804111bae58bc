from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest

from ..passes.conftest import _parse_dotted


@pytest.fixture(scope="session")
def parse_dotted() -> Callable[[str], onnx.ModelProto]:
    """As in tests/passes: ONNX text to a model, `__` standing for a dot."""
    return _parse_dotted
