"""The page's method is added from outside the package, built, validated and driven; and taken out again."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import METHODS, method_from_options

from ..bundle import test_contract as contract_tests
from ..methods import test_compressors as compressor_tests
from .blocks import check_quotations

PAGE = "adding_a_method.md"


@pytest.fixture(scope="module")
def thinning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's module, registered while the tests of this file run."""
    path = tmp_path_factory.mktemp("thinning") / "thinning.py"
    path.write_text(check_quotations(PAGE)[0], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("thinning", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["thinning"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["thinning"]
    METHODS.pop("thinning")


@pytest.fixture(scope="module")
def built(
    thinning: ModuleType, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    """What the page's second block leaves: a bundle, and its variables."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "exported").symlink_to(tiny_export)
    variables: dict[str, object] = {"Thinning": thinning.Thinning}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(check_quotations(PAGE)[1], variables)
    return folder / "thinned", variables


def test_there_are_two_blocks_to_run():
    assert len(check_quotations(PAGE)) == 2


def test_it_is_a_method_like_the_others(thinning: ModuleType):
    assert METHODS["thinning"] is thinning.Thinning
    assert method_from_options("thinning", {"sinks": 2}) == thinning.Thinning(sinks=2)


@pytest.mark.parametrize("keep", [0.75, 0.3])
def test_its_graph_keeps_the_rules_of_the_page(thinning: ModuleType, keep: float):
    """What a row in the matrix runs."""
    compressor_tests.test_graph_matches_the_reference(thinning.Thinning(), keep)
    compressor_tests.test_no_shape_depends_on_data(thinning.Thinning())


def test_it_says_what_it_does_not_do(thinning: ModuleType):
    with pytest.raises(SemkvError, match="sliding windows"):
        thinning.Thinning().resolve(compressor_tests.facts(windows=(8,)))


def test_page_runs_and_every_target_is_validated(built: tuple[Path, dict[str, object]]):
    root, variables = built
    report, session = variables["report"], variables["session"]
    assert report.passed  # type: ignore[attr-defined]
    compared = [result for result in report.results if result.events]  # type: ignore[attr-defined]
    assert {result.target for result in compared} == {"onnxruntime-cpu", "tensorrt-rtx"}
    assert all(result.compressions > 0 and result.slots_same == 1 for result in compared if result.budget == 0.25)
    assert session.position.tolist() == [300]  # type: ignore[attr-defined]
    assert 0 < session.length.max() <= 128  # type: ignore[attr-defined]
    positions = session.slot_position[0][0, 0, : session.length[0, 0]]  # type: ignore[attr-defined]
    assert positions[-1] == 299 and (np.diff(positions) > 0).all() and len(positions) < 299
    opened = Bundle.open(root)
    assert opened.manifest.method.kind == "thinning"
    assert opened.fingerprint == variables["bundle"].fingerprint  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "tensorrt-rtx"])
def test_a_host_of_the_contract_alone_drives_it(built: tuple[Path, dict[str, object]], target: str):
    root, _ = built
    contract_tests.converse(Bundle.open(root), root, target, 2, atol=0)


def test_memory_of_a_build_is_estimated(thinning: ModuleType, tiny_export: Path):
    from semkv_deploy.memory.estimate import make_plan

    rows = make_plan(str(tiny_export / "decoder.onnx"), budgets=[0.25], method=thinning.Thinning()).rows
    assert rows[0].capacity == 128


def test_command_line_knows_it(thinning: ModuleType):
    from click.testing import CliRunner

    from semkv_deploy.cli.main import main

    assert "thinning" in CliRunner().invoke(main, ["build", "--help"]).output


def test_registry_refuses_a_second_method_of_its_name(thinning: ModuleType):
    from semkv_deploy.methods import register

    class Other(thinning.Thinning):  # type: ignore[name-defined,misc]
        pass

    assert register(thinning.Thinning) is thinning.Thinning
    with pytest.raises(ValueError, match="a kind of its own"):
        register(Other)


def test_a_bundle_of_a_method_that_is_not_registered_is_refused(built: tuple[Path, dict[str, object]]):
    root, variables = built
    METHODS.pop("thinning")
    try:
        with pytest.raises(SemkvError, match=r"unknown method .*got 'thinning'.*registers the method"):
            Bundle.open(root)
    finally:
        METHODS["thinning"] = variables["Thinning"]  # type: ignore[assignment]
