"""NexusAttention: all implementations against each other, against PyTorch's own attention, and its invariants."""

from __future__ import annotations

import math
import subprocess
import sys

import onnx
import onnx.inliner
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semkv_deploy import ops
from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import nexus_attention
from semkv_deploy.ops.spec import make_node

from .conftest import Implementation, assert_agree, build_model, implementations, open_session

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
reference: Implementation = nexus_attention.reference
ALL = sorted(implementations(nexus_attention))


def make_inputs(
    batch: int = 3,
    heads: tuple[int, int] = (4, 2),
    rows: int = 2,
    capacity: int = 16,
    size: int = 8,
    lengths: tuple[int, ...] = (0, 5, 14),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query_heads, kv_heads = heads
    new = [random(batch, h, rows, size).to(dtype) for h in (query_heads, kv_heads, kv_heads)]
    caches = [random(batch, kv_heads, capacity, size).to(dtype) for _ in range(2)]
    return [*new, *caches, random(batch, kv_heads, capacity), torch.tensor(lengths)]


def row_of(inputs: list[Tensor], b: int) -> list[Tensor]:
    return [t[b : b + 1].contiguous() for t in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_implementations_agree(heads: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    """Ragged lengths: empty, partly filled, filled to the last slot."""
    inputs = make_inputs(heads=heads, rows=rows, lengths=(0, 7, 16 - rows), dtype=dtype)
    assert_agree(nexus_attention, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "attributes",
    [
        {"causal": 0},
        {"scale": 0.7},
        {"softcap": 1.5},
        {"window": 3},
        {"causal": 0, "scale": 2.0, "softcap": 3.0, "window": 4},
    ],
    ids=str,
)
def test_implementations_agree_on_attributes(attributes: dict[str, float]) -> None:
    inputs = make_inputs(rows=3, lengths=(0, 6, 13))
    changed = assert_agree(nexus_attention, inputs, TOLERANCE[torch.float32], **attributes)
    plain = reference(*inputs)
    assert not torch.allclose(changed[0], plain[0], atol=1e-3), "the attribute had no effect"


def test_a_whole_cache_appended_at_once() -> None:
    assert_agree(nexus_attention, make_inputs(rows=16, lengths=(0, 0, 0)), TOLERANCE[torch.float32])


def test_dead_bias_minus_infinity() -> None:
    inputs = make_inputs(lengths=(4, 5, 14))
    inputs[5][:, 0, 1] = -math.inf
    inputs[5][:, 1, 3] = -math.inf
    assert_agree(nexus_attention, inputs, TOLERANCE[torch.float32])


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("causal", [0, 1])
def test_reference_is_pytorch_attention(causal: int, window: int, softcap: float) -> None:
    """In float64, against an independent statement: full mask, repeated heads, torch's softmax."""
    inputs = [t.double() if t.is_floating_point() else t for t in make_inputs(rows=3, lengths=(0, 6, 13))]
    query, key, value, key_cache, value_cache, slot_bias, length = inputs
    output, keys, values = reference(*inputs, causal=causal, window=window, softcap=softcap)
    for b, used in enumerate(length.tolist()):
        k = torch.cat([key_cache[b, :, :used], key[b]], 1)
        v = torch.cat([value_cache[b, :, :used], value[b]], 1)
        assert torch.equal(keys[b, :, : used + 3], k) and torch.equal(values[b, :, : used + 3], v)
        assert torch.equal(keys[b, :, used + 3 :], key_cache[b, :, used + 3 :])
        bias = torch.cat([slot_bias[b, :, :used], torch.zeros(2, 3)], 1)[:, None].expand(2, 3, used + 3).clone()
        for r in range(3):
            for j in range(used + 3):
                if (causal and j > used + r) or (window and used + r - j >= window):
                    bias[:, r, j] = -math.inf
        k, v, bias = (t.repeat_interleave(2, 0) for t in (k, v, bias))
        if softcap:
            logits = softcap * torch.tanh(query[b] @ k.mT / math.sqrt(8) / softcap) + bias
            expected = torch.softmax(logits, -1) @ v
        else:
            expected = F.scaled_dot_product_attention(query[b], k, v, attn_mask=bias)
        torch.testing.assert_close(output[b], expected, atol=1e-12, rtol=1e-12)


def test_float32_body_against_float64_reference() -> None:
    inputs = make_inputs(heads=(6, 2), rows=3, capacity=64, lengths=(0, 33, 61))
    exact = reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    got = implementations(nexus_attention)["onnxruntime"](*inputs)
    torch.testing.assert_close(got[0].double(), exact[0], atol=2e-6, rtol=2e-6)


def test_bfloat16_reference() -> None:
    inputs = make_inputs(dtype=torch.bfloat16)
    output, keys, _ = torch.ops.semkv.nexus_attention(*inputs)
    exact = reference(*(t.float() if t.is_floating_point() else t for t in inputs))
    assert output.dtype == keys.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact[0], atol=2e-2, rtol=2e-2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ALL)
def test_dead_slots_change_nothing(kind: str) -> None:
    """Large finite garbage, and any bias at all, in every dead slot: bit-identical output."""
    run = implementations(nexus_attention)[kind]
    inputs = make_inputs(lengths=(0, 5, 13))
    inputs[5][:, :, 2] = -math.inf
    poisoned = [t.clone() for t in inputs]
    dead = torch.arange(16) >= torch.tensor([0, 5, 13])[:, None] + 2
    for b in range(3):
        below = torch.zeros(16, dtype=torch.bool)
        below[2] = b > 0
        poisoned[3][b, :, dead[b] | below] = 3e38
        poisoned[4][b, :, dead[b] | below] = -1e30
        poisoned[5][b, :, dead[b]] = math.nan
    clean, dirty = run(*inputs), run(*poisoned)
    assert torch.equal(clean[0], dirty[0])


@pytest.mark.parametrize("kind", ALL)
def test_deleting_and_masking_are_the_same(kind: str) -> None:
    run = implementations(nexus_attention)[kind]
    inputs = make_inputs(lengths=(6, 9, 13))
    masked = [t.clone() for t in inputs]
    masked[5][:, :, [1, 4]] = -math.inf
    kept = [j for j in range(16) if j not in (1, 4)] + [1, 4]
    deleted = [*inputs[:3], *(t[:, :, kept].contiguous() for t in inputs[3:6]), inputs[6] - 2]
    torch.testing.assert_close(run(*masked)[0], run(*deleted)[0], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", ALL)
def test_batch_rows_are_independent(kind: str) -> None:
    run = implementations(nexus_attention)[kind]
    inputs = make_inputs()
    together = run(*inputs)
    for b in range(3):
        for whole, alone in zip(together, run(*row_of(inputs, b)), strict=True):
            torch.testing.assert_close(alone[0], whole[b], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_rows_at_once_and_one_by_one(kind: str) -> None:
    """Causal: appending S rows is S times appending one; the second call reads the cache the first one wrote."""
    run = implementations(nexus_attention)[kind]
    query, key, value, keys, values, bias, length = make_inputs(rows=3, lengths=(0, 5, 13))
    bias = torch.where(torch.arange(16) < length[:, None, None], bias, 0)
    at_once = run(query, key, value, keys, values, bias, length)
    outputs = []
    for r in range(3):
        row = [t[:, :, r : r + 1].contiguous() for t in (query, key, value)]
        output, keys, values = run(*row, keys, values, bias, length + r)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 2), at_once[0], atol=2e-6, rtol=2e-6)
    assert torch.equal(keys, at_once[1]) and torch.equal(values, at_once[2])


def test_a_function_can_be_inlined() -> None:
    inputs = make_inputs()
    model = build_model(nexus_attention.OP, torch.float32, None, {"window": 3})
    inlined = onnx.inliner.inline_local_functions(model)
    assert all(node.domain in ("", "ai.onnx") for node in inlined.graph.node) and not inlined.functions
    feed = {n: t.numpy() for n, t in zip(nexus_attention.OP.input_names, inputs, strict=True)}
    got = open_session(inlined).run(None, feed)
    assert torch.allclose(torch.from_numpy(got[0]), reference(*inputs, window=3)[0], atol=2e-6)


def test_torch_operator_is_registered_correctly() -> None:
    """Schema, fake kernel with symbolic sizes, no aliasing: torch's own checks."""
    nexus_attention.register_torch()
    results = torch.library.opcheck(
        torch.ops.semkv.nexus_attention.default,
        tuple(make_inputs()),
        {"window": 3},
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(results.values()) == {"SUCCESS"}


def test_torch_export_traces_the_operator() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return torch.ops.semkv.nexus_attention(*inputs, softcap=2.0)

    nexus_attention.register_torch()
    inputs = make_inputs()
    capacity, rows = torch.export.Dim("capacity", min=4), torch.export.Dim("rows", min=2)
    dynamic = [{2: rows}] * 3 + [{2: capacity}] * 3 + [None]
    program = torch.export.export(Layer(), tuple(inputs), dynamic_shapes=(tuple(dynamic),))
    assert "semkv.nexus_attention" in program.graph_module.code
    other = make_inputs(rows=3, capacity=32)
    torch.testing.assert_close(program.module()(*other), reference(*other, softcap=2.0))


@settings(max_examples=40, deadline=None)
@given(
    spread=st.floats(0, 3),
    weights=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    others=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
def test_merged_mass_never_exceeds_true_mass(spread: float, weights: list[int], others: int, seed: int) -> None:
    """Jensen: the bias log(sum s) on the mean key gives at most the attention the members had, all for equal keys."""
    generator = torch.Generator().manual_seed(seed)
    members = torch.randn(4, generator=generator) + spread * torch.randn(len(weights), 4, generator=generator)
    rest = torch.randn(others, 4, generator=generator)
    weight = torch.tensor(weights, dtype=torch.float64)
    core = (weight[:, None] * members).sum(0) / weight.sum()
    query = torch.randn(1, 1, 1, 4, generator=generator).double()

    def mass(cluster: Tensor, bias: Tensor) -> float:
        keys = torch.cat([cluster, rest, torch.zeros(1, 4)])[None, None].double()
        is_member = (torch.arange(keys.shape[2]) < len(cluster)).double()
        values = is_member[None, None, :, None].expand_as(keys)
        slot_bias = torch.cat([bias.double(), torch.zeros(others + 1)])[None, None]
        new = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
        length = torch.tensor([keys.shape[2] - 1])
        return float(reference(query, new, new, keys, values, slot_bias, length)[0][0, 0, 0, 0])

    true, merged = mass(members, weight.log()), mass(core[None], weight.sum().log()[None])
    assert merged <= true + 1e-6
    if spread == 0:
        assert merged == pytest.approx(true, abs=1e-6)


def test_rows_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(
        SemkvError, match=r"NexusAttention: the new rows do not fit .*expected length \+ 2 <= 16, got \[0, 5, 15\]"
    ):
        reference(*make_inputs(lengths=(0, 5, 15)))


def test_head_counts_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(SemkvError, match="multiple of KV heads"):
        reference(*make_inputs(heads=(3, 2)))


def test_shapes_that_disagree_are_an_error() -> None:
    inputs = make_inputs()
    inputs[4] = inputs[4][:, :, :8]
    with pytest.raises(SemkvError, match=r"dimension C differs between inputs .*expected 16, got 8"):
        reference(*inputs)
    inputs[4] = inputs[4][0]
    with pytest.raises(SemkvError, match="wrong number of dimensions"):
        reference(*inputs)


def test_a_node_carries_every_attribute() -> None:
    """ReferenceEvaluator does not apply a function's defaults, so writers of nodes must."""
    node = make_node(nexus_attention.OP, ["q"] * 7, ["o"] * 3, name="layers.00.attention", window=9)
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert values == {"scale": 0.0, "causal": 1, "softcap": 0.0, "window": 9}
    assert (node.domain, node.name) == ("semkv", "layers.00.attention")
    with pytest.raises(SemkvError, match="unknown attribute"):
        make_node(nexus_attention.OP, ["q"] * 7, ["o"] * 3, windows=9)


def test_the_functions_match_their_specs() -> None:
    functions = {f.name: f for f in ops.function_protos()}
    expected = ["NexusAttention", "SemanticCluster", "SemanticBlockMap", "SemanticBlockSelect", "CompactCache"]
    assert list(functions) == list(ops.SPECS) == expected
    for name, spec in ops.SPECS.items():
        f = functions[name]
        assert (f.domain, [(o.domain, o.version) for o in f.opset_import]) == ("semkv", [("", 24)])
        assert (tuple(f.input), tuple(f.output)) == (spec.input_names, spec.output_names)
        assert {a.name: onnx.helper.get_attribute_value(a) for a in f.attribute_proto} == dict(spec.attributes)


def test_onnx_users_do_not_need_torch() -> None:
    code = "import sys; from semkv_deploy import ops; ops.function_protos(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
