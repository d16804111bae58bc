"""NexusAttention's options: named slots, quantised caches, attention mass; every set of them, every implementation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from semkv_deploy import ops
from semkv_deploy.errors import SemkvError
from semkv_deploy.ops import nexus_attention
from semkv_deploy.ops.spec import OperatorSpec, make_node

from .conftest import Outputs, build_model, open_session

VARIANTS = {spec.overload: spec for spec in nexus_attention.OP.variants() if spec.overload}
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
KINDS = ("onnxruntime", "ReferenceEvaluator")
reference: Callable[..., Outputs] = nexus_attention.reference


def make_inputs(
    overload: str,
    heads: tuple[int, int] = (4, 2),
    rows: int = 2,
    capacity: int = 16,
    size: int = 8,
    lengths: tuple[int, ...] = (0, 5, 14),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs by name. slot_index: distinct live slots in random order, and -1."""
    torch.manual_seed(seed)
    batch, (query_heads, kv_heads) = len(lengths), heads
    cache = (batch, kv_heads, capacity, size)
    inputs = {
        "query": torch.randn(batch, query_heads, rows, size).to(dtype),
        "key": torch.randn(batch, kv_heads, rows, size).to(dtype),
        "value": torch.randn(batch, kv_heads, rows, size).to(dtype),
        "key_cache": torch.randn(cache).to(dtype),
        "value_cache": torch.randn(cache).to(dtype),
        "slot_bias": torch.randn(cache[:3]),
        "length": torch.tensor(lengths),
    }
    options = overload.split("_")
    if "indexed" in options:
        named = torch.rand(batch, kv_heads, capacity).argsort(-1)[:, :, : capacity // 2]
        inputs["slot_index"] = torch.where(named < inputs["length"][:, None, None], named, -1)
        inputs["slot_index"][:, 0, 1] = -5
    for option in CODES.keys() & set(options):
        for x in ("key", "value"):
            inputs[f"{x}_cache"], inputs[f"{x}_scale"] = nexus_attention.quantize(inputs[f"{x}_cache"], option)
    return inputs


def slot_or_16(inputs: dict[str, Tensor]) -> Tensor:
    """slot_index, with 16 for what names none."""
    return torch.where(inputs["slot_index"] < 0, 16, inputs["slot_index"])


def run_reference(overload: str, inputs: dict[str, Tensor], **attributes: float) -> Outputs:
    return reference(**inputs, **attributes, mass="mass" in overload)


@functools.cache
def runner(
    kind: str, overload: str, dtype: torch.dtype, attributes: tuple[tuple[str, float], ...]
) -> onnxruntime.InferenceSession | ReferenceEvaluator:
    spec = VARIANTS[overload]
    model = build_model(spec, dtype, None, dict(attributes), nexus_attention.function_proto(*overload.split("_")))
    return open_session(model) if kind == "onnxruntime" else ReferenceEvaluator(model)


def run_onnx(kind: str, overload: str, inputs: dict[str, Tensor], **attributes: float) -> Outputs:
    model = runner(kind, overload, inputs["query"].dtype, tuple(sorted(attributes.items())))
    if isinstance(model, ReferenceEvaluator):
        feed = {
            name: t.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn) if t.dtype == CODES["fp8"] else t.numpy()
            for name, t in inputs.items()
        }
        outputs = model.run(None, feed)
    else:
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                t.view(torch.uint8).numpy(), onnx.TensorProto.FLOAT8E4M3FN
            )
            if t.dtype == CODES["fp8"]
            else onnxruntime.OrtValue.ortvalue_from_numpy(t.numpy())
            for name, t in inputs.items()
        }
        outputs = [value.numpy() for value in model.run_with_ort_values(None, values)]
    tensors = []
    for array, spec in zip(outputs, VARIANTS[overload].outputs, strict=True):
        is_fp8 = spec.dtype == "float8e4m3fn"
        tensor = torch.from_numpy(np.array(array).view(np.uint8) if is_fp8 else np.array(array))
        tensors.append(tensor.view(CODES["fp8"]) if is_fp8 else tensor)
    return tuple(tensors)


def assert_close(spec: OperatorSpec, got: Outputs, want: Outputs, atol: float) -> None:
    """Caches and their scales bit for bit, the rest within atol or relatively within it."""
    for output, a, b in zip(spec.outputs, got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), output.name
        if output.name.endswith("_out"):
            raw = torch.uint8 if a.dtype == CODES["fp8"] else a.dtype
            assert torch.equal(a.view(raw), b.view(raw)), output.name
        else:
            torch.testing.assert_close(a, b, atol=atol, rtol=atol, msg=lambda text, n=output.name: f"{n}: {text}")


@pytest.mark.parametrize("overload", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "dtype", "atol"), [(1, torch.float16, 2e-3), (3, torch.float32, 2e-6)], ids=str)
def test_bodies_are_the_reference(overload: str, kind: str, rows: int, dtype: torch.dtype, atol: float) -> None:
    for heads in ((4, 4), (6, 2)):
        inputs = make_inputs(overload, heads, rows, lengths=(0, 7, 16 - rows), dtype=dtype)
        inputs["key"][0, 0, 0] = 0  # a row of zeros: its scale is 0
        want = run_reference(overload, inputs)
        assert_close(VARIANTS[overload], run_onnx(kind, overload, inputs), want, atol)


@pytest.mark.parametrize("overload", ["indexed", "indexed_int8_mass", "indexed_fp8_mass"])
@pytest.mark.parametrize(
    "attributes", [{"causal": 0}, {"window": 6}, {"causal": 0, "scale": 2.0, "softcap": 3.0, "window": 4}], ids=str
)
def test_bodies_are_the_reference_with_attributes(overload: str, attributes: dict[str, float]) -> None:
    inputs = make_inputs(overload, rows=3, lengths=(0, 6, 13))
    want = run_reference(overload, inputs, **attributes)
    assert not torch.allclose(want[0], run_reference(overload, inputs)[0], atol=1e-3), "the attribute had no effect"
    assert_close(VARIANTS[overload], run_onnx("onnxruntime", overload, inputs, **attributes), want, 2e-6)


@pytest.mark.parametrize("overload", VARIANTS)
def test_torch_overloads(overload: str) -> None:
    """Schema and fake kernel by torch's own checks, and the values of the reference."""
    nexus_attention.register_torch()
    operator = getattr(torch.ops.semkv.nexus_attention, overload)
    inputs = make_inputs(overload)
    arguments = tuple(inputs[name] for name in VARIANTS[overload].input_names)
    assert_close(
        VARIANTS[overload], operator(*arguments, 0.5, window=3), run_reference(overload, inputs, scale=0.5, window=3), 0
    )
    # The schema check multiplies the inputs, which torch cannot do with float8.
    tests = ("test_faketensor",) if "fp8" in overload else ("test_schema", "test_faketensor")
    checks = torch.library.opcheck(operator, arguments, {"window": 3}, test_utils=tests)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", KINDS)
def test_naming_all_slots_is_naming_none(kind: str) -> None:
    inputs = make_inputs("indexed", rows=3, lengths=(0, 6, 13))
    everything = torch.stack([torch.randperm(16) for _ in range(6)]).view(3, 2, 16)
    inputs["slot_index"] = torch.where(everything < inputs["length"][:, None, None], everything, -1)
    plain = {name: tensor for name, tensor in inputs.items() if name != "slot_index"}
    for attributes in ({}, {"window": 5}, {"causal": 0, "window": 2}):
        want = reference(**plain, **attributes)
        assert_close(VARIANTS["indexed"], run_onnx(kind, "indexed", inputs, **attributes), want, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_naming_some_slots_is_masking_the_others(kind: str) -> None:
    inputs = make_inputs("indexed", lengths=(3, 9, 14))
    named = torch.zeros(3, 2, 17, dtype=torch.bool).scatter_(2, slot_or_16(inputs), True)[..., :16]
    masked = inputs | {"slot_bias": inputs["slot_bias"].masked_fill(~named, -math.inf)}
    want = reference(**{name: tensor for name, tensor in masked.items() if name != "slot_index"})
    assert_close(VARIANTS["indexed"], run_onnx(kind, "indexed", inputs), want, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_named_twice_counts_twice(kind: str) -> None:
    inputs = make_inputs("indexed_mass", lengths=(9, 9, 9))
    inputs["slot_index"] = torch.tensor([4, -1, 2, 4]).expand(3, 2, 4).contiguous()
    once = inputs | {"slot_index": torch.tensor([4, 2]).expand(3, 2, 2).contiguous()}
    once["slot_bias"] = inputs["slot_bias"].clone()
    once["slot_bias"][:, :, 4] += math.log(2)
    assert_close(
        VARIANTS["indexed_mass"],
        run_onnx(kind, "indexed_mass", inputs),
        run_reference("indexed_mass", once),
        2e-6,
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["reference", "onnxruntime"])
@pytest.mark.parametrize("overload", ["indexed_mass", "int8_mass", "indexed_fp8_mass"])
def test_what_is_not_named_changes_nothing(kind: str, overload: str) -> None:
    """Garbage in dead slots, and in live ones that slot_index does not name: the same bits."""
    inputs = make_inputs(overload, lengths=(0, 5, 13))
    dirty = {name: tensor.clone() for name, tensor in inputs.items()}
    used = torch.zeros(3, 2, 17, dtype=torch.bool)
    if "slot_index" in inputs:
        used.scatter_(2, slot_or_16(inputs), True)
    else:
        used[:] = True
    unused = ~(used[..., :16] & (torch.arange(16) < inputs["length"][:, None, None]))
    is_code = "int8" in overload or "fp8" in overload
    for x in ("key", "value"):
        if is_code:
            dirty[f"{x}_cache"].view(torch.uint8)[unused] = 100
        else:
            dirty[f"{x}_cache"][unused] = 3e38
        if is_code:
            dirty[f"{x}_scale"][unused] = 1e30
    dirty["slot_bias"][unused] = 50.0
    run = run_reference if kind == "reference" else functools.partial(run_onnx, kind)
    clean, got = run(overload, inputs), run(overload, dirty)
    assert torch.equal(clean[0], got[0]) and torch.equal(clean[-1], got[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_mass_is_what_the_values_get(kind: str) -> None:
    """With unit vectors as values, the output is the weights: an independent way to the mass."""
    inputs = make_inputs("mass", heads=(6, 2), rows=3, capacity=8, size=8, lengths=(0, 3, 5))
    everything = torch.eye(8).expand(3, 2, 8, 8)
    inputs["value_cache"] = everything.contiguous()
    for b, start in enumerate((0, 3, 5)):
        inputs["value"][b] = everything[b, :, start : start + 3]
    output, *_, mass = run_onnx(kind, "mass", inputs, window=4)
    want = output.view(3, 2, 3, 3, 8).sum((2, 3))
    torch.testing.assert_close(mass, want, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(mass.sum(-1), torch.full((3, 2), 9.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", CODES)
def test_a_quantised_cache_is_attention_over_what_it_stands_for(option: str) -> None:
    """Codes times scales as an ordinary cache, new rows as they are stored: the same output."""
    inputs = make_inputs(option, rows=3, lengths=(0, 6, 13))
    output, *caches_and_scales = run_onnx("onnxruntime", option, inputs)
    plain = {name: inputs[name] for name in nexus_attention.OP.input_names}
    for i, x in enumerate(("key", "value")):
        plain[f"{x}_cache"] = inputs[f"{x}_cache"].float() * inputs[f"{x}_scale"][..., None]
        codes, scale = nexus_attention.quantize(inputs[x], option)
        plain[x] = codes.float() * scale[..., None]
        rebuilt = caches_and_scales[i].float() * caches_and_scales[i + 2][..., None]
        torch.testing.assert_close(rebuilt, reference(**plain)[i + 1], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(output, reference(**plain)[0], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("option", "error"), [("int8", 0.5 / 127), ("fp8", 1 / 16)])
def test_quantising_errs_by_half_a_code_at_most(option: str, error: float) -> None:
    rows = torch.randn(200, 64) * torch.logspace(-6, 6, 200)[:, None]
    codes, scale = nexus_attention.quantize(rows, option)
    largest = rows.abs().amax(-1, keepdim=True)
    allowed = error * (largest if option == "int8" else rows.abs()) + 1e-5 * largest
    assert bool(((codes.float() * scale[:, None] - rows).abs() <= allowed).all())
    assert torch.equal(codes.float().abs().amax(-1), torch.full((200,), nexus_attention.CODE_LIMIT[option]))


@pytest.mark.parametrize("overload", ["int8", "indexed_fp8"])
def test_rows_at_once_and_one_by_one(overload: str) -> None:
    """New rows are attended to as they are stored, so that cutting a prompt changes nothing."""
    inputs = make_inputs(overload, rows=3, lengths=(0, 5, 13))
    live = torch.arange(16) < inputs["length"][:, None, None]
    inputs["slot_bias"] = torch.where(live, inputs["slot_bias"], 0)
    at_once = run_onnx("onnxruntime", overload, inputs)
    step = dict(inputs)
    for r in range(3):
        step |= {x: inputs[x][:, :, r : r + 1].contiguous() for x in ("query", "key", "value")}
        output, *state = run_onnx("onnxruntime", overload, step)
        step |= dict(zip(("key_cache", "value_cache", "key_scale", "value_scale"), state, strict=True))
        step["length"] = step["length"] + 1
        if "slot_index" in step:
            step["slot_index"] = torch.cat([step["slot_index"], (step["length"] - 1)[:, None, None].expand(3, 2, 1)], 2)
        torch.testing.assert_close(output, at_once[0][:, :, r : r + 1], atol=2e-6, rtol=2e-6)
    for got, want in zip(state, at_once[1:], strict=True):
        assert torch.equal(got.float(), want.float())


def test_two_variants_live_in_one_model() -> None:
    """A first layer that reads all slots, a second that reads some: one file, two overloads of one function."""
    inputs = make_inputs("indexed")
    base, indexed = nexus_attention.OP, VARIANTS["indexed"]
    first = make_node(base, base.input_names, ["hidden", "k1", "v1"])
    second = make_node(indexed, ["hidden", *indexed.input_names[1:]], ["output", "k2", "v2"])
    model = build_model(indexed, torch.float32, None, {}, nexus_attention.function_proto("indexed"))
    del model.graph.node[:], model.graph.output[1:]
    model.graph.node.extend([first, second])
    model.functions.append(nexus_attention.function_proto())
    onnx.checker.check_model(model, full_check=True)
    for one in (model, onnx.inliner.inline_local_functions(model)):
        (got,) = open_session(one).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        plain = {name: tensor for name, tensor in inputs.items() if name != "slot_index"}
        want = reference(**inputs | {"query": reference(**plain)[0]})[0]
        torch.testing.assert_close(torch.from_numpy(got), want, atol=2e-6, rtol=2e-6)


def test_specs_and_functions_of_all_variants() -> None:
    assert len(VARIANTS) == 11
    for overload, spec in VARIANTS.items():
        function = nexus_attention.function_proto(*reversed(overload.split("_")))
        assert (function.name, function.overload) == ("NexusAttention", overload)
        assert (tuple(function.input), tuple(function.output)) == (spec.input_names, spec.output_names)
        node = make_node(spec, spec.input_names, spec.output_names)
        assert node.overload == overload
        flags = {a.name for a in node.attribute} - set(nexus_attention.OP.attributes)
        assert flags == set(overload.split("_"))
    assert nexus_attention.OP.with_options() == nexus_attention.OP
    assert not any(f.overload for f in ops.function_protos())


def test_options_that_do_not_exist_or_clash_are_errors() -> None:
    with pytest.raises(SemkvError, match=r"NexusAttention: unknown option .*got \['int4'\]"):
        nexus_attention.function_proto("int4")
    with pytest.raises(SemkvError, match=r"options exclude each other .*got \['int8', 'fp8'\]"):
        nexus_attention.OP.with_options("fp8", "int8")


def test_a_slot_that_is_not_there_is_an_error() -> None:
    inputs = make_inputs("indexed", lengths=(0, 5, 13))
    inputs["slot_index"][1, 1, 3] = 5
    with pytest.raises(SemkvError, match=r"slots that are not there .*less than length \[0, 5, 13\], got \[-1, 5, "):
        reference(**inputs)


def test_scales_without_codes_are_an_error() -> None:
    inputs = make_inputs("int8")
    with pytest.raises(SemkvError, match=r"scales belong to int8 and fp8 caches \(got torch.int8\)"):
        reference(**{name: tensor for name, tensor in inputs.items() if name != "value_scale"})
    with pytest.raises(SemkvError, match=r"scales belong to int8 and fp8 caches \(got torch.float32\)"):
        reference(**inputs | {x: inputs[x].float() for x in ("key_cache", "value_cache")})
    with pytest.raises(SemkvError, match=r"dimension C differs between inputs \(expected 16, got 15\)"):
        reference(**inputs | {"key_scale": inputs["key_scale"][..., :15]})
