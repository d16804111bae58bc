"""The static-budget contract: everything a host must know to drive the engines of one budget, as data.

It lies in the manifest, one for each budget of a TensorRT target, and its JSON schema beside the engines. A host in any
language allocates what `inputs` and `outputs` say, gives both names of an alias pair one buffer, and follows the rules;
`tests/bundle/contract_host.py` is such a host, written from the manifest alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.bundle import BuiltProfile
    from semkv_deploy.methods.base import Method
    from semkv_deploy.model.config import ModelFacts
    from semkv_deploy.passes.precision import DType

SCHEMA_VERSION = 2

Layout = Literal["dual", "single", "split"]
"""How prefill and decode are built.

dual: one engine with an optimisation profile for each (weights twice where the builder packs them by profile);
single: one engine with one profile that covers both; split: two engines.
"""

Phase = Literal["decoder", "prefill", "decode", "compressor"]

DELIMITERS = "delimiters.json"

NO_MERGE = 2.0
"""A similarity threshold that no cosine reaches."""

POSITION_RULE = (
    "position_ids count tokens seen since the conversation began; they are never derived from length, which is smaller "
    "after a compression"
)
APPEND_RULE = (
    "rows are written at slots length[layer, row] and up; the host keeps length + rows <= capacity, adds rows to "
    "length after the run, and compresses before a run that would not fit"
)
DEAD_SLOT_RULE = (
    "keys and values at and above length hold any finite value and change nothing; in float16 without plugins, keys "
    "there whose scaled product with a query reaches 60000 would show, so clear buffers that held anything but this "
    "model's keys; slot_bias at and above length must be 0, because an appended slot keeps the bias that lies there"
)
BIAS_RULE = (
    "slot_bias is a float32 buffer of the host for each layer, 0 at first; the decoder only reads it, compressing "
    "writes it, with 0 at and above the new length; -inf in a live slot hides it"
)
CONVERSATION_RULE = (
    "a new conversation sets position, length and the chunk count of every row, and all of slot_bias, to 0; keys and "
    "values may stay"
)
BATCH_RULE = (
    "a prompt goes in pieces of at most prefill_chunk tokens, one row at a time: the run has batch 1, length is "
    "[layers, 1], and each cache and slot_bias is bound to that row's slice (kv_heads entries of a first axis that has "
    "the heads in it, else one); a decode step runs every row, and one that is not wanted keeps its position and "
    "length: its token lies in a dead slot then, for which there must be room"
)
LOGITS_RULE = (
    "logits_index says of which of the run's tokens the logits are wanted, counted from 0 within the run, the same "
    "number for every row: [[rows - 1]] after a piece of a prompt, [[0]] in a decode step"
)
SLOT_RULE = (
    "the host keeps two int64 for every layer, row, group and slot: slot_position, the position of the token appended "
    "there, and slot_chunk, 2 x chunk number + 1 if the token is a delimiter, else + 0; a row's chunk number starts at "
    "0 and grows by 1 at each token that is no delimiter and whose predecessor in the row, over all runs, is one; both "
    "go through the compressor with their slots; delimiters are the token_ids of the file delimiters"
)
COMPRESS_RULE = (
    "one layer at a time, from its buffers into spare ones, which then become the layer's, as length_out, "
    "slot_position_out and slot_chunk_out become its state; the buffers it came from may be overwritten by the run; "
    "level and evicted are for statistics; where the decoder has no slot_bias, give zeros and ignore what comes out"
)
FULL_RULE = (
    "before a run that appends n[row] tokens: if length + n > capacity in any layer of any row, compress all layers "
    "once; a row that is full in some layer gets target, a row with room gets capacity as its target and is copied"
)
TURN_RULE = (
    "with compress_at turn, all layers are also compressed when a turn ends, each row with the target budget x "
    "position, rounded up, but at least minimum_target and at most target"
)
RECENT_RULE = "recent[row] is recent_share x the row's target, rounded down"


class TensorContract(BaseModel):
    """One input or output: its name, element type, and shape with numbers where static and names where not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class ProfileContract(BaseModel):
    """One optimisation profile: shapes of the dynamic inputs as (min, opt, max); none where all is static."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Literal["prefill", "decode", "both", "compress"]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class GraphContract(BaseModel):
    """One engine's interface.

    Attributes:
        aliases: input -> output that must be the same buffer.
        profiles: optimisation profiles in the order of the engine's profile indices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Phase
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]
    aliases: dict[str, str]
    profiles: tuple[ProfileContract, ...]


class CompressorContract(BaseModel):
    """How a host drives the compressor's graph: which values its inputs get, and when it runs.

    An input that the graph does not have is not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    compress_at: Literal["full", "turn"] = Field(description="when full, or at every turn end as well")
    groups: int = Field(description="slots of a layer have one position and chunk for each of so many groups of heads")
    thresholds: tuple[tuple[float, ...], ...] = Field(
        description="by layer, the float32 values of the input thresholds; 2 where nothing may merge (sliding windows)"
    )
    sinks: tuple[int, ...] = Field(description="by layer, the value of the input sinks; 0 in layers with a window")
    recent_share: float = Field(description="of a row's target, how much is never merged")
    minimum_target: int = Field(description="least target of a row at a turn's end")
    compress_rule: str = COMPRESS_RULE
    full_rule: str = FULL_RULE
    turn_rule: str = TURN_RULE
    recent_rule: str = RECENT_RULE


class StaticBudgetContract(BaseModel):
    """One budget, as its engines see it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    budget: float
    batch: int
    capacity: int = Field(description="slots of each layer's buffers per batch row; a hard cap")
    target: int = Field(description="slots that may stay when a full cache is compressed")
    sinks: int = Field(description="first slots that are never touched")
    recent: int = Field(description="last slots that are never merged")
    prefill_chunk: int = Field(description="most rows of one prefill run")
    chunk_cap: int | None = Field(description="most slots between the members of one core; None: nothing is merged")
    levels: int = Field(description="length of the threshold ladder the compressor is built for")
    dtype: str = Field(description="element type of weights and caches")
    cache_shape: tuple[int | str, ...] = Field(
        description="of one layer's key or value cache in the first graph; others may view its bytes in another shape"
    )
    heads_in_batch: bool = Field(description="the first axis of cache_shape is batch x KV heads, in that order")
    slot_bias: bool = Field(description="the decoder has slot_bias inputs; without, every live slot counts once")
    windows: tuple[int, ...] = Field(description="by layer, tokens of its sliding window, which the graph has; 0: none")
    delimiters: str = Field(description="file of the bundle whose token_ids end a chunk")
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    vocab_size: int
    position_rule: str = POSITION_RULE
    append_rule: str = APPEND_RULE
    dead_slot_rule: str = DEAD_SLOT_RULE
    bias_rule: str = BIAS_RULE
    conversation_rule: str = CONVERSATION_RULE
    batch_rule: str = BATCH_RULE
    logits_rule: str = LOGITS_RULE
    slot_rule: str = SLOT_RULE
    compressor: CompressorContract | None = Field(
        description="null: never compressed; a run that would not fit is refused"
    )
    layout: Layout
    graphs: tuple[GraphContract, ...]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all layers' key and value caches, all batch rows."""
        element = 4 if self.dtype == "float32" else 2
        return 2 * self.layers * self.batch * self.kv_heads * self.capacity * self.head_dim * element

    @classmethod
    def json_schema(cls) -> dict[str, object]:
        """The contract's JSON schema."""
        return cls.model_json_schema()


def static_budget_contract(
    profile: BuiltProfile,
    facts: ModelFacts,
    method: Method,
    *,
    batch: int,
    dtype: DType,
    layout: Layout,
    graphs: tuple[GraphContract, ...],
) -> StaticBudgetContract:
    """The contract of a profile and the graphs written for it."""
    decoder = next(graph for graph in graphs if graph.phase != "compressor")
    cache = next(tensor for tensor in decoder.inputs if tensor.name.startswith("past_key_values."))
    span = getattr(method, "span", None)
    return StaticBudgetContract(
        budget=profile.budget,
        batch=batch,
        capacity=profile.capacity,
        target=profile.target,
        sinks=method.sinks,
        recent=method.recent_slots(profile.target),
        prefill_chunk=profile.prefill_chunk,
        chunk_cap=span,
        levels=len(profile.thresholds[0]),
        dtype=dtype,
        cache_shape=cache.shape,
        heads_in_batch=cache.shape[1] != facts.kv_heads,
        slot_bias=any(tensor.name.startswith("slot_bias.") for tensor in decoder.inputs),
        windows=facts.windows,
        delimiters=DELIMITERS,
        compressor=_compressor(profile, facts, method)
        if any(graph.phase == "compressor" for graph in graphs)
        else None,
        layers=facts.layers,
        kv_heads=facts.kv_heads,
        query_heads=facts.query_heads,
        head_dim=facts.head_dim,
        vocab_size=facts.vocab_size,
        layout=layout,
        graphs=graphs,
    )


def _compressor(profile: BuiltProfile, facts: ModelFacts, method: Method) -> CompressorContract:
    """What `runtime.session` gives a compressor, as data.

    In a layer with a sliding window nothing may be merged or taken from the middle: how far apart its slots are is how
    far apart tokens are. Only its oldest slots go.
    """
    windowed = [window > 0 for window in facts.windows]
    return CompressorContract(
        compress_at=method.compress_at,
        groups=method.groups(facts.kv_heads),
        thresholds=tuple(
            tuple(NO_MERGE if fixed else value for value in values)
            for fixed, values in zip(windowed, profile.thresholds, strict=True)
        ),
        sinks=tuple(0 if fixed else method.sinks for fixed in windowed),
        recent_share=getattr(method, "recent", 0.0),
        minimum_target=method.sinks + 1,
    )


def graph_contract(
    model: onnx.ModelProto, phase: Phase, aliases: dict[str, str], profiles: tuple[ProfileContract, ...]
) -> GraphContract:
    """The interface of a lowered graph."""
    return GraphContract(
        phase=phase,
        inputs=tuple(_tensor(value) for value in model.graph.input),
        outputs=tuple(_tensor(value) for value in model.graph.output),
        aliases=aliases,
        profiles=profiles,
    )


_ELEMENT = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64"}


def _tensor(value: onnx.ValueInfoProto) -> TensorContract:
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorContract(
        name=value.name, dtype=_ELEMENT[onnx.TensorProto.DataType.Name(tensor.elem_type)], shape=shape
    )
