"""What a compression method is: its parameters, and one portable graph that compresses the cache of one layer.

Every compressor graph has the same names, so that a session needs to know nothing about methods. `B` rows, `H` KV
heads, `G` cluster groups (1 when all heads of a layer share clusters, else H), `C` slots, `D` head size, `L` levels:

| input | shape, type | meaning |
|---|---|---|
| key_cache, value_cache | `[B,H,C,D]` T | one layer's cache |
| slot_bias | `[B,H,C]` float32 | added to a slot's logit |
| length | `[B]` int64 | live slots |
| slot_position | `[B,G,C]` int64 | position of the token (of a core: of its seed) in a slot |
| slot_chunk | `[B,G,C]` int64 | `2 * chunk number + (1 if the token is a delimiter)` |
| target | `[B]` int64 | most slots that may stay; a row at or below it is copied unchanged |
| sinks | `[]` int64 | first slots that are never touched |
| recent | `[B]` int64 | last slots that are never merged |
| thresholds | `[L]` float32 | similarity thresholds, one for each level of tightening |

Outputs: `key_cache_out … slot_chunk_out`, `length_out`, `level` `[B]` (the level taken, -1: nothing to do) and
`evicted` `[B]` (slots dropped because no level met the target). A method declares only the inputs it uses.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import onnx
    from typing_extensions import Self

    from semkv_deploy.model.config import ModelFacts

STATE = ("key_cache", "value_cache", "slot_bias", "length", "slot_position", "slot_chunk")
"""Tensors that go in as `name` and come out as `name_out`."""


class Method(BaseModel):
    """A compression method and its parameters. Subclasses set `kind` and build the compressor graph.

    Attributes:
        compress_at: "full": when the next append would not fit, down to the profile's target (nothing is lost before
            it must be); "turn": at every turn end, down to budget x tokens seen (as the papers do), and when full.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    compress_at: Literal["full", "turn"] = "full"
    sinks: int = Field(default=4, ge=0)

    merges: ClassVar[bool] = False
    """Whether slots can stand for several tokens: their bias is then not zero."""

    def groups(self, kv_heads: int) -> int:
        """Cluster groups G of the compressor graph for a layer of `kv_heads` heads."""
        return 1

    def recent_slots(self, target: int) -> int:
        """Slots at the end that are never merged, of `target` slots that may stay."""
        return 0

    def thresholds(self, calibrated: float | None) -> list[float]:
        """The thresholds of a layer, tried in order, given the threshold calibrated for the budget (None: none was)."""
        return []

    def for_model(self, facts: ModelFacts) -> Self:
        """The method with every choice that depends on the model made, so that manifests say what was built."""
        return self

    @abstractmethod
    def compressor(self, facts: ModelFacts) -> onnx.ModelProto | None:
        """The portable compressor graph of one layer (domain `semkv`, functions included); None: never compresses."""

    def calibration_graph(self, facts: ModelFacts) -> onnx.ModelProto | None:
        """A graph that clusters one layer at one threshold and has `length_out`; None: the method has no threshold.

        Its inputs are the state and `thresholds` `[1]`.
        """
        return None
