"""The engine cache: what makes a hit and what a miss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.targets.tensorrt import builder as module
from semkv_deploy.targets.tensorrt import engine_cache
from semkv_deploy.targets.tensorrt.api import Gpu
from semkv_deploy.targets.tensorrt.builder import build_engine, external_files
from semkv_deploy.targets.tensorrt.engine_cache import cache_key, key_parts
from semkv_deploy.targets.tensorrt.request import EngineRequest

from .conftest import KEYS, PROMISED, QUERY, decoder_layer, with_external_weights


@pytest.fixture
def cached(request_: EngineRequest, tmp_path: Path) -> EngineRequest:
    return request_.model_copy(update={"engine_cache": tmp_path / "cache"})


def entries(request: EngineRequest) -> list[Path]:
    assert request.engine_cache is not None
    return sorted(request.engine_cache.iterdir())


def test_second_build_is_a_copy_with_the_same_proof(cached: EngineRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_engine(cached)
    content = cached.plan.read_bytes()
    cached.plan.unlink()
    monkeypatch.setattr(module, "run_worker", lambda *_: pytest.fail("built again"))
    elsewhere = cached.model_copy(update={"plan": cached.plan.with_name("another.plan")})
    second = build_engine(elsewhere)
    assert second.from_cache and elsewhere.plan.read_bytes() == content
    assert second == first.model_copy(update={"from_cache": True})
    assert [path.suffix for path in entries(cached)] == [".json", ".plan"]


@pytest.mark.parametrize(
    "damage", ["plan altered", "plan gone", "record gone", "record cut", "record of another shape"]
)
def test_damaged_entry_is_built_again(cached: EngineRequest, damage: str) -> None:
    build_engine(cached)
    content = cached.plan.read_bytes()
    record, stored = entries(cached)
    if damage == "plan altered":
        stored.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    elif damage == "record cut":
        record.write_text(record.read_text()[:100])
    elif damage == "record of another shape":
        entry = json.loads(record.read_text())
        del entry["result"]["proved"]
        record.write_text(json.dumps(entry))
    else:
        (record if damage == "record gone" else stored).unlink()
    cached.plan.unlink()
    assert not build_engine(cached).from_cache
    assert len(cached.plan.read_bytes()) == len(content)  # a byte or two differ from build to build
    assert build_engine(cached).from_cache and cached.plan.read_bytes() == stored.read_bytes()


def test_failed_build_is_not_kept(cached: EngineRequest) -> None:
    with pytest.raises(SemkvError):
        build_engine(cached.model_copy(update={"promised": []}))
    assert cached.engine_cache is not None and not cached.engine_cache.exists()


def test_cache_that_cannot_be_written_to_costs_a_warning_only(cached: EngineRequest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = build_engine(cached.model_copy(update={"engine_cache": tmp_path / "file" / "cache"}))
    assert cached.plan.exists() and "was not kept in the cache" in result.warnings[0]


def key_of(request: EngineRequest, version: str = "1.7.1.116") -> str:
    return cache_key(key_parts(request, version, external_files(request.onnx)))


def test_same_request_has_the_same_key(tmp_path: Path) -> None:
    """Wherever its graph and its plan lie."""
    keys = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        with_external_weights(decoder_layer(), folder / "g.onnx")
        keys.add(key_of(EngineRequest(runtime="tensorrt-rtx", onnx=folder / "g.onnx", plan=folder / "g.plan")))
        keys.add(key_of(EngineRequest(runtime="tensorrt-rtx", onnx=folder / "g.onnx", plan=folder / "h.plan")))
    assert len(keys) == 1


def edit_graph(request: EngineRequest) -> EngineRequest:
    model = onnx.load(request.onnx, load_external_data=False)
    model.graph.node[-1].name = "renamed"
    onnx.save(model, request.onnx)
    return request


def edit_weights(request: EngineRequest) -> EngineRequest:
    data = Path(f"{request.onnx}.data")
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    return request


def edit_library(request: EngineRequest) -> EngineRequest:
    assert request.plugin_library is not None
    request.plugin_library.write_bytes(b"another library")
    return request


def update(**fields: object) -> Callable[[EngineRequest], EngineRequest]:
    return lambda request: request.model_copy(update=fields)


CHANGES: dict[str, Callable[[EngineRequest], EngineRequest]] = {
    "graph": edit_graph,
    "external data": edit_weights,
    "plugin library": edit_library,
    "profiles": update(profiles=[QUERY | KEYS, QUERY | KEYS]),
    "compute capabilities": update(compute_capabilities=[86]),
    "aliases": update(aliases={"past_key": "present_value"}),
    "promised": update(promised=PROMISED[:1]),
    "plugins": update(plugins=["NexusAttention"]),
    "embed plugins": update(embed_plugins=True),
    "memory limit": update(memory_limit=1 << 30),
    "runtime": update(runtime="tensorrt"),
}


@pytest.mark.parametrize("part", [*CHANGES, "version", "gpu", "tool"])
def test_every_part_makes_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    gpu = Gpu("NVIDIA L4", 89)
    monkeypatch.setattr(engine_cache, "find_gpu", lambda: (gpu, None))
    with_external_weights(decoder_layer(), tmp_path / "g.onnx")
    library = tmp_path / "lib.so"
    library.write_bytes(b"library")
    request = EngineRequest(
        runtime="tensorrt" if part == "gpu" else "tensorrt-rtx",
        onnx=tmp_path / "g.onnx",
        plan=tmp_path / "g.plan",
        profiles=[QUERY | KEYS],
        compute_capabilities=[86, 89],
        promised=PROMISED,
        plugin_library=library,
    )
    parts = key_parts(request, "1.7.1.116", external_files(request.onnx))
    assert part in parts
    before = cache_key(parts)
    if part == "version":
        assert key_of(request, "1.7.1.117") != before
    elif part == "gpu":
        monkeypatch.setattr(engine_cache, "find_gpu", lambda: (gpu._replace(name="NVIDIA L40"), None))
        assert key_of(request) != before
    elif part == "tool":
        monkeypatch.setattr(engine_cache, "__version__", "0")
        assert key_of(request) != before
        monkeypatch.undo()
        monkeypatch.setattr(engine_cache, "_CODE", ("proof.py",))
        assert key_of(request) != before
    else:
        assert key_of(CHANGES[part](request)) != before


def test_every_field_of_a_request_is_in_the_key_or_known_not_to_matter(tmp_path: Path) -> None:
    """A field that is added must be thought about."""
    names = {name.replace("_", " ") for name in EngineRequest.model_fields}
    onnx.save(decoder_layer(), tmp_path / "g.onnx")
    parts = key_parts(EngineRequest(runtime="tensorrt-rtx", onnx=tmp_path / "g.onnx", plan=tmp_path / "p"), "1", [])
    assert names - set(parts) == {"onnx", "plan", "timing cache", "engine cache"}
