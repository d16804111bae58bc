"""What a target is given to build from: the model, the method, the profiles, and the portable graphs on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.bundle.contract import Contract, GraphContract, make_contract
from semkv_deploy.methods.behaviours import Blocks
from semkv_deploy.methods.layout import COMPRESS, DECODE

if TYPE_CHECKING:
    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.choices import EngineLayout
    from semkv_deploy.methods import Method
    from semkv_deploy.methods.calibration import Settings
    from semkv_deploy.model.cache_groups import GroupShare
    from semkv_deploy.model.config import ModelFacts

Progress = Callable[[str, float | None], None]
"""Called with what is being done, and the share of it that is done (None: unknown)."""


def file_stem(program: str) -> str:
    """What the files of a program's graphs are called by."""
    return "compressor" if program == COMPRESS else program


class WrittenProgram(NamedTuple):
    """A method's portable graph on disk.

    Attributes:
        name: of the program.
        file: relative to the bundle.
        groups: numbers of the cache groups that it is for.
        in_place: input -> output that may be one buffer.
    """

    name: str
    file: str
    groups: tuple[int, ...]
    in_place: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class TargetInputs:
    """Everything that targets are built from.

    Attributes:
        root: the bundle that is being written; `onnx/` in it holds the portable graphs.
        groups: cache groups and their shares.
        profiles: one for each budget, in rising order.
        settings: what the method was calibrated to.
        programs: the method's graphs.
        stop_ids: token ids that end a reply.
    """

    root: Path
    model: ModelFacts
    method: Method
    max_context: int
    groups: tuple[GroupShare, ...]
    profiles: tuple[BudgetProfile, ...]
    settings: Settings | None
    programs: tuple[WrittenProgram, ...]
    stop_ids: tuple[int, ...]
    progress: Progress

    @property
    def portable(self) -> Path:
        """The portable decoder."""
        return self.root / "onnx" / "decoder.onnx"

    def contract(
        self,
        target: str,
        profile: BudgetProfile,
        graphs: Mapping[str, Sequence[GraphContract]],
        *,
        dtype: str,
        batch: int | None = None,
        engine_layout: EngineLayout | None = None,
        native: int | None = None,
    ) -> Contract:
        """The contract of one budget; programs that none of its behaviours runs are left out."""
        wanted = {DECODE, *self.used_programs(profile)}
        return make_contract(
            target,
            profile,
            self.model,
            self.method,
            self.settings,
            max_context=self.max_context,
            stop_ids=self.stop_ids,
            batch=batch,
            dtype=dtype,
            engine_layout=engine_layout,
            native=native,
            graphs={name: of_program for name, of_program in graphs.items() if name in wanted},
        )

    def used_programs(self, profile: BudgetProfile) -> set[str]:
        """Names of the programs that a profile's behaviours run."""
        behaviours = self.method.behaviours(self.model, profile, self.settings)
        return {behaviour.program for behaviour in behaviours if not isinstance(behaviour, Blocks)}
