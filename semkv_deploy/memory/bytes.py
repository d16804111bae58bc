"""Bytes of one built profile, by target: the arithmetic behind `semkv-deploy plan`, and where each constant is from.

Numbers marked "measured" are fits to ONNX Runtime 1.32 (anonymous memory of a process) and to TensorRT-RTX 1.7.1 (its
build log); `tests/memory` holds the totals within 5 % of both.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from semkv_deploy.passes import static_merging
from semkv_deploy.sizes import row_bytes

if TYPE_CHECKING:
    from semkv_deploy.budget import BudgetProfile
    from semkv_deploy.choices import CacheType, DType, EngineLayout, WeightFormat
    from semkv_deploy.memory.source import DecoderShape
    from semkv_deploy.methods import AnyMethod
    from semkv_deploy.model.cache_groups import CacheGroup


ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
FLOAT, INT64 = 4, 8
MIB = 1 << 20

QUANTISED_BLOCK = 32
"""Inputs that share a scale: `passes.quantize.BLOCK_SIZE`, here because that module imports onnxruntime's quantiser."""

_TRT_WORKSPACE = 8_192_000
"""Bytes of scratch in every engine of TensorRT-RTX that has a matrix product, one for each that run side by side
(measured)."""

PARALLEL_FAMILIES = ("phi",)
"""Families whose attention and MLP read the same norm, so that the builder runs them side by side."""


class Bytes(NamedTuple):
    """What one profile takes; see `plan.PlanRow` for the meaning of each."""

    weights: int
    packing: int
    programs: int
    cache: int
    bias: int
    spare: int
    activation_decode: int
    activation_prefill: int
    activation: int
    compressor: int
    metadata: int
    io: int
    load: int

    @property
    def total(self) -> int:
        """All of it while running; of the activations the peak."""
        return sum(self) - self.activation_decode - self.activation_prefill - self.load

    @property
    def needed(self) -> int:
        """The most there ever is: while running, or while loading."""
        return max(self.total, self.load)


class Need(NamedTuple):
    """A profile to count, and how the target stores it."""

    shape: DecoderShape
    method: AnyMethod
    profile: BudgetProfile
    batch: int

    @property
    def compresses(self) -> bool:
        return self.profile.budget < 1 and self.method.compresses

    @property
    def largest(self) -> CacheGroup:
        """The group with the most entries: what one compression works on."""
        return max(self.profile.groups, key=lambda group: len(group.heads) * group.capacity)

    @property
    def slots(self) -> int:
        """Slots of the largest group, all rows."""
        return self.batch * self.largest.capacity

    @property
    def keys(self) -> int:
        """Keys of the largest group in float32."""
        return self.slots * len(self.largest.heads) * self.shape.head_dim * FLOAT

    @property
    def cluster_groups(self) -> int:
        """Cluster groups of the largest group."""
        return self.method.cluster_groups(len(self.largest.heads))

    @property
    def entries(self) -> int:
        """Slots times KV heads of all groups, all rows."""
        return self.batch * sum(len(group.heads) * group.capacity for group in self.profile.groups)

    def cache(self, dtype: CacheType) -> int:
        """Keys and values of all groups, with the scales of int8 rows, and the method's tables beside them."""
        return 2 * self.entries * row_bytes(dtype, self.shape.head_dim) + sum(self._tables) * ELEMENT_BYTES[dtype]

    @property
    def _tables(self) -> list[int]:
        """By group, elements of the method's table, all rows."""
        head_dim = self.shape.head_dim
        return [self.batch * self.method.table_elements(head_dim, group) for group in self.profile.groups]

    def spare_table(self, element: int) -> int:
        """Where a program gives the table of a group back elsewhere: one for each shape that groups have."""
        kinds = {
            (len(group.heads), group.capacity): n for group, n in zip(self.profile.groups, self._tables, strict=True)
        }
        return sum(kinds.values()) * element

    @property
    def said_of_slots(self) -> int:
        """Numbers kept of each slot and head: its bias, and how much it is looked at."""
        return 2 if self.method.reads_again else 1

    @property
    def bias(self) -> int:
        """What is kept of slots, of all groups, and reference queries."""
        heads = sum(len(group.heads) for group in self.profile.groups)
        queries = self.batch * heads * self.method.fitted_queries * self.shape.head_dim
        return (self.entries * self.said_of_slots + queries) * FLOAT

    def spare(self, dtype: CacheType, sets: int) -> int:
        """Spare buffers: `sets` for each shape that groups have, no more than there are groups of it."""
        if not self.compresses:
            return 0
        kinds = Counter((len(group.heads), group.capacity) for group in self.profile.groups)
        entry = 2 * row_bytes(dtype, self.shape.head_dim) + self.said_of_slots * FLOAT
        queries = self.method.fitted_queries * self.shape.head_dim * FLOAT
        return sum(
            min(sets, count) * self.batch * heads * (slots * entry + queries) for (heads, slots), count in kinds.items()
        )

    @property
    def metadata(self) -> int:
        """Position and chunk number of every slot, and its turn where that counts: in the host's memory."""
        per_head = self.method.clusters_by_head
        slots = sum((len(group.heads) if per_head else 1) * group.capacity for group in self.profile.groups)
        return (2 + len(self.method.more_columns)) * self.batch * slots * INT64


def onnxruntime_weights(shape: DecoderShape, weights: WeightFormat) -> tuple[int, int]:
    """Bytes in the decoder's data file, and what ONNX Runtime adds when it packs them.

    Constant MatMuls become blocks of 32 inputs with a float32 scale, and so does an embedding, in 8 bits; a tied head
    is a product of 8 bits beside it; norms stay float32. Packing for int8 activations adds the sum of each block
    (float32, measured); float32 products are packed instead of kept, at no cost.
    """
    stored = packed = 0
    tied = is_tied(shape)

    def product(inputs: int, outputs: int, bits: int) -> None:
        nonlocal stored, packed
        blocks = outputs * math.ceil(inputs / QUANTISED_BLOCK)
        stored += blocks * (QUANTISED_BLOCK * bits // 8 + FLOAT)
        packed += blocks * FLOAT

    for weight in shape.weights:
        if weights != "fp32" and weight.use == "product":
            product(weight.shape[0], weight.shape[1], 4 if weights == "int4" else 8)
        elif weights != "fp32" and weight.use == "table" and len(weight.shape) == 2:
            rows, width = weight.shape
            stored += rows * width * (1 if width % QUANTISED_BLOCK == 0 else FLOAT)
            stored += rows * (width // QUANTISED_BLOCK) * FLOAT if width % QUANTISED_BLOCK == 0 else 0
            if tied:
                product(width, rows, 8)
        else:
            stored += weight.size * FLOAT
    return stored, packed


def is_tied(shape: DecoderShape) -> bool:
    """Whether the head is the embedding transposed: no product outside the layers."""
    return not any(weight.use == "product" and not weight.in_layer for weight in shape.weights)


def onnxruntime_bytes(
    need: Need, weights: WeightFormat, workers: int, *, cache_dtype: CacheType, native: bool
) -> Bytes:
    """As `targets.onnxruntime.engine` allocates; `workers` groups are compressed at a time."""
    shape, profile = need.shape, need.profile
    stored, packed = onnxruntime_weights(shape, weights)
    # A mask of [rows, capacity] is made from the biases for each layer, for every query head where biases differ by
    # head; two of them are alive at a time. Native operators take biases as they are, and attention in tiles.
    mask_heads = {"none": 0, "group": 1, "head": shape.query_heads}[need.method.bias_mode]
    if native:
        mask_heads = 0

    def activation(rows: int) -> int:
        live = rows * FLOAT * (shape.mlp_width + 3 * shape.hidden_size)
        live += 2 * rows * profile.capacity * FLOAT * mask_heads
        # A run that is recorded has the weights of a layer's query heads, before and after softmax (counted).
        live += 2 * rows * profile.capacity * FLOAT * shape.query_heads * need.method.reads_again
        # The arena grows by whole regions, the first of 1 MiB (measured).
        return live + min(live, MIB)

    decode, prefill = activation(need.batch), activation(profile.prefill_chunk)
    programs = _session_bytes(need)
    # A tied head is an embedding that is transposed: ONNX Runtime does that while it loads, into a copy (measured).
    tables = (weight.size * FLOAT for weight in shape.weights if weight.use == "table")
    copied = max(tables, default=0) if is_tied(shape) and weights == "fp32" else 0
    return Bytes(
        weights=stored,
        packing=packed,
        programs=programs,
        cache=need.cache(cache_dtype),
        bias=need.bias,
        spare=need.spare(cache_dtype, workers),
        activation_decode=decode,
        activation_prefill=prefill,
        activation=max(decode, prefill),
        compressor=workers * _onnxruntime_compressor(need, cache_dtype, native=native) if need.compresses else 0,
        metadata=need.metadata,
        io=(need.batch + 1) * shape.vocab_size * FLOAT,
        load=stored + packed + programs + copied,
    )


def _session_bytes(need: Need) -> int:
    """Objects of the sessions of ONNX Runtime (measured: 8 and 30 layers; a compressor's own)."""
    compressor = 0.0 if not need.compresses else 2.4 if need.method.merges else 1.3
    return int((3.3 + 0.2 * len(need.profile.groups) + compressor) * MIB)


def _onnxruntime_compressor(need: Need, cache_dtype: CacheType, *, native: bool) -> int:
    """Scratch of compressing one group, in copies of its keys in float32, and bytes a slot and group for similarities
    (measured with two workers, which share an arena: 1 to 6 rows, 2 to 8 heads of 64 and 128, 1,024 to 4,096 slots)."""
    if native and not (need.method.merges_dropped or need.method.scores):
        return _native_compressor(need, cache_dtype)
    # These programs work in float32: keys and values on their way in and out.
    widened = int(2.7 * need.keys) if cache_dtype != "float32" else 0
    if need.method.merges_dropped:
        return _merging(need) + widened
    if need.method.scores:
        return _scoring(need) + widened
    if need.method.fitted_queries:
        return _fitting(need)
    if not need.method.merges:
        return int(1.1 * need.keys)
    unrotates = need.method.unrotates and need.shape.rotated_alike
    return int((8.6 if unrotates else 7.2) * need.keys) + 600 * need.slots * need.cluster_groups


def _native_compressor(need: Need, cache_dtype: CacheType) -> int:
    """What native operators work in, one row of the batch at a time (counted, and measured: 3 rows of 1,024 slots)."""
    capacity, head_dim, heads = need.largest.capacity, need.shape.head_dim, len(need.largest.heads)
    if need.method.fitted_queries:
        # A head at a time: its keys, values and new values in float32, and its queries' attention, whole and chosen.
        return capacity * FLOAT * (3 * head_dim + 2 * need.method.fitted_queries)
    if not need.method.merges:
        return 0
    # Merged caches, before what is still too many is evicted; unit keys, and similarities to slots within the span.
    merged = 2 * need.slots * heads * row_bytes(cache_dtype, head_dim)
    nearby = (need.method.merge_span + 32) * need.cluster_groups
    return merged + capacity * FLOAT * (heads * head_dim + nearby)


def _scoring(need: Need) -> int:
    """Keys and values in float32, what rotates them back and their squares; for each slot and head 15 comparisons with
    thresholds, as truth and as number (counted, not measured)."""
    return 5 * need.keys + 15 * (1 + FLOAT) * need.slots * len(need.largest.heads)


def _merging(need: Need) -> int:
    """Keys and values in float32, whole, chosen and merged; cosines of what goes to what stays, twice (counted, not
    measured)."""
    heads, group = len(need.largest.heads), need.largest
    dropped = need.slots * (group.capacity - group.keep_slots) // group.capacity
    return 10 * need.keys + 2 * FLOAT * dropped * group.keep_slots * heads


def _fitting(need: Need) -> int:
    """Keys and values in float32, whole and chosen; logits, masses and weights by query (counted, not measured)."""
    heads = len(need.largest.heads)
    return 6 * need.keys + 8 * FLOAT * need.method.fitted_queries * need.slots * heads


def tensorrt_weights(shape: DecoderShape, dtype: DType, layout: EngineLayout, batch: int) -> int:
    """Bytes of weights in a profile's decoder engines ("Total Weights Memory" of the build log).

    Products, tables and biases in `dtype`, norms in float32. With two optimization profiles in one engine the builder
    packs each product by profile, so that all but a tied head are there twice, but once where the batch is dynamic
    (measured); two engines hold all twice.
    """
    by_profile = layout == "dual" and batch == 1
    once = twice = 0
    for weight in shape.weights:
        count = weight.size * (FLOAT if weight.wide else ELEMENT_BYTES[dtype])
        if layout == "split" or (by_profile and weight.use in ("product", "gemm")):
            twice += count
        else:
            once += count
    return once + 2 * twice


def tensorrt_bytes(need: Need, dtype: DType, layout: EngineLayout) -> Bytes:
    """As TensorRT-RTX's builder counts ("Total Activation Memory"), and the buffers a host binds."""
    shape, profile, element = need.shape, need.profile, ELEMENT_BYTES[dtype]
    merges = need.method.merges
    chunk = profile.prefill_chunk
    prefill_rows = need.batch if layout == "single" else 1
    # The one float32 kernel takes one row, which only an engine for nothing else promises.
    unfused = dtype == "float32"
    decode = _tensorrt_activation(need, need.batch, 1, element, layout, unfused=unfused and layout != "split")
    prefill = _tensorrt_activation(need, prefill_rows, chunk, element, layout, unfused=unfused)
    if layout == "single":
        decode = prefill
    return Bytes(
        weights=tensorrt_weights(shape, dtype, layout, need.batch),
        packing=0,
        programs=_tensorrt_programs(need, layout),
        cache=need.cache(dtype),
        bias=need.bias if merges else 0,
        spare=need.spare(dtype, 1) + need.spare_table(element),
        activation_decode=decode,
        activation_prefill=prefill,
        # One context switches profiles; two engines have a context each.
        activation=decode + prefill if layout == "split" else max(decode, prefill),
        compressor=_tensorrt_compressor(need) if need.compresses else 0,
        metadata=need.metadata,
        io=(need.batch + 1) * shape.vocab_size * FLOAT,
        load=0,
    )


def _tensorrt_activation(
    need: Need, batch: int, rows: int, element: int, layout: EngineLayout, *, unfused: bool
) -> int:
    """Peak of a run of `rows` tokens in each of `batch` rows, workspace included.

    With several rows the fused kernel has a layer's keys repeated for every query head; without a kernel (`unfused`)
    there are the scores, and copies of keys and values. How often, the builder decides by size (all measured).
    """
    shape, capacity = need.shape, need.profile.capacity
    tokens = batch * rows
    rotary = 2 * shape.head_dim * FLOAT + 3 * INT64
    hidden, heads = shape.hidden_size * element, shape.query_heads * shape.head_dim * element
    keys = shape.kv_heads * shape.head_dim * element
    folded = shape.query_heads > shape.kv_heads
    mask = tokens * capacity * (shape.kv_heads if folded or need.method.clusters_by_head else 1) * element
    layer_keys = batch * capacity * keys
    parallel = shape.family in PARALLEL_FAMILIES
    row = tokens * (hidden + 2 * heads + (0 if parallel else 2 * keys) + rotary)
    mlp = tokens * (shape.mlp_width * element + 3 * hidden + rotary)
    # With a dynamic batch, the last layer's rows are still there when the logits are made.
    head = tokens * (
        shape.vocab_size * element + int(7.5 * hidden) if batch > 1 else shape.vocab_size * element + hidden
    )
    workspaces = 2 if parallel and (rows == 1 or layout == "single") else 1
    if unfused:
        scores = tokens * shape.query_heads * capacity * FLOAT
        copies = (2 if layer_keys >= 2 * MIB and (folded or rows > 1) else 1) * layer_keys
        masks = (min(1 + mask // (4 * MIB), 3) + (0 if folded else 1)) * mask if rows > 1 else 0
        attention = row + max(2 * scores if scores <= 4 * MIB and rows > 1 else 0, scores + masks + copies)
    elif rows == 1:
        attention = row
    elif parallel:
        attention = row + mask + (1 if layout == "single" else 2) * layer_keys
    else:
        repeated = batch * capacity * heads if folded else 0
        attention = row + repeated + (2 if mask >= 8 * MIB else 1) * mask
    layer = attention + mlp if parallel else max(attention, mlp)
    return workspaces * _TRT_WORKSPACE + max(layer, head if tokens > 1 else 0)


def _tensorrt_programs(need: Need, layout: EngineLayout) -> int:
    """Kernels and descriptions in the plan files (measured; about the same for one GPU architecture and for three)."""
    layers = len(need.profile.groups)
    decode, prefill = 1.0 + 0.29 * layers, 1.15 + 0.41 * layers
    compressor = 0.0 if not need.compresses else 4.2 if need.method.merges else 1.0
    return int(((prefill if layout == "single" else decode + prefill) + compressor) * 1e6)


def _tensorrt_compressor(need: Need) -> int:
    """Scratch of the compressor engine: levels are tried side by side (measured)."""
    if need.method.scores:
        # Merging works on the same copies, but for cosines of a tile with every slot (counted, not measured).
        cosines = 4 * FLOAT * static_merging.TILE * need.slots * len(need.largest.heads)
        return _TRT_WORKSPACE + _scoring(need) + need.method.merges_dropped * (5 * need.keys + cosines)
    if not need.method.merges:
        return need.slots * 26
    # A block of span / 2 slots is compared with itself and the span before it; twice: once moved, once compared.
    window = 3 * need.method.merge_span // 2
    levels = need.method.ladder_levels
    copies = 8 if need.method.merges_keys else 4.5
    return _TRT_WORKSPACE + int(copies * need.keys) + 2 * need.slots * need.cluster_groups * levels * window * FLOAT
