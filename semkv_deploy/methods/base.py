"""What a compression method is: its parameters, what it keeps, its graphs, what a host does, and its slow statement.

A method knows operators and the model; it knows nothing of targets. Its programs are portable graphs of domain `semkv`,
its behaviours are data, and both go into the contract, so that a session and any other host need to know no method.

The program "compress" works on one cache group. All methods' have the same names, with `B` rows, `H` KV heads of the
group, `G` cluster groups (1 when all heads of a group share clusters, else H), `C` slots, `D` head size, `L` levels:

| input | shape, type | meaning |
|---|---|---|
| key_cache, value_cache | `[B,H,C,D]` T | the group's cache |
| slot_bias | `[B,H,C]` float32 | added to a slot's logit |
| length | `[B]` int64 | live slots |
| slot_position | `[B,G,C]` int64 | position of the token (of a core: of its seed) in a slot |
| slot_chunk | `[B,G,C]` int64 | `2 * chunk number + (1 if the token is a delimiter)` |
| target | `[B]` int64 | most slots that may stay; a row at or below it is copied unchanged |
| sinks | `[]` int64 | first slots that are never touched |
| recent | `[B]` int64 | last slots that are never merged |
| thresholds | `[L]` float32 | similarity thresholds, one for each level of tightening |
| weights | `[H*(F+1)]` float32 | of each head's F features of a slot, then a constant: what slots are scored by |
| slot_attention | `[B,H,C]` float32 | the group's, where the decoder records it; moves with the slots |
| scored | `[]` float32 | 1, or 0 where no slot's attention counts |
| reference_queries | `[B,H,R,D]` float32 | the group's, where the decoder keeps some; used up |
| keep_index | `[B,1,C]` int64 | in place of a target: slots that stay, in order, then -1 |
| slot_turn | `[B,1,C]` int64 | see `layout.TURN` |

Outputs: `key_cache_out … slot_chunk_out`, `length_out`, `level` `[B]` (the level taken, -1: nothing to do) and
`evicted` `[B]` (slots dropped because no level met the target). A method declares only the inputs it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from semkv_deploy.methods.behaviours import MakeRoom
from semkv_deploy.methods.layout import (
    BIAS,
    CHUNK,
    COMPRESS,
    DECODE,
    KEY,
    POSITION,
    VALUE,
    Binding,
    Buffer,
    CacheLayout,
    Program,
    Scope,
)
from semkv_deploy.model import names

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from torch import Tensor
    from typing_extensions import Self

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.choices import BudgetBy
    from semkv_deploy.methods.behaviours import Behaviour
    from semkv_deploy.methods.calibration import CalibrationText, Settings
    from semkv_deploy.methods.dd_select import Regions
    from semkv_deploy.model.cache_groups import CacheGroup
    from semkv_deploy.model.config import ModelFacts

STATE = ("key_cache", "value_cache", "slot_bias", "length", "slot_position", "slot_chunk")
"""Tensors of "compress" that go in as `name` and come out as `name_out`."""

BiasMode = Literal["none", "group", "head"]
"""Slot biases of a cache group: always zero; equal for all of its heads; one for each KV head."""

State = dict[str, "Tensor"]


class Method(BaseModel):
    """A compression method and its parameters.

    A subclass sets `kind`, and overrides what differs from a cache that only grows: `programs` and `reference` for one
    that compresses; `layout`, `rewrite_decoder` and `behaviours` for one that keeps or does more.

    Attributes:
        compress_at: "full": when the next append would not fit, down to the profile's keep_slots (nothing is lost
            before it must be); "turn": at every turn end, down to budget x tokens seen (as the papers do), and when
            full.
        sinks: first slots that are never touched.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    compress_at: Literal["full", "turn"] = "full"
    sinks: int = Field(default=4, ge=0)

    merges: ClassVar[bool] = False
    """Whether slots can stand for several tokens: their bias is then not zero."""

    compresses: ClassVar[bool] = True
    """Whether the method has a program "compress"; one without it keeps every token."""

    learned: ClassVar[bool] = False
    """Whether it needs a file that was trained for the model, so that it has no parameters that fit every model."""

    def for_build(self, *, records: bool, capped: bool = False) -> Self:
        """The method with every choice made that depends on the decoders it is built for.

        Args:
            records: whether those of all targets can record attention.
            capped: whether they cap its logits.
        """
        return self

    def resolve(self, model: ModelFacts) -> Self:
        """The method with every choice made that depends on the model, so that manifests say what was built."""
        return self

    @property
    def more_columns(self) -> tuple[str, ...]:
        """Slot columns beside the position and the chunk."""
        return ()

    @property
    def budget_by(self) -> BudgetBy:
        """How `build` shares a budget among layers and heads where nothing else is asked for."""
        return "uniform"

    # What a host keeps.

    @property
    def clusters_by_head(self) -> bool:
        """Whether each head of a group has clusters, positions and chunks of its own; else its heads share them."""
        return False

    def cluster_groups(self, kv_heads: int) -> int:
        """How many sets of clusters a cache group of `kv_heads` heads has: 1, or one for each head."""
        return kv_heads if self.clusters_by_head else 1

    @property
    def bias_mode(self) -> BiasMode:
        """What the method promises of slot biases, for the decoder's lowering."""
        return "none" if not self.merges else "head" if self.clusters_by_head else "group"

    def layout(self, model: ModelFacts, groups: Sequence[CacheGroup]) -> CacheLayout:
        """What a host keeps: keys, values and biases of every group, and each slot's position and chunk."""
        heads = "Hkv" if self.clusters_by_head else "1"
        columns = tuple(
            Buffer(name=name, shape=f"B,{heads},C", dtype="int64") for name in (POSITION, CHUNK, *self.more_columns)
        )
        return CacheLayout(groups=tuple(groups), buffers=(KEY, VALUE, BIAS), slot_columns=columns)

    def table_elements(self, head_dim: int, group: CacheGroup) -> int:
        """Elements of the cache's type that a row of a group keeps beside its slots."""
        return 0

    def read_elements(self, head_dim: int, group: CacheGroup) -> int:
        """Elements of the cache's type that a decode step reads of a row of a group that is full."""
        return 2 * len(group.heads) * group.capacity * head_dim

    def symbols(self, profile: BudgetProfile) -> dict[str, int]:
        """Sizes of a profile that the method's graphs have as symbols of its own."""
        return {}

    def rewrite_decoder(self, decoder: ir.Model, layout: CacheLayout) -> None:
        """Changes the portable decoder in place, before it is lowered; by default not at all."""

    def rewritten(self, model: Any) -> AbstractContextManager[None]:
        """Inside the block, a transformers model computes what `rewrite_decoder` makes of its graph."""
        return nullcontext()

    # Graphs.

    def bindings(self, program: str, layout: CacheLayout) -> tuple[Scope, dict[str, Binding]]:
        """What one run of a program takes, and the names it has for each buffer."""
        if program == DECODE:
            return "cache", {
                buffer.name: Binding(
                    input=names.DECODER_INPUT.get(buffer.name, f"{buffer.name}.{names.TAG}"),
                    output=names.DECODER_OUTPUT.get(buffer.name),
                )
                for buffer in layout.buffers
            }
        state = {"key": "key_cache", "value": "value_cache"}
        return "group", {
            buffer.name: Binding(
                input=state.get(buffer.name, buffer.name), output=f"{state.get(buffer.name, buffer.name)}_out"
            )
            for buffer in layout.buffers
        }

    def programs(self, model: ModelFacts, layout: CacheLayout) -> list[Program]:
        """The portable graphs beside the decoder: "compress", once for each number of heads that groups have."""
        if not self.compresses:
            return []
        return [
            Program(COMPRESS, self.compressor(model.model_copy(update={"kv_heads": heads})), "group", numbers)
            for heads, numbers in layout.by_heads()
        ]

    def compressor(self, model: ModelFacts) -> onnx.ModelProto:
        """The program "compress" for a group of `model.kv_heads` heads.

        Raises:
            NotImplementedError: for a method that keeps every token.
        """
        raise NotImplementedError(f"{self.kind} keeps every token")

    # What a host does.

    def recent_slots(self, target: int) -> int:
        """Slots at the end that are never merged, of `target` slots that may stay."""
        return max(int(self.recent_share * target), self.recent_least)

    @property
    def recent_share(self) -> float:
        """Of the slots that may stay, the share that is a recent window and never merged."""
        return 0.0

    @property
    def recent_least(self) -> int:
        """Slots that are a recent window at least."""
        return 0

    @property
    def reads_again(self) -> bool:
        """Whether a host reads again what was appended, before it compresses (`ReadAgain`)."""
        return False

    @property
    def selects(self) -> bool:
        """Whether a decode step attends to chosen slots only; the method's decoder has no lowering without."""
        return False

    @property
    def reads_domains(self) -> bool:
        """Whether `calibrate` needs texts of several domains with the model's queries (`CalibrationText.domains`)."""
        return False

    @property
    def regions(self) -> Regions:
        """Regions that delimiters of these texts are scored by."""
        raise NotImplementedError(f"{self.kind} scores no delimiters")

    def check_domains(self, names: Sequence[str]) -> None:
        """Fails where the method is for a domain that is not among those that it is calibrated on."""

    # What a memory estimate asks.

    @property
    def merges_dropped(self) -> bool:
        """Whether a compression merges what it drops into what is most like it, by cosines of all to all."""
        return False

    @property
    def fitted_queries(self) -> int:
        """Reference queries of each KV head that slots are fitted to; 0: nothing is fitted."""
        return 0

    @property
    def scores(self) -> bool:
        """Whether the compressor computes a score for every slot from its key and value, by what `calibrate` learned
        from texts that were read again."""
        return False

    @property
    def unrotates(self) -> bool:
        """Whether keys are rotated back before they are merged, where the model allows it."""
        return False

    @property
    def merges_keys(self) -> bool:
        """Whether merged slots get a key of their own."""
        return False

    @property
    def merge_span(self) -> int:
        """Slots further apart than this never merge; 0 where nothing does."""
        return 0

    @property
    def ladder_levels(self) -> int:
        """Length of the ladder of thresholds; 0 without one."""
        return 0

    def calibrate(self, model: ModelFacts, text: CalibrationText) -> Settings | None:
        """What the method needs to know of the model's own keys; None: nothing."""
        return None

    def warnings(self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None) -> list[str]:
        """Sentences about a profile that whoever builds it should read: a budget that the method will not use well."""
        return []

    def group_inputs(
        self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None
    ) -> dict[str, tuple[Any, ...]]:
        """Inputs of "compress" with one value for each group, for the whole of a session.

        In a layer with a sliding window nothing may be merged or taken from the middle: how far apart its slots are is
        how far apart tokens are. Only its oldest slots go.
        """
        return {"sinks": tuple(0 if model.windows[group.layer] > 0 else self.sinks for group in profile.groups)}

    def behaviours(self, model: ModelFacts, profile: BudgetProfile, settings: Settings | None) -> list[Behaviour]:
        """What a host does between runs: make room, where the budget is less than the whole cache."""
        if not self.compresses or profile.budget == 1:
            return []
        return [
            MakeRoom(
                program=COMPRESS,
                when=self.compress_at,
                keep_slots=tuple(group.keep_slots for group in profile.groups),
                turn_share=profile.shares,
                least=self.sinks + 1,
                recent_share=self.recent_share,
                recent_least=self.recent_least,
                reserve=profile.prefill_chunk if self.reads_again else 0,
                by_group=self.group_inputs(model, profile, settings),
            )
        ]

    # The slow statement that graphs are compared with.

    def reference(self, program: str) -> Callable[..., State]:
        """What a program computes, as slow and obvious PyTorch: `f(model, state, **inputs) -> state, level, evicted`.

        `state` has the tensors of `STATE`; outputs have their names without `_out`.

        Raises:
            KeyError: when the method has no such program.
        """
        raise KeyError(program)
