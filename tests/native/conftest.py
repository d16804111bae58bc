"""The native library where builds find it, and its check under sanitizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.building import BUILD, build


@pytest.fixture(scope="module")
def installed(native_library: Path) -> Iterator[None]:
    """Builds find the library, as they do where a user has built it."""
    from semkv_deploy.targets.onnxruntime import native

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", native_library)
        yield


@pytest.fixture(scope="session")
def sanitized_check() -> Path:
    """The kernels without ONNX Runtime, under the address and undefined-behaviour sanitizers."""
    return build(BUILD / "native-sanitized", "--sanitize", "address,undefined") / "semkv_native_check"
