"""The plugin objects driven through TensorRT's interfaces by plugins/harness: emulated kernels, under sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from semkv_deploy.ops import SPECS


@pytest.fixture(scope="module")
def output(harness: Path) -> str:
    done = subprocess.run([str(harness)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_harness_test_passes(output: str) -> None:
    assert int(output.splitlines()[-1].split()[0]) >= 40
    for plugin in ("nexusAttention", "compactCache", "semanticCluster", "semanticBlockMap", "semanticBlockSelect"):
        assert f"{plugin}ThroughItsLife" in output


@pytest.mark.parametrize("name", sorted(SPECS))
def test_contract_is_the_operators(output: str, name: str) -> None:
    """Inputs, outputs, options, types, attributes and their defaults: the C++ tables against semkv_deploy.ops."""
    spec = SPECS[name]
    expected = [f"input {t.name} {t.shape} {t.dtype}" for t in spec.inputs]
    expected += [f"output {t.name} {t.shape} {t.dtype}" for t in spec.outputs]
    for option in spec.options:
        expected += [f"option {option.name} input {t.name} {t.shape} {t.dtype}" for t in option.inputs]
        expected += [f"option {option.name} output {t.name} {t.shape} {t.dtype}" for t in option.outputs]
        expected += [f"option {option.name} makes {tensor} {dtype}" for tensor, dtype in option.dtypes.items()]
    expected += [f"attribute {key} {type(v).__name__} {v:g}" for key, v in spec.attributes.items()]
    prefix = f"contract {name} "
    assert [line.removeprefix(prefix) for line in output.splitlines() if line.startswith(prefix)] == expected
