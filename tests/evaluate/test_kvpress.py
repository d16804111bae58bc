"""The process that runs presses, with a stand-in for kvpress of one press: what stays is known, and so are logits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.bundles import BundleSubject, allowed_bytes, slot_bytes
from semkv_deploy.evaluate.entries import Entry
from semkv_deploy.evaluate.kvpress import KvpressProcess, KvpressSubject
from semkv_deploy.model.exported import TOKENIZER, open_export

STAND_IN = """
class KeepLastPress:
    def __init__(self, compression_ratio, raises=False):
        self.compression_ratio, self.raises = compression_ratio, raises

    def __call__(self, model):
        import contextlib

        @contextlib.contextmanager
        def pressing():
            def cut(module, given, output):
                if self.raises:
                    raise ValueError("told to")
                for layer in output.past_key_values.layers:
                    keep = int(layer.keys.shape[2] * (1 - self.compression_ratio))
                    layer.keys, layer.values = layer.keys[:, :, -keep:], layer.values[:, :, -keep:]

            hook = model.model.register_forward_hook(cut)
            try:
                yield
            finally:
                hook.remove()

        return pressing()
"""

IDS = np.random.default_rng(0).integers(5, 500, 120).tolist()
KEEP_LAST = Entry("kvpress/KeepLast", "kvpress/KeepLast")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of another environment: this one, with the stand-in on its path."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "kvpress").mkdir()
    (folder / "kvpress" / "__init__.py").write_text(STAND_IN)
    metadata = folder / "kvpress-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0\n")
    start = f"import sys, runpy; sys.path.insert(0, {str(folder)!r}); runpy.run_path(sys.argv[2], run_name='__main__')"
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def process(tiny_checkpoint: Path, tiny_export: Path, python: Path) -> Iterator[KvpressProcess]:
    process = KvpressProcess(str(tiny_checkpoint), tiny_export / TOKENIZER, python=python, threads=1)
    yield process
    process.close()


def subject(
    process: KvpressProcess, export: Path, budget: float, entry: Entry = KEEP_LAST, **more: bool
) -> KvpressSubject:
    model = open_export(export / "decoder.onnx")
    return KvpressSubject(process, entry, model, lambda tokens: allowed_bytes(budget, tokens, 384, model), **more)


def test_without_a_press_its_logits_are_those_of_our_full_cache(
    process: KvpressProcess, tiny_export: Path, tiny_bundle: Path
):
    from semkv_deploy.bundle import Bundle

    ours = BundleSubject(Bundle.open(tiny_bundle), 1.0, threads=1)
    theirs = subject(process, tiny_export, 1.0, press=False)
    kept = [each.read([IDS[:60], IDS[60:100]]) for each in (ours, theirs)]
    assert kept[0].share == kept[1].share == 1 and kept[1].bytes == 100 * slot_bytes(
        open_export(tiny_export / "decoder.onnx")
    )
    for _ in range(2):
        np.testing.assert_allclose(ours.follow(IDS[100:]), theirs.follow(IDS[100:]), atol=2e-3)
    assert ours.generate(IDS[100:], 6) == theirs.generate(IDS[100:], 6)
    assert "sdpa" in theirs.backend
    ours.close()


def test_a_press_keeps_as_many_bytes_as_a_budget_allows(process: KvpressProcess, tiny_export: Path):
    model = open_export(tiny_export / "decoder.onnx")
    for budget in (0.5, 0.8):
        pressed = subject(process, tiny_export, budget)
        allowed = allowed_bytes(budget, 100, 384, model)
        kept = pressed.read([IDS[:100]])
        assert allowed - slot_bytes(model) < kept.bytes <= allowed
        full = subject(process, tiny_export, 1.0, press=False)
        full.read([IDS[:100]])
        whole = full.follow(IDS[100:])
        pressed = subject(process, tiny_export, budget)
        pressed.read([IDS[:100]])
        assert np.abs(pressed.follow(IDS[100:]) - whole).max() > 1e-2


def test_what_fails_is_named(process: KvpressProcess, tiny_export: Path):
    with pytest.raises(SemkvError, match="kvpress has no press Other; it has KeepLast"):
        subject(process, tiny_export, 0.5, Entry("kvpress/Other", "kvpress/Other"))
    failing = subject(
        process, tiny_export, 0.5, Entry("kvpress/KeepLast:raises=1", "kvpress/KeepLast", {"raises": True})
    )
    with pytest.raises(SemkvError, match="kvpress fails: ValueError: told to"):
        failing.read([IDS[:100]])


def test_an_interpreter_without_kvpress_says_how_to_get_one(tiny_checkpoint: Path, tiny_export: Path, tmp_path: Path):
    missing = tmp_path / "python"
    with pytest.raises(SemkvError, match=r"--kvpress-python .*cannot be run"):
        KvpressProcess(str(tiny_checkpoint), tiny_export / TOKENIZER, python=missing)
    missing.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    missing.chmod(0o755)
    process = KvpressProcess(str(tiny_checkpoint), tiny_export / TOKENIZER, python=missing)
    with pytest.raises(SemkvError, match=r"No module named.*pip install kvpress gguf"):
        subject(process, tiny_export, 0.5)
    process.close()
