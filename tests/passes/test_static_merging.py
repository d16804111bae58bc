"""Merging as TensorRT gets it: what the portable body computes, with shapes that follow from the inputs' alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from semkv_deploy.methods import Importance
from semkv_deploy.methods.merging import FUNCTION
from semkv_deploy.passes import static_merging
from semkv_deploy.targets.tensorrt.lower import lower_compressor

from ..methods.test_compressors import CAPACITY, example, facts, run

MERGING = Importance(queries="predicted", fit="merge", sinks=2)


ISOLATED = MERGING.model_copy(update={"turns": "isolated", "sinks": 20})


def static(tile: int, method: Importance = MERGING) -> onnx.ModelProto:
    graph = method.compressor(facts())
    others = [function for function in graph.functions if function.name != FUNCTION]
    assert len(others) < len(graph.functions)
    del graph.functions[:]
    graph.functions.extend([*others, static_merging.function_proto(tile)])
    return graph


@pytest.mark.parametrize("tile", [48, 128, 1000], ids=["tiles that do not fit", "one tile", "a larger tile"])
@pytest.mark.parametrize("keep", [0.75, 0.3], ids=["loose", "tight"])
@pytest.mark.parametrize("method", [MERGING, ISOLATED], ids=["together", "isolated"])
def test_it_is_the_portable_body(tile: int, keep: float, method: Importance):
    state = example(method, batch=3)
    target = [int(keep * CAPACITY), int(keep * CAPACITY) - 5, CAPACITY]
    asked = ([], target, [method.recent_slots(slots) for slots in target])
    ours, portable = run(method, state, *asked, static(tile, method)), run(method, state, *asked)
    assert (portable["slot_bias"][0] != 0).any()
    for name, expected in portable.items():
        np.testing.assert_allclose(ours[name], expected, atol=2e-6, err_msg=name)


def test_every_shape_is_static(tmp_path: Path):
    """A shape that nobody knows before the run is what TensorRT refuses; in a loop's body, too."""
    lowered = lower_compressor(
        MERGING.compressor(facts()), tmp_path / "compressor.onnx", batch=2, capacity=CAPACITY, levels=0
    )
    model = onnx.shape_inference.infer_shapes(onnx.load(lowered.path), strict_mode=True, data_prop=True)
    kinds = {node.op_type for node in model.graph.node}
    assert "Loop" in kinds and "Slice" not in kinds
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    for graph in (model.graph, loop.attribute[0].g):
        for value in graph.value_info:
            dims = value.type.tensor_type.shape.dim
            assert all(dim.HasField("dim_value") for dim in dims), value.name
        for node in graph.node:
            assert not any(a.name == "reduction" and a.s != b"none" for a in node.attribute), node.name
