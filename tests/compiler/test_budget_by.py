"""Bundles whose budget is shared among layers or heads by what is looked at: built, run, validated, shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from semkv_deploy.bundle import Bundle
from semkv_deploy.cli.main import main
from semkv_deploy.compiler import reading
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import Importance, Method, SemantiCache
from semkv_deploy.methods.calibration import Reading
from semkv_deploy.methods.importance_prediction import ScoreWeights
from semkv_deploy.runtime.open import open_session
from semkv_deploy.targets.tensorrt.build import TensorRTOptions

WORDS = [5 + (7 * n + n // 9) % 500 for n in range(450)]


@pytest.fixture(autouse=True)
def uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only head 0 of layer 1 is looked at much; a random model's heads are all alike."""
    read_again = reading.read_again

    def uneven_readings(*arguments: Any) -> list[Reading]:
        found = read_again(*arguments)
        for each in found:
            each.attention[0] /= 1000
            each.attention[1][1] /= 1000
        return found

    monkeypatch.setattr(reading, "read_again", uneven_readings)


def built(export: Path, out: Path, **options: Any) -> Bundle:
    given: dict[str, Any] = {
        "budgets": [0.25, 0.5],
        "method": Importance(queries="predicted"),
        "budget_by": "head",
        "weights": "fp32",
        "target": ["onnxruntime-cpu", "tensorrt-rtx"],
        "tensorrt": TensorRTOptions(engines=False, dtype="float32"),
    }
    return build_bundle(str(export / "decoder.onnx"), out, **{**given, **options})


@pytest.mark.parametrize(
    "method, by",
    [(Importance(queries="predicted"), "head"), (SemantiCache(), "layer")],
    ids=["importance-head", "semanticache-layer"],
)
def test_capacities_differ_and_the_sum_is_the_budget(method: Method, by: Any, tiny_export: Path, tmp_path: Path):
    """What is looked at most has most, on every target."""
    bundle = built(tiny_export, tmp_path / "bundle", method=method, budget_by=by)
    for target in bundle.manifest.targets.values():
        quarter, half = (record.contract.cache.groups for record in target.budgets)
        for groups, budget in ((quarter, 0.25), (half, 0.5)):
            assert 0.75 < sum(len(group.heads) * group.capacity for group in groups) / (4 * 512 * budget) <= 1
        slots = {(group.layer, head): group.capacity for group in quarter for head in group.heads}
        assert slots[0, 0] == slots[0, 1] < slots[1, 0]
        assert slots[1, 1] == (slots[1, 0] if by == "layer" else slots[0, 0])
        assert [(group.layer, group.heads) for group in quarter] == [(group.layer, group.heads) for group in half]
    for budget in (0.25, 0.5):
        session = open_session(bundle, budget=budget)
        session.prefill(WORDS)
        session.step([5])
        assert session.stats.runs > 1 and session.position[0] == 451
        most = [group.capacity for group in session.contract.cache.groups]
        assert (session.length[:, 0] <= most).all() and (session.length[:, 0] >= np.array(most) // 2).all()


def test_every_target_agrees_with_the_portable_graphs(tiny_export: Path, tmp_path: Path):
    from semkv_deploy import validate_bundle

    built(tiny_export, tmp_path / "bundle")
    report = validate_bundle(tmp_path / "bundle", tokens=400)
    assert report.passed, [result for result in report.results if result.status == "failed"]


def test_the_method_learns_what_attention_depends_on(tiny_export: Path, tmp_path: Path):
    bundle = built(tiny_export, tmp_path / "bundle", budget_by="uniform", target="onnxruntime-cpu")
    settings = ScoreWeights.model_validate(bundle.manifest.calibration)
    assert settings.correlation is not None and 0.1 < settings.correlation < 1
    room = bundle.built("onnxruntime-cpu", 0.25).contract.make_room
    assert room is not None and room.by_group["weights"] == settings.weights
    assert all(np.any(row) for row in room.by_group["weights"])


def test_groups_are_given_or_calibrated_not_both(tiny_export: Path, tmp_path: Path):
    with pytest.raises(SemkvError, match="--budget-by layer: cache groups are given, and are to be"):
        built(tiny_export, tmp_path / "bundle", groups="head", budget_by="layer")
    assert not (tmp_path / "bundle").exists()


def test_the_summary_has_the_slots_of_every_layer(tiny_export: Path, tmp_path: Path):
    source, out = str(tiny_export / "decoder.onnx"), str(tmp_path / "bundle")
    options = ["--budget", "0.25", "--budget", "0.5", "--weights", "fp32", "--method", "importance", "-o", out]
    result = CliRunner().invoke(main, ["build", source, "--budget-by", "head", *options])
    assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(main, ["inspect", out]).output
    assert "slots at 0.25" in shown and "slots at 0.5" in shown and "cache groups over 2 layers" in shown
