"""Values that a graph computes from its inputs' shapes and positions: masks and rotary tables, whatever their spelling.

A mask has many spellings and one meaning. What is asked is therefore not how its nodes stand but what they give, at
lengths that tell a causal mask from a windowed one and from any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

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
        part = ir.from_proto(ir.to_proto(model))
        graph = part.graph
        value = next(output for node in graph for output in node.outputs if output.name == name)
        cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
        graph.append(cast)
        cast.outputs[0].name, cast.outputs[0].type = "evaluated", ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.clear()
        graph.outputs.append(cast.outputs[0])
        common.RemoveUnusedNodesPass()(part)
        for unused in [given for given in graph.inputs if not given.uses()]:
            graph.inputs.remove(unused)
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
