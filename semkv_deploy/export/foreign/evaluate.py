"""Values that a graph computes from its inputs' shapes and positions: masks and rotary tables, whatever their spelling.

A mask has many spellings and one meaning. What is asked is therefore not how its nodes stand but what they give, at
lengths that tell a causal mask from a windowed one and from any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Evaluator:
    """Computes one value of a graph, as float32, from the graph's inputs.

    Args:
        model: a graph, which stays as it is.
        name: of the value.

    Raises:
        SemkvError: where ONNX Runtime does not run what makes it.
    """

    def __init__(self, model: ir.Model, name: str) -> None:
        import onnxruntime

        self._name = name
        graph = ir.convenience.extract(model.graph, list(model.graph.inputs), [name])
        part = ir.Model(graph, ir_version=model.ir_version)
        (value,) = graph.outputs
        cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
        graph.append(cast)
        cast.outputs[0].name, cast.outputs[0].type = "evaluated", ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.clear()
        graph.outputs.append(cast.outputs[0])
        for unused in [given for given in graph.inputs if not given.uses()]:
            graph.inputs.remove(unused)
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):  # a part is a model without a place on disk
                value.const_value = ir.Tensor(tensor.numpy(), name=value.name)
        self.inputs = {str(given.name): given for given in graph.inputs}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(
                ir.to_proto(part).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise self._failed(error) from None

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The value; inputs that it does not depend on may be among the feeds."""
        needed = {name: array for name, array in feeds.items() if name in self.inputs}
        try:
            (result,) = self._session.run(None, needed)
        except Exception as error:
            raise self._failed(error) from None
        return np.asarray(result, np.float32)

    def _failed(self, error: Exception) -> SemkvError:
        return SemkvError("cannot be computed alone", where=self._name, got=" ".join(str(error).split())[:200])
