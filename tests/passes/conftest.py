from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx.parser
import pytest


def _parse_dotted(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for value in [*model.graph.input, *model.graph.output]:
        value.name = value.name.replace("__", ".")
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("__", ".") for name in names]
    return model


@pytest.fixture(scope="session")
def parse_dotted() -> Callable[[str], onnx.ModelProto]:
    """ONNX text to a model, `__` in a value's name standing for the dot that the text form does not allow."""
    return _parse_dotted
