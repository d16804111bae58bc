"""Turns that are compressed one by one: a training-free stand-in for SONIC, with any method that compresses in place.

A finished turn is compressed once, to its share of slots, and what it keeps stays as it is: not chosen from again, not
merged, not fitted, not dropped, while there is room. Compressing again what was compressed is what costs most over many
turns (FlowKV, arXiv 2505.15347). The programs are the method's own; a host gives them the slots of older turns as
further sinks (`behaviours.IsolatedTurns`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.base import Method
from semkv_deploy.methods.behaviours import IsolatedTurns, MakeRoom

if TYPE_CHECKING:
    from typing_extensions import Self

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.methods.behaviours import Behaviour
    from semkv_deploy.methods.calibration import Settings
    from semkv_deploy.model.config import ModelFacts


class IsolatesTurns(Method):
    """A method that compresses either all that is held, or each turn by itself.

    Attributes:
        turns: "together": whatever is held is compressed, when the cache is full or a turn ends; "isolated": each turn
            once, as the next one begins or (`compress_at=turn`) as it ends.
    """

    turns: Literal["together", "isolated"] = "together"

    @property
    def isolates(self) -> bool:
        """Whether slots below `sinks` are of older turns, and nothing of what is dropped may go into them."""
        return self.turns == "isolated"

    def resolve(self, model: ModelFacts) -> Self:
        """As every method's.

        Raises:
            SemkvError: where turns are to be isolated in a model with sliding windows.
        """
        method = super().resolve(model)
        if self.isolates and any(model.windows):
            raise SemkvError(
                "turns=isolated takes tokens from the middle, which a sliding window does not allow",
                where=f"--method {self.kind}",
                expected="a model without sliding windows",
                got=f"windows of {max(model.windows)} tokens",
                fix="leave turns=isolated out",
            )
        return method

    def behaviours(self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None) -> list[Behaviour]:
        behaviours = super().behaviours(model, profile, settings)
        if not self.isolates:
            return behaviours
        keep = min(group.keep_slots for group in profile.groups)
        if self.sinks > keep - keep // 2:
            # Older turns may have to do with half of what may stay, and sinks are of the oldest.
            raise SemkvError(
                "sinks are more than older turns may keep",
                where=f"--method-option sinks={self.sinks}, budget {profile.budget:g}",
                expected=f"at most {keep - keep // 2}, half of the {keep} slots that may stay",
                got=self.sinks,
                fix="ask for fewer, or raise --budget or --max-context",
            )
        when = "turn" if self.compress_at == "turn" else "begin"
        return [
            IsolatedTurns(**{**each.model_dump(include=_SHARED), "when": when}) if isinstance(each, MakeRoom) else each
            for each in behaviours
        ]


_SHARED = {name for name in MakeRoom.model_fields if name != "kind" and not name.endswith("_rule")}
"""Numbers that mean something in both: of all slots, or of a turn's own."""
