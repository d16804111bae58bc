"""The static-budget contract: everything a host must know to drive the engines of one budget, as data.

It lies in the manifest, one for each budget of a TensorRT target, and its JSON schema beside the engines. A host in any
language allocates what `inputs` and `outputs` say, gives both names of an alias pair one buffer, and follows the rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.budget import StaticProfile
    from semkv_deploy.facts import ModelFacts
    from semkv_deploy.methods.base import Method
    from semkv_deploy.passes.precision import DType

SCHEMA_VERSION = 1

Layout = Literal["dual", "single", "split"]
"""How prefill and decode are built.

dual: one engine with an optimisation profile for each (weights twice where the builder packs them by profile);
single: one engine with one profile that covers both; split: two engines.
"""

Phase = Literal["decoder", "prefill", "decode", "compressor"]

POSITION_RULE = (
    "position_ids count tokens seen since the conversation began; they are never derived from length, which is smaller "
    "after a compression"
)
APPEND_RULE = (
    "rows are written at slots length[layer, row] and up; the host keeps length + rows <= capacity, adds rows to "
    "length after the run, and compresses before a run that would not fit"
)
COMPRESS_RULE = (
    "one layer at a time, from its buffers into spare ones, which then become the layer's; the buffers it came from "
    "may be overwritten by the run"
)
DEAD_SLOT_RULE = (
    "slots at and above length hold any finite value and change nothing; in float16 without plugins, keys there whose "
    "scaled product with a query reaches 60000 would show, so clear buffers that held anything but this model's keys"
)


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
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    vocab_size: int
    position_rule: str = POSITION_RULE
    append_rule: str = APPEND_RULE
    compress_rule: str = COMPRESS_RULE
    dead_slot_rule: str = DEAD_SLOT_RULE
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
    profile: StaticProfile,
    facts: ModelFacts,
    method: Method,
    *,
    batch: int,
    dtype: DType,
    layout: Layout,
    levels: int,
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
        levels=levels,
        dtype=dtype,
        cache_shape=cache.shape,
        heads_in_batch=cache.shape[1] != facts.kv_heads,
        slot_bias=any(tensor.name.startswith("slot_bias.") for tensor in decoder.inputs),
        layers=facts.layers,
        kv_heads=facts.kv_heads,
        query_heads=facts.query_heads,
        head_dim=facts.head_dim,
        vocab_size=facts.vocab_size,
        layout=layout,
        graphs=graphs,
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
