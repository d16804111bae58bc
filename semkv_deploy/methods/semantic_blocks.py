"""What methods on semantic blocks share: where text is cut into them, and how that is calibrated (DynSplit-KV)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.base import Method
from semkv_deploy.methods.calibration import Settings
from semkv_deploy.methods.dd_select import DelimiterTable, Regions, delimiter_table
from semkv_deploy.methods.importance_prediction import ScoreWeights
from semkv_deploy.model.blocks import UNIT, DomainWeights

if TYPE_CHECKING:
    from typing_extensions import Self

    from semkv_deploy.methods.calibration import CalibrationText
    from semkv_deploy.model.config import ModelFacts


class DynSplitSettings(Settings):
    """What calibration gave.

    Attributes:
        table: weights of delimiters; None for blocks that are cut without.
        scores: how importance is predicted; None where it is measured.
    """

    table: DelimiterTable | None
    scores: ScoreWeights | None


class SemanticBlocks(Method):
    """Options of methods that cut text into blocks.

    Attributes:
        blocks: where blocks end: "dynamic", at the delimiter of the largest weight near `block`; "delimiters", at the
            delimiter that is nearest; "fixed", after `block` tokens.
        block: tokens of a block where no delimiter says otherwise (the paper's C).
        search: how far from it a boundary is looked for (the paper's delta); None: a quarter of `block`.
        nearness: standard deviations of weight that a boundary loses at the end of the window; 0: the paper's argmax.
        domain: whose weights count, of those it is calibrated on; "auto": the domain to which the delimiters so far are
            likeliest.
        retained, future, alpha: regions of DD-Select; see `dd_select`.
    """

    blocks: Literal["dynamic", "delimiters", "fixed"] = "dynamic"
    block: int = Field(default=16, ge=4, le=64)
    search: int | None = Field(default=None, ge=0, le=16)
    nearness: float = Field(default=0.5, ge=0, le=8)
    domain: str = "auto"
    retained: int = Field(default=32, ge=1, le=256)
    future: int = Field(default=16, ge=1, le=256)
    alpha: float = Field(default=1.0, ge=0, le=100)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if 4 * self.radius > self.block:
            raise ValueError(f"search is at most a quarter of block, {self.block // 4}")
        return self

    @property
    def radius(self) -> int:
        """How far from `block` a boundary is looked for."""
        if self.blocks == "fixed":
            return 0
        return self.block // 4 if self.search is None else self.search

    @property
    def longest(self) -> int:
        """Most tokens of a block."""
        return self.block + self.radius

    @property
    def reads_domains(self) -> bool:
        return self.blocks == "dynamic"

    @property
    def regions(self) -> Regions:
        return Regions(self.retained, self.future, self.alpha)

    def check_domains(self, names: Sequence[str]) -> None:
        if self.domain not in ("auto", *names):
            raise SemkvError(
                "no weights for the domain",
                where=f"--method-option domain={self.domain}",
                expected=" or ".join(names),
                fix="calibrate on a text of it: semkv-deploy calibrate --text DOMAIN=FILE",
            )

    def table(self, model: ModelFacts, text: CalibrationText) -> DelimiterTable | None:
        """Weights of delimiters; None for blocks that are cut without."""
        if not self.reads_domains:
            return None
        return text.known or delimiter_table(text.domains, self.regions, model.vocab_size)

    def rule(self, model: ModelFacts, settings: Settings | None) -> dict[str, Any]:
        """Fields of `model.blocks.BlockRule`. Without calibration all delimiters weigh the same."""
        table = settings.table if isinstance(settings, DynSplitSettings) else None
        dynamic = self.blocks == "dynamic"
        domains: tuple[DomainWeights, ...] = ()
        number = None
        if dynamic and table is not None:
            domains = table.domains
            if self.domain != "auto":
                number = [domain.name for domain in domains].index(self.domain)
        elif self.blocks != "fixed":
            domains = (DomainWeights(name="any", weights=(0,), log_shares=(0,)),)
        return {
            "base": self.block,
            "search": self.radius,
            "nearness": round(UNIT * self.nearness) if dynamic else 0,
            "turn_ids": tuple(sorted(model.eos_token_ids)) if dynamic else (),
            "token_ids": table.token_ids if dynamic and table is not None else (),
            "domains": domains,
            "domain": number,
        }
