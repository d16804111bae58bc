"""What libsemkv says where TensorRT, a GPU or fitting engines are missing; native code needs the caller's word."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.methods import Full
from semkv_deploy.targets.tensorrt.api import missing
from semkv_deploy.targets.tensorrt.build import TensorRTOptions

from ...bundle.test_contract import words
from ..driver import CppError
from .conftest import Fake
from .fake_plans import edit, plan_of

BAD_BUNDLE, ALTERED, NO_TARGET, OUT_OF_MEMORY, RUNTIME = 2, 3, 4, 7, 8
TARGET = "tensorrt-rtx"


@pytest.fixture
def bundle(trt_bundle: Callable[..., Path]) -> Path:
    return trt_bundle("semanticache", TARGET)


def refused(
    fake: Fake, bundle: Path, code: int, sentence: str, *, environment: dict[str, str] | None = None, **options: Any
) -> str:
    """What opening a session says, in a process that goes on afterwards."""
    given = {"target": TARGET, **fake.libraries(), **options}
    with fake.driver(bundle, given["target"], **(environment or {})) as cpp:
        with pytest.raises(CppError) as refusal:
            cpp.open(bundle, 2, **given)
        assert cpp("close") is None
    message = str(refusal.value)
    assert sentence in message and refusal.value.code == code, message
    return message


def test_libraries(fake: Fake, bundle: Path, tmp_path: Path):
    folder = fake.folder
    none = str(tmp_path / "none.so")
    message = refused(
        fake, bundle, NO_TARGET, "target tensorrt-rtx: TensorRT-RTX's library does not load", tensorrt=none
    )
    assert f"{none}: cannot open shared object file" in message and message.endswith("or set SEMKV_TENSORRT to it.")
    refused(
        fake, bundle, NO_TARGET, "the library is not TensorRT-RTX's", tensorrt=str(folder / "libsemkv_fake_cudart.so")
    )
    message = refused(fake, bundle, NO_TARGET, "CUDA's runtime library does not load", cudart=none)
    assert "Give the path of libcudart.so.12 or libcudart.so.13, or set SEMKV_CUDART to it." in message
    message = refused(fake, bundle, NO_TARGET, "is not CUDA's runtime", cudart=str(folder / "libsemkv.so"))
    assert "expected cudaGetDeviceCount" in message
    # The environment names them as well.
    with fake.driver(
        bundle,
        TARGET,
        SEMKV_TENSORRT=fake.libraries()["tensorrt"],
        SEMKV_CUDART=fake.libraries()["cudart"],
    ) as cpp:
        cpp.open(bundle, 2, target=TARGET)


def test_versions(fake: Fake, bundle: Path, copied: Any):
    sentence = "a version that this library does not know (expected TensorRT-RTX 1, got 10.14.1.48)"
    refused(fake, bundle, NO_TARGET, sentence, environment={"SEMKV_FAKE_VERSION": "10.14.1.48"})
    sentence = "the engine needs the version of TensorRT-RTX that built it (expected 1.7.1.116, got 1.7.2.1)"
    refused(fake, bundle, NO_TARGET, sentence, environment={"SEMKV_FAKE_VERSION": "1.7.2.1"})
    sentence = "TensorRT-RTX 1.7.1.116 does not start (got CUDA initialization failure with error: 35)"
    refused(fake, bundle, NO_TARGET, sentence, environment={"SEMKV_FAKE_FAIL": "runtime"})


def test_gpus(fake: Fake, bundle: Path):
    message = refused(
        fake, bundle, NO_TARGET, "there is no GPU that CUDA can use here", environment={"SEMKV_FAKE_GPU": "0"}
    )
    assert "got no CUDA-capable device is detected). Run where there is one, or build the bundle for" in message
    sentence = (
        "the engines are for other GPUs (expected SM86, got SM89). Build the bundle with --compute-capability 89."
    )
    refused(fake, bundle, NO_TARGET, sentence, environment={"SEMKV_FAKE_GPU": "89"})
    refused(fake, bundle, OUT_OF_MEMORY, "out of memory", environment={"SEMKV_FAKE_BYTES": "60000"})
    sentence = "the GPU's memory does not suffice for the engine's activations"
    refused(fake, bundle, OUT_OF_MEMORY, sentence, environment={"SEMKV_FAKE_FAIL": "context"})


def test_engines_that_are_not_the_contracts(fake: Fake, bundle: Path):
    sentence = "the engine is not the contract's (expected key_cache, got none of them)"
    refused(fake, bundle, BAD_BUNDLE, sentence, environment={"SEMKV_FAKE_FAIL": "tensors"})
    sentence = (
        "present.00.key: the engine aliases other tensors than the contract (expected past_key_values.00.key, got"
    )
    refused(fake, bundle, BAD_BUNDLE, sentence, environment={"SEMKV_FAKE_FAIL": "aliases"})


def test_plans(fake: Fake, bundle: Path, copied: Any):
    spoilt = copied(bundle)
    (plan,) = spoilt.glob("targets/*/decoder*.plan")
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1] + b"?")
    refused(fake, spoilt, ALTERED, "file of the bundle was altered")
    for content, code, sentence in [
        (whole[:20], ALTERED, "not a TensorRT plan. Build the bundle again"),
        (b"onnx" + whole[4:], ALTERED, "not a TensorRT plan"),
        (
            whole + b"?",
            ALTERED,
            f"the engine is truncated or altered (expected {len(whole)} bytes, got {len(whole) + 1}",
        ),
        (
            plan_of("x", "tensorrt", "10.14.1.48"),
            NO_TARGET,
            "by another runtime (expected TensorRT-RTX, got TensorRT 10.14",
        ),
    ]:
        plan.write_bytes(content)
        edit(spoilt, lambda manifest: None)
        refused(fake, spoilt, code, sentence)
    plan.write_bytes(plan_of("another", TARGET, "1.7.1.116"))
    edit(spoilt, lambda manifest: None)
    sentence = "TensorRT-RTX does not open the engine (got no reason). Build it for the compute capability of this GPU"
    refused(fake, spoilt, NO_TARGET, sentence, environment={"SEMKV_FAKE_BUNDLE": str(bundle)})


def test_a_bundle_without_engines(fake: Fake, bundle: Path, copied: Any):
    def without(manifest: dict[str, Any]) -> None:
        manifest["targets"][TARGET]["version"] = None

    spoilt = copied(bundle)
    edit(spoilt, without)
    refused(fake, spoilt, NO_TARGET, "no engines were built. Build the bundle without --no-engines.")


def test_profiles_that_contradict_the_graph(fake: Fake, bundle: Path, copied: Any):
    def change(manifest: dict[str, Any]) -> None:
        contract = manifest["targets"][TARGET]["budgets"][0]["contract"]
        contract["programs"]["decode"]["graphs"][0]["profiles"][0]["shapes"]["input_ids"][2] = [1, 0]

    spoilt = copied(bundle)
    edit(spoilt, change)
    refused(fake, spoilt, BAD_BUNDLE, "profiles")


def test_native_code_needs_the_callers_word(fake: Fake, bundle: Path, copied: Any):
    """Of a manifest that says so, before anything is loaded; of one that is silent the runtime refuses it."""
    brings = {"SEMKV_FAKE_PLUGINS": "1"}
    message = refused(fake, bundle, NO_TARGET, "TensorRT-RTX does not open the engine", environment=brings)
    assert "got the engine brings host code, which is not allowed" in message
    # The word alone is not enough where the manifest says that there is none.
    refused(fake, bundle, NO_TARGET, "host code, which is not allowed", environment=brings, allow_plugins=True)

    def change(manifest: dict[str, Any]) -> None:
        manifest["targets"][TARGET]["plugins"] = ["NexusAttention"]

    says = copied(bundle)
    edit(says, change)
    message = refused(
        fake, says, NO_TARGET, "its engines carry native code, which runs with all your rights", environment=brings
    )
    assert "got plugins NexusAttention). Set allow_plugins if you trust who built the bundle." in message
    with fake.driver(says, TARGET, **brings) as cpp:
        cpp.open(says, 2, target=TARGET, allow_plugins=True, **fake.libraries())
        cpp.prefill([[5, 6], [7]])


def test_a_run_that_fails(fake: Fake, bundle: Path):
    """What was appended is taken back; the sentence has TensorRT's words, in every session of the process."""
    with fake.driver(bundle, TARGET, SEMKV_FAKE_FAIL="run") as cpp:
        cpp.open(bundle, 2, target=TARGET, **fake.libraries())
        cpp("close")
        cpp.open(bundle, 2, target=TARGET, **fake.libraries())
        with pytest.raises(CppError, match=r"the engine does not run .*an illegal memory access") as refusal:
            cpp.prefill([words(1, 20), []])
        assert refusal.value.code == RUNTIME and cpp("stats", row=0)["position"] == 0


def test_the_real_library_without_a_gpu(fake: Fake, tiny_export: Path, tmp_path: Path):
    """A real plan, the real TensorRT-RTX: a sentence, and a process that goes on; with a GPU that is claimed, too."""
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    if missing("tensorrt-rtx") or libraries is None:
        pytest.skip("TensorRT-RTX is not installed")
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a GPU here")
    bundle = tmp_path / "real"
    build_bundle(
        str(tiny_export / "decoder.onnx"),
        bundle,
        budgets=[1.0],
        method=Full(),
        target=[TARGET],
        tensorrt=TensorRTOptions(batch=2, compute_capabilities="86"),
    )
    real = str(Path(str(libraries.origin)).parent / "libtensorrt_rtx.so.1")
    message = refused(fake, bundle, NO_TARGET, "TensorRT-RTX does not open the engine", tensorrt=real)
    assert "got IRuntime::deserializeCudaEngine: Error Code 1: Cuda Runtime" in message
    cudart = importlib.util.find_spec("nvidia")
    found = [
        each
        for folder in (cudart.submodule_search_locations or [] if cudart else [])
        for each in Path(folder).glob("*/lib/libcudart.so.*")
    ]
    if found:
        message = refused(
            fake, bundle, NO_TARGET, "there is no GPU that CUDA can use", tensorrt=real, cudart=str(found[0])
        )
