"""A plan on the tiny model, and methods at the two ends of what one can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from semkv_deploy.compiler.calibrate import calibration_text
from semkv_deploy.evaluate.entries import Entry
from semkv_deploy.evaluate.run import Plan
from semkv_deploy.evaluate.tasks import TASKS
from semkv_deploy.methods import METHODS, StreamingLLM
from semkv_deploy.methods.full import Full


class Keeper(Full):
    """Returns the full cache, whatever the budget."""

    kind: Literal["keeper"] = "keeper"  # type: ignore[assignment]


class Forgetter(StreamingLLM):
    """Deletes everything."""

    kind: Literal["forgetter"] = "forgetter"  # type: ignore[assignment]
    sinks: int = 0
    forgets: ClassVar[bool] = True

    def behaviours(self, model: Any, profile: Any, settings: Any) -> list[Any]:
        (room,) = super().behaviours(model, profile, settings)
        return [room.model_copy(update={"keep_slots": (0,) * len(profile.groups), "least": 0})]


@pytest.fixture(scope="session")
def ends() -> Iterator[list[Entry]]:
    """Both, registered."""
    METHODS.update(keeper=Keeper, forgetter=Forgetter)
    yield [Entry("keeper", "keeper"), Entry("forgetter", "forgetter")]
    for name in ("keeper", "forgetter"):
        METHODS.pop(name)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for `--text prose=FILE`."""
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    path.write_text(calibration_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def plan_at(tiny_export: Path, corpus: Path) -> Callable[..., Plan]:
    """A plan of two examples of a task or two at 256 tokens, in a folder."""

    def make(out: Path, methods: list[Entry], tasks: tuple[str, ...], **changes: Any) -> Plan:
        plan: dict[str, Any] = {"budgets": [0.5], "context": 256, "examples": 2, "texts": {"prose": corpus}, **changes}
        source = str(tiny_export / "decoder.onnx")
        return Plan(source=source, out=out, methods=methods, tasks=[TASKS[name] for name in tasks], **plan)

    return make
