"""The contract of one budget: everything a host must know to run a bundle, as data, the same for every target.

It lies in `bundle.json`, one for each budget of each target. A host in any language allocates the buffers, binds them
by the names that the programs give, gives both names of an alias pair one buffer, and follows the rules and behaviours;
`examples/contract_host.py` is such a host, written from the manifest alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from semkv_deploy.choices import CacheType, EngineLayout
from semkv_deploy.methods.behaviours import Behaviour, BlockTables, MakeRoom, SlotTables
from semkv_deploy.methods.layout import COMPRESS, DECODE, Binding, CacheLayout, Scope, with_scales
from semkv_deploy.sizes import row_bytes

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.methods.base import Method
    from semkv_deploy.methods.calibration import Settings
    from semkv_deploy.model.config import ModelFacts

SCHEMA_VERSION = 5

Phase = Literal["decoder", "prefill", "decode", "compressor"]
"""What a graph of a program is for: prompts and steps, prompts, steps; or a group's compression."""

DELIMITERS = "delimiters.json"

POSITION_RULE = (
    "position_ids count tokens seen since the conversation began; they are never derived from length, which is smaller "
    "after a compression"
)
APPEND_RULE = (
    "rows are written at slots length[group, row] and up; the host keeps length + rows <= the group's capacity, adds "
    "rows to length after the run, and lets behaviours make room before a run that would not fit; without one, such a "
    "run is refused"
)
DEAD_SLOT_RULE = (
    "keys and values at and above length hold any finite value and change nothing; in float16 without plugins, keys "
    "there whose scaled product with a query reaches 60000 would show, so clear buffers that held anything but this "
    "model's keys; slot_bias at and above length must be 0, because an appended slot keeps the bias that lies there"
)
BIAS_RULE = (
    "slot_bias is a float32 buffer of the host for each group, 0 at first; the decoder only reads it, compressing "
    "writes it, with 0 at and above the new length; -inf in a live slot hides it; a decoder without slot_bias inputs "
    "counts every live slot once"
)
CONVERSATION_RULE = (
    "a new conversation sets position, length and the chunk count of every row, and all buffers of dtype float32, to "
    "0; keys and values may stay"
)
BATCH_RULE = (
    "a prompt goes in pieces of at most prefill_chunk tokens, one row at a time: the run has batch 1, length is "
    "[groups, 1], and each buffer is bound to that row's slice; a decode step runs every row, and one that is not "
    "wanted keeps its position and length: its token lies in a dead slot then; where an unwanted row has no dead slot "
    "left in some group, the wanted rows are run one by one, as a prompt of one token is"
)
LOGITS_RULE = (
    "logits_index says of which of the run's tokens the logits are wanted, counted from 0 within the run, the same "
    "number for every row: [[rows - 1]] after a piece of a prompt, [[0]] in a decode step"
)
SHAPE_RULE = (
    "a buffer's bytes lie as its shape says, with Hkv and C of its group; a graph may view them in another shape of as "
    "many elements (heads in the first axis): then the first axis of the run is batch x Hkv"
)
NAME_RULE = (
    "patterns of a program's buffers have {group}: the group's number in decimal, padded with zeros to the width of "
    "the last group's, two digits at least; a buffer whose name the graph does not have is not bound"
)
SLOT_RULE = (
    "the host keeps the slot columns, int64 [batch, 1 or heads, capacity] for every group: slot_position, the position "
    "of the token appended in a slot, and slot_chunk, 2 x chunk number + 1 if the token is a delimiter, else + 0; a "
    "row's chunk number starts at 0 and grows by 1 at each token that is no delimiter and whose predecessor in the "
    "row, over all runs, is one; they go into a program and come out with their slots; delimiters are the token_ids of "
    "the file delimiters"
)


class TensorContract(BaseModel):
    """One input or output.

    Attributes:
        name: in the graph.
        dtype: element type.
        shape: numbers where it is static, names where it is not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int8", "int64"]
    shape: tuple[int | str, ...]


class ProfileContract(BaseModel):
    """One optimization profile.

    Attributes:
        phase: the runs that it is for.
        shapes: of the dynamic inputs as (min, opt, max); none where all is static.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Literal["prefill", "decode", "both", "compress"]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class GraphContract(BaseModel):
    """One graph, or the engine built from it.

    Attributes:
        name: unique within the contract.
        phase: prompts and steps ("decoder"), prompts ("prefill"), steps ("decode"), or a group's compression.
        onnx: the graph's file, relative to the bundle.
        plan: the engine's file; None: the graph itself is run, or no engine was built.
        groups: numbers of the cache groups that it takes; of a program of scope "group", one of them a run.
        inputs, outputs: all of them, in the graph's order.
        aliases: input -> output that must be the same buffer.
        profiles: optimization profiles in the order of the engine's profile indices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    phase: Phase
    onnx: str
    plan: str | None = None
    groups: tuple[int, ...]
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]
    aliases: dict[str, str]
    profiles: tuple[ProfileContract, ...] = ()

    def has_input(self, name: str) -> bool:
        """Whether the graph has an input of this name."""
        return any(tensor.name == name for tensor in self.inputs)


class ProgramContract(BaseModel):
    """A program: what one run takes, how its buffers are bound, and its graphs; a host picks the one that fits.

    Attributes:
        scope: "cache": every group's buffers; "group": those of one group.
        buffers: by the layout's buffer names.
        graphs: for other phases, or for groups of other sizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scope: Scope
    buffers: dict[str, Binding]
    graphs: tuple[GraphContract, ...] = Field(min_length=1)


class Contract(BaseModel):
    """One budget of one target, as a host sees it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = Field(default=SCHEMA_VERSION, description="of contracts; a host refuses others")
    target: str = Field(description="runtime that the graphs are for; portable: any, in domain semkv")
    budget: float = Field(description="share of cache entries kept, over all groups", gt=0, le=1)
    batch: int | None = Field(description="rows; null: the host chooses, buffers and graphs take any number", ge=1)
    max_context: int = Field(description="most tokens a row may have", ge=1, lt=1 << 31)
    prefill_chunk: int = Field(description="most rows of one prefill run", ge=1, lt=1 << 31)
    dtype: CacheType = Field(
        description="element type T of the caches; int8: a slot's codes times its key_scale or value_scale are the row"
    )
    native: int | None = Field(
        default=None,
        description="version of libsemkv_onnxruntime (onnxruntime-cuda: libsemkv_onnxruntime_cuda), whose operators "
        "the graphs have; null: they need no library",
        ge=1,
    )
    engine_layout: EngineLayout | None = Field(description="of TensorRT targets; null elsewhere")
    layers: int = Field(description="decoder layers", ge=1, lt=1 << 16)
    kv_heads: int = Field(description="KV heads of a layer, over all of its groups", ge=1, lt=1 << 16)
    query_heads: int = Field(description="query heads of a layer", ge=1, lt=1 << 16)
    head_dim: int = Field(description="D, elements of a key or a value", ge=1, lt=1 << 16)
    vocab_size: int = Field(description="token ids are below it; logits have as many", ge=1, lt=1 << 31)
    windows: tuple[int, ...] = Field(description="by layer, tokens of its sliding window, which the graph has; 0: none")
    stop_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field(
        description="token ids that end a reply; they are not appended"
    )
    delimiters: str = Field(description="file of the bundle whose token_ids end a chunk")
    cache: CacheLayout = Field(description="groups, buffers, slot columns and step inputs")
    programs: dict[str, ProgramContract] = Field(
        description="by name; decode is the decoder, others are run by behaviours"
    )
    behaviours: tuple[Behaviour, ...] = Field(description="what the host does between runs; none: it only appends")
    position_rule: str = POSITION_RULE
    append_rule: str = APPEND_RULE
    dead_slot_rule: str = DEAD_SLOT_RULE
    bias_rule: str = BIAS_RULE
    conversation_rule: str = CONVERSATION_RULE
    batch_rule: str = BATCH_RULE
    logits_rule: str = LOGITS_RULE
    shape_rule: str = SHAPE_RULE
    name_rule: str = NAME_RULE
    slot_rule: str = SLOT_RULE

    @property
    def capacity(self) -> int:
        """Slots of the largest group."""
        return max(group.capacity for group in self.cache.groups)

    @property
    def decoders(self) -> tuple[GraphContract, ...]:
        """Graphs of the decoder."""
        return self.programs[DECODE].graphs

    @property
    def compressors(self) -> tuple[GraphContract, ...]:
        """Graphs that compress a group; none where nothing is compressed."""
        return self.programs[COMPRESS].graphs if COMPRESS in self.programs else ()

    @property
    def graphs(self) -> tuple[GraphContract, ...]:
        """Graphs of all programs, in order."""
        return tuple(graph for program in self.programs.values() for graph in program.graphs)

    @property
    def make_room(self) -> MakeRoom | None:
        """The behaviour that compresses; None where nothing is compressed."""
        return next((behaviour for behaviour in self.behaviours if isinstance(behaviour, MakeRoom)), None)

    @property
    def tables(self) -> tuple[BlockTables | SlotTables, ...]:
        """The behaviour that keeps tables of blocks; empty where no step chooses among them."""
        return tuple(behaviour for behaviour in self.behaviours if isinstance(behaviour, BlockTables | SlotTables))

    @property
    def exchanged_buffers(self) -> tuple[str, ...]:
        """Buffers that a group's program gives back elsewhere than it took them: a host has spare ones of these."""
        found: set[str] = set()
        for program in self.programs.values():
            for name, binding in program.buffers.items() if program.scope == "group" else ():
                source, result = binding.names(0, len(self.cache.groups))
                if source and result and any(graph.aliases.get(source) != result for graph in program.graphs):
                    found.add(name)
        return tuple(buffer.name for buffer in self.cache.buffers if buffer.name in found)

    def compressed_buffers(self) -> dict[str, str]:
        """Buffers of a group that "compress" takes, and what it calls them."""
        if COMPRESS not in self.programs:
            return {}
        return {name: each.input for name, each in self.programs[COMPRESS].buffers.items() if each.input}

    def cache_bytes(self, batch: int | None = None) -> int:
        """Bytes of all groups' keys and values with their scales, for so many rows (None: the contract's, or one)."""
        slots = sum(len(group.heads) * group.capacity for group in self.cache.groups)
        return 2 * (batch or self.batch or 1) * slots * row_bytes(self.dtype, self.head_dim)

    def with_graphs(self, program: str, graphs: Sequence[GraphContract]) -> Contract:
        """The same contract with other graphs of one program."""
        replaced = self.programs[program].model_copy(update={"graphs": tuple(graphs)})
        return self.model_copy(update={"programs": {**self.programs, program: replaced}})


def make_contract(
    target: str,
    profile: BudgetProfile,
    model: ModelFacts,
    method: Method,
    settings: Settings | None,
    *,
    max_context: int,
    stop_ids: Sequence[int],
    batch: int | None,
    dtype: str,
    engine_layout: EngineLayout | None,
    graphs: Mapping[str, Sequence[GraphContract]],
    appends_only: bool = False,
    native: int | None = None,
) -> Contract:
    """The contract of a profile and the graphs written for it, by program; `appends_only`: without behaviours."""
    layout = method.layout(model, profile.groups)
    if dtype == "int8":
        layout = with_scales(layout)
    programs = {}
    for name, of_program in graphs.items():
        scope, bindings = method.bindings(name, layout)
        programs[name] = ProgramContract(scope=scope, buffers=bindings, graphs=tuple(of_program))
    return Contract(
        target=target,
        budget=profile.budget,
        batch=batch,
        max_context=max_context,
        prefill_chunk=profile.prefill_chunk,
        dtype=dtype,  # type: ignore[arg-type]  # pydantic checks it
        native=native,
        engine_layout=engine_layout,
        layers=model.layers,
        kv_heads=model.kv_heads,
        query_heads=model.query_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        windows=model.windows,
        stop_ids=tuple(stop_ids),
        delimiters=DELIMITERS,
        cache=layout,
        programs=programs,
        behaviours=() if appends_only else tuple(method.behaviours(model, profile, settings)),
    )


def graph_contract(
    model: onnx.ModelProto,
    name: str,
    phase: Phase,
    onnx_file: str,
    *,
    groups: Iterable[int],
    aliases: Mapping[str, str] | None = None,
    plan: str | None = None,
    profiles: tuple[ProfileContract, ...] = (),
) -> GraphContract:
    """The interface of a graph."""
    return GraphContract(
        name=name,
        phase=phase,
        onnx=onnx_file,
        plan=plan,
        groups=tuple(groups),
        inputs=tuple(_tensor(value) for value in model.graph.input),
        outputs=tuple(_tensor(value) for value in model.graph.output),
        aliases=dict(aliases or {}),
        profiles=profiles,
    )


_ELEMENT: dict[str, Any] = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "INT8": "int8",
    "INT64": "int64",
}


def _tensor(value: onnx.ValueInfoProto) -> TensorContract:
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorContract(
        name=value.name, dtype=_ELEMENT[onnx.TensorProto.DataType.Name(tensor.elem_type)], shape=shape
    )
