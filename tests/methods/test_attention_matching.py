"""What a fit is good for, and what it is next to a solver of linear equations. (Its graph: test_compressors.py.)"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from semkv_deploy.methods import Importance
from semkv_deploy.methods.attention_matching import RIDGE, STEPS, _least_squares, fit_slots
from semkv_deploy.methods.record_attention import record_attention
from semkv_deploy.methods.slot_attention import Look

HEADS, SLOTS, KEPT, DIM, QUERIES = 2, 96, 24, 16, 64


def cache(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A cache of one row with queries, and its last slots alone."""
    random = torch.Generator().manual_seed(seed)
    before = {
        "key_cache": torch.randn(1, HEADS, SLOTS, DIM, generator=random),
        "value_cache": torch.randn(1, HEADS, SLOTS, DIM, generator=random),
        "slot_bias": torch.rand(1, HEADS, SLOTS, generator=random),
        "length": torch.tensor([SLOTS]),
        "reference_queries": torch.randn(1, HEADS, QUERIES, DIM, generator=random) / 4,
    }
    after = {name: before[name][:, :, -KEPT:].clone() for name in ("key_cache", "value_cache", "slot_bias")}
    return before, {**after, "length": torch.tensor([KEPT])}


def attention(state: dict[str, torch.Tensor], queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log mass and output of every query, head by head."""
    logits = queries @ state["key_cache"].mT + state["slot_bias"][:, :, None]
    return logits.logsumexp(-1), logits.softmax(-1) @ state["value_cache"]


def errors(values_too: bool | None) -> tuple[float, float]:
    before, after = cache()
    if values_too is not None:
        fit_slots(before, after, torch.tensor([True]), values_too)
    pairs = zip(
        attention(before, before["reference_queries"]), attention(after, before["reference_queries"]), strict=True
    )
    mass, output = (float((whole - kept).square().mean()) for whole, kept in pairs)
    return mass, output


def test_biases_give_back_the_mass_and_values_the_output():
    (mass, output), (mass_fitted, _), (_, output_fitted) = map(errors, (None, False, True))
    assert mass_fitted < mass / 50 and output_fitted < output / 4


def test_what_stays_whole_is_not_changed():
    before, _ = cache()
    after = {name: before[name].clone() for name in before if name != "reference_queries"}
    fit_slots(before, after, torch.tensor([True]), True)
    for name in ("slot_bias", "value_cache"):
        torch.testing.assert_close(after[name], before[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("without", ["queries", "rows"])
def test_without_queries_or_where_nothing_was_dropped_nothing_is_fitted(without: str):
    before, after = cache()
    expected = {name: tensor.clone() for name, tensor in after.items()}
    if without == "queries":
        before["reference_queries"].zero_()
    fit_slots(before, after, torch.tensor([without == "queries"]), True)
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, atol=0, rtol=0)


def test_steps_solve_the_equations():
    random = torch.Generator().manual_seed(1)
    matrix = torch.rand(QUERIES, STEPS // 2, generator=random, dtype=torch.float64)
    wanted = torch.randn(QUERIES, 3, generator=random, dtype=torch.float64)
    gram = matrix @ matrix.T
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(QUERIES)
    torch.testing.assert_close(_least_squares(matrix, wanted), matrix.T @ torch.linalg.solve(gram + ridge, wanted))


@pytest.mark.parametrize("runs", [1, 3, 5, 100])
def test_runs_of_a_reading_share_the_queries(runs: int):
    """All places are filled, each run's with rows of its own, spread over them: by the graph as by the statement."""
    import onnxruntime as ort

    from semkv_deploy.graph.editing import GraphEditor
    from semkv_deploy.methods.record_attention import _Recorded, _sampled

    looks = [
        Look(torch.randn(1, 4, 5, DIM), torch.empty(1, HEADS, 0, DIM), torch.tensor([0]), 0.0, 0.0) for _ in range(runs)
    ]
    shape = [1, HEADS, QUERIES, DIM]

    def value(name: str, dtype: ir.DataType, sizes: list[Any]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(dtype))

    before, after = (value(name, ir.DataType.FLOAT, shape) for name in ("before", "after"))
    rows, record = (
        value("rows", ir.DataType.FLOAT, [1, HEADS, "n", DIM]),
        value("record", ir.DataType.INT64, [2]),
    )
    graph = ir.Graph([before, rows, record], [], nodes=[], name="sampled", opset_imports={"": 24})
    group = _Recorded(ir.node("Identity", [before]), before, after)
    graph.outputs.append(_sampled(group, rows, record, GraphEditor(graph, "x")))
    session = ort.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    held = torch.zeros(shape)
    for number, look in enumerate(looks, 1):
        scaled = look.query.reshape(1, HEADS, -1, DIM) * DIM**-0.5
        feeds = {"before": held.numpy(), "rows": scaled.numpy(), "record": np.array([number, runs])}
        (found,) = session.run(None, feeds)
        held = look.queries(held, number, runs)
        np.testing.assert_array_equal(found, held.numpy())
    assert (held.abs().amax(-1) > 0).all()
    of = [{tuple(row) for row in (look.query * DIM**-0.5).reshape(-1, DIM).tolist()} for look in looks]
    seen = [sum(tuple(row) in rows for row in held.reshape(-1, DIM).tolist()) for rows in of]
    assert sum(seen) == HEADS * QUERIES and max(seen) - min(seen) <= HEADS


def test_a_fit_without_a_second_reading_is_refused():
    with pytest.raises(ValueError, match="fit=all needs queries=repeat"):
        Importance(queries="predicted", fit="all")


def test_capped_logits_are_refused(tiny_export: Any):
    from semkv_deploy.errors import SemkvError

    model = ir.load(tiny_export / "decoder.onnx")
    node = next(node for node in model.graph if node.op_type == "NexusAttention")
    node.attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)
    with pytest.raises(SemkvError, match=r"no fit for attention whose logits are capped.*fit=none"):
        record_attention(model, QUERIES)
