"""What a build would need in memory, before anything is built: bytes by part, for each budget and batch.

Only the graph (or config.json) is read, never the weights. How each number is made is in the fields' descriptions,
which `--json` carries along, and in `memory.bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel, ConfigDict, Field

from semkv_deploy.budget import BudgetProfile, budget_profile, choose_context
from semkv_deploy.budget_units import MIN_CAPACITY, Budget, BudgetLike, parse_budget
from semkv_deploy.choices import CacheType, DType, EngineLayout, Native, Target, WeightFormat
from semkv_deploy.errors import SemkvError
from semkv_deploy.memory.bytes import (
    Bytes,
    Need,
    onnxruntime_bytes,
    onnxruntime_weights,
    tensorrt_bytes,
    tensorrt_weights,
)
from semkv_deploy.model.cache_groups import parse_groups
from semkv_deploy.sizes import row_bytes, size
from semkv_deploy.targets import is_tensorrt

if TYPE_CHECKING:
    from semkv_deploy.memory.source import DecoderShape
    from semkv_deploy.methods import AnyMethod
    from semkv_deploy.model.cache_groups import GroupShare

TARGETS: tuple[Target, ...] = get_args(Target)

_NOTES = {
    "onnxruntime-cpu": [
        "activation and compressor bytes are what ONNX Runtime's arenas keep",
        "not counted: Python and the libraries, the pages of the weights' file that the kernel caches while it loads",
    ],
    "onnxruntime-cuda": [
        "counted as for onnxruntime-cpu, on the GPU; that was not measured",
        "not counted: the CUDA context, and the workspaces of CUDA's libraries",
    ],
    "tensorrt-rtx": [
        "weights and activations follow the builder's own log; buffers and metadata are what a host allocates",
        "activations of float32 at 2,048 slots and more, and of layers whose MLP runs beside attention, are estimates",
        "not counted: the CUDA context, and what the runtime compiles when an engine is loaded",
    ],
    "tensorrt": [
        "weights and activations are counted as TensorRT-RTX's builder does; for TensorRT that is an estimate",
        "not counted: the CUDA context",
    ],
}


class PlanRow(BaseModel):
    """One budget at one batch. All `_bytes` are for that profile alone; bytes on disk are the same where they exist."""

    model_config = ConfigDict(frozen=True)

    budget: float = Field(description="share of cache entries kept")
    batch: int = Field(description="rows decoded at a time")
    capacity: int = Field(
        description="slots of the largest cache group (of each layer, where all have one share), each row; static"
    )
    prefill_chunk: int = Field(description="rows of a prompt that one run takes")
    weight_bytes: int = Field(
        description="weights as stored: onnxruntime: the decoder's data file; tensorrt: in the decoder's engines, "
        "twice where the layout packs them twice"
    )
    packing_bytes: int = Field(description="onnxruntime: sums of quantised blocks, added when weights are packed")
    program_bytes: int = Field(
        description="onnxruntime: objects of the sessions; tensorrt: kernels in the engines' files (fits)"
    )
    cache_bytes: int = Field(
        description="keys and values of all layers: 2 x layers x batch x kv_heads x slots x head_dim, of their type; "
        "int8 rows have a float32 scale each"
    )
    bias_bytes: int = Field(description="float32 bias of every slot, layer and KV head")
    spare_bytes: int = Field(
        description="keys, values and biases of the buffers that compression writes to, for each shape of groups: two "
        "on onnxruntime-cpu, one on a GPU; none where nothing is compressed"
    )
    activation_decode_bytes: int = Field(description="peak of a decode step: MLP, residuals, masks; none of the above")
    activation_prefill_bytes: int = Field(description="peak of a prefill chunk; one row's chunk is prefilled at a time")
    activation_bytes: int = Field(
        description="the larger of both, which share memory; their sum for two engines (layout split)"
    )
    compressor_bytes: int = Field(description="scratch of compressing a cache group (two at a time on onnxruntime-cpu)")
    metadata_bytes: int = Field(description="host memory: int64 position and chunk of every slot")
    io_bytes: int = Field(description="float32 logits of a decode step and of one prefilled row")
    total_bytes: int = Field(
        description="weights, packing, programs, cache, bias, spare, activation, compressor, metadata and io together"
    )
    load_bytes: int = Field(
        description="onnxruntime: most memory while weights are loaded, before there are caches: weights, packing, "
        "programs, and a second copy of a tied head; 0 on tensorrt, where it is not known here"
    )
    read_bytes_per_step: int = Field(description="keys and values that one decode step reads when the cache is full")
    full_total_bytes: int = Field(description="total_bytes of the full cache: budget 1, same batch, context and target")
    full_read_bytes_per_step: int = Field(description="read_bytes_per_step of the full cache")
    cache_ratio: float = Field(description="full_read_bytes_per_step / read_bytes_per_step")
    fits: bool | None = Field(None, description="whether total_bytes and load_bytes fit --memory; null without it")
    largest_context: int | None = Field(
        None, description="most tokens of context that fit --memory, at most the model's; null without it, 0: none fits"
    )
    largest_budget: float | None = Field(
        None, description="largest budget, in hundredths, that fits --memory at this batch and context; 0: none fits"
    )

    @property
    def buffer_bytes(self) -> int:
        """Cache buffers as `engine.cache_bytes()` counts them: keys, values, biases, spare layers."""
        return self.cache_bytes + self.bias_bytes + self.spare_bytes


class Plan(BaseModel):
    """A plan: a row for each budget and batch, in the order of budgets, then batches."""

    model_config = ConfigDict(frozen=True)

    source: str = Field(description="base name of the checkpoint")
    family: str
    target: Target
    stored_as: str = Field(description="weights on onnxruntime; type of weights and caches on tensorrt")
    cache_type: CacheType = Field(description="type of keys and values")
    native: bool = Field(description="onnxruntime: with native operators")
    layout: EngineLayout | None = Field(description="tensorrt: engines and optimization profiles; null on onnxruntime")
    method: str
    max_context: int
    model_max_context: int
    memory_bytes: int | None = Field(description="--memory")
    rows: list[PlanRow]
    notes: list[str]


class _Planner:
    """Counts profiles of one model for one target."""

    def __init__(
        self,
        shape: DecoderShape,
        method: AnyMethod,
        target: Target,
        weights: WeightFormat,
        dtype: DType,
        layout: EngineLayout,
        groups: tuple[GroupShare, ...],
        cache_dtype: CacheType,
        native: bool,
    ) -> None:
        self.groups, self.native = groups, native
        self.shape, self.method, self.target = shape, method, target
        self.weights, self.dtype, self.layout = weights, dtype, layout
        self.cache_dtype = cache_dtype if self.on_onnxruntime else dtype
        self.token_bytes = 2 * shape.layers * shape.kv_heads * row_bytes(self.cache_dtype, shape.head_dim)

    @property
    def on_onnxruntime(self) -> bool:
        return not is_tensorrt(self.target)

    def profile(self, budget: BudgetLike, context: int) -> BudgetProfile:
        return budget_profile(
            budget,
            context,
            bytes_per_slot=self.token_bytes,
            groups=self.groups,
            reads_again=self.method.reads_again,
        )

    def count(self, profile: BudgetProfile, batch: int) -> Bytes:
        need = Need(self.shape, self.method, profile, batch)
        if self.on_onnxruntime:
            from semkv_deploy.targets.onnxruntime.place import place_of

            workers = place_of(self.target).workers
            return onnxruntime_bytes(need, self.weights, workers, cache_dtype=self.cache_dtype, native=self.native)
        return tensorrt_bytes(need, self.dtype, self.layout)

    def row(self, budget: Budget, batch: int, context: int, memory: int | None) -> PlanRow:
        profile, full = self.profile(budget, context), self.profile(1.0, context)
        found = self.count(profile, batch)
        elements = [2 * len(group.heads) * group.capacity * self.shape.head_dim for group in profile.groups]
        share = sum(self.method.read_elements(self.shape.head_dim, group) for group in profile.groups) / sum(elements)
        read, full_read = round(batch * profile.cache_bytes * share), batch * full.cache_bytes
        return PlanRow(
            budget=profile.budget,
            batch=batch,
            capacity=profile.capacity,
            prefill_chunk=profile.prefill_chunk,
            weight_bytes=found.weights,
            packing_bytes=found.packing,
            program_bytes=found.programs,
            cache_bytes=found.cache,
            bias_bytes=found.bias,
            spare_bytes=found.spare,
            activation_decode_bytes=found.activation_decode,
            activation_prefill_bytes=found.activation_prefill,
            activation_bytes=found.activation,
            compressor_bytes=found.compressor,
            metadata_bytes=found.metadata,
            io_bytes=found.io,
            total_bytes=found.total,
            load_bytes=found.load,
            read_bytes_per_step=read,
            full_total_bytes=self.count(full, batch).total,
            full_read_bytes_per_step=full_read,
            cache_ratio=round(full_read / read, 3),
            fits=None if memory is None else found.needed <= memory,
            largest_context=None if memory is None else self.largest_context(budget, batch, memory),
            largest_budget=None if memory is None else self.largest_budget(batch, context, memory),
        )

    def smallest_context(self, budget: Budget) -> int:
        """Returns the tokens of context whose capacity is just enough to be built."""
        context = MIN_CAPACITY
        while True:
            try:
                self.profile(budget, context)
                return context
            except SemkvError:
                context += 1

    def largest_context(self, budget: Budget, batch: int, memory: int) -> int:
        """Most tokens whose profile fits; 0 when none does. More context never takes less memory."""
        low, high = self.smallest_context(budget) - 1, self.shape.max_position
        if low >= high:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if self.count(self.profile(budget, middle), batch).needed <= memory:
                low = middle
            else:
                high = middle - 1
        return 0 if low < self.smallest_context(budget) else low

    def largest_budget(self, batch: int, context: int, memory: int) -> float:
        """Largest budget in hundredths that fits at `context`; 0 when none does."""
        for hundredths in range(100, 0, -1):
            try:
                profile = self.profile(hundredths / 100, context)
            except SemkvError:  # too few slots to be built
                break
            if self.count(profile, batch).needed <= memory:
                return hundredths / 100
        return 0.0

    def check_memory(self, memory: int, budgets: Sequence[Budget], batches: Sequence[int]) -> None:
        """Fails when not even the smallest profile fits.

        Raises:
            SemkvError: with how much is missing, and what would fit.
        """
        budget, batch = budgets[0], min(batches)
        context = min(self.smallest_context(budget), self.shape.max_position)
        found = self.count(self.profile(budget, context), batch)
        if found.needed <= memory:
            return
        weights = found.weights + found.packing
        short_of_weights = weights > memory
        needed = weights if short_of_weights else found.needed
        what = f"the weights and the smallest cache of budget {budget}"
        if short_of_weights or found.load > found.total:
            what = "the weights alone" if short_of_weights else "the weights, while they are loaded,"
        others = [f"{option} ({size(count)} of weights)" for option, count in self._smaller(batch) if count < memory]
        raise SemkvError(
            f"{what} need {size(needed - memory)} more",
            where="--memory",
            expected=f"at least {size(needed)}",
            got=size(memory),
            fix=f"use {' or '.join(others)}" if others else "give more memory, or take a smaller model",
        )

    def _smaller(self, batch: int) -> Iterator[tuple[str, int]]:
        """Other ways to store the weights that take less, with their bytes."""
        if self.on_onnxruntime:
            now = sum(onnxruntime_weights(self.shape, self.weights))
            formats: tuple[WeightFormat, ...] = ("int8", "int4")
            for weights in formats:
                if (count := sum(onnxruntime_weights(self.shape, weights))) < now:
                    yield f"--weights {weights}", count
            return
        now = tensorrt_weights(self.shape, self.dtype, self.layout, batch)
        types: tuple[DType, ...] = (self.dtype, "float16") if self.dtype == "float32" else (self.dtype,)
        layouts: tuple[EngineLayout, ...] = (self.layout, "single") if self.layout != "single" else (self.layout,)
        for dtype in types:
            for layout in layouts:
                if (count := tensorrt_weights(self.shape, dtype, layout, batch)) < now:
                    named = [f"--dtype {dtype}"] if dtype != self.dtype else []
                    named += [f"--layout {layout}"] if layout != self.layout else []
                    yield " ".join(named), count


def _uses_native(target: Target, native: Native, cache_dtype: CacheType) -> bool:
    """Whether a build would have native operators; those that are asked for need not be here yet.

    Raises:
        SemkvError: for caches that only native operators have, without them.
    """
    from semkv_deploy.targets.onnxruntime.native import choose_native, choose_native_cuda

    if target == "onnxruntime-cuda":
        return choose_native_cuda(native, cache_dtype).on
    if native == "on" or (native == "auto" and cache_dtype != "float32"):
        return True
    return choose_native(native, cache_dtype).on


def make_plan(
    source: str,
    *,
    budgets: Sequence[BudgetLike],
    method: AnyMethod,
    batches: Sequence[int] = (1,),
    max_context: int | None = None,
    target: str = "onnxruntime-cpu",
    weights: WeightFormat = "int4",
    dtype: DType = "float16",
    layout: EngineLayout = "dual",
    memory: int | None = None,
    cache_groups: str | None = None,
    cache_dtype: CacheType = "float32",
    native: Native = "auto",
) -> Plan:
    """Plans a build of `source` without loading its weights.

    Args:
        source: `decoder.onnx` of an export, or a directory with config.json.
        budgets, batches: one row for each pair.
        max_context: most tokens of a conversation; None: the model's, at most 8,192, as `build` does.
        weights: on onnxruntime.
        dtype, layout: on tensorrt and tensorrt-rtx.
        memory: bytes there are; None: not checked.
        cache_groups: see `model.cache_groups.parse_groups`.
        cache_dtype, native: on onnxruntime-cpu, as `build` takes them. A plan for native operators needs none.

    Raises:
        SemkvError: on a source that cannot be read, an unknown target, a context or budget out of range, or memory
            that not even the smallest profile fits.
    """
    from semkv_deploy.memory.source import read_shape

    known = next((name for name in TARGETS if name == target), None)
    if known is None:
        raise SemkvError("cannot be planned for", where=f"--target {target}", expected=" or ".join(TARGETS))
    if min(batches) < 1:
        raise SemkvError("out of range", where="--batch", expected="1 or more", got=min(batches))
    shape = read_shape(source)
    context = choose_context(max_context, shape.max_position)
    groups = parse_groups(cache_groups, shape.layers, shape.kv_heads)
    method = method.for_build(records=not is_tensorrt(known))
    uses_native = not is_tensorrt(known) and _uses_native(known, native, cache_dtype)
    planner = _Planner(shape, method, known, weights, dtype, layout, groups, cache_dtype, uses_native)
    # In order and once each, as `build` makes profiles.
    by_share = {planner.profile(budget, context).budget: parse_budget(budget) for budget in budgets}
    ordered, batches = [by_share[share] for share in sorted(by_share)], sorted(set(batches))
    if memory is not None:
        planner.check_memory(memory, ordered, batches)
    return Plan(
        source=shape.source,
        family=shape.family,
        target=known,
        stored_as=weights if planner.on_onnxruntime else dtype,
        cache_type=planner.cache_dtype,
        native=uses_native,
        layout=None if planner.on_onnxruntime else layout,
        method=method.kind,
        max_context=context,
        model_max_context=shape.max_position,
        memory_bytes=memory,
        rows=[planner.row(budget, batch, context, memory) for budget in ordered for batch in batches],
        notes=_NOTES[known],
    )
