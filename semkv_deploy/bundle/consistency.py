"""A manifest against itself: what cannot all be true together is found before anything is allocated or run."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.budget import SLOT_MULTIPLE
from semkv_deploy.bundle.files import REBUILD
from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.external import is_inside
from semkv_deploy.methods.behaviours import (
    Blocks,
    BlockTables,
    IsolatedTurns,
    MakeRoom,
    NexusTurns,
    ReadAgain,
    SlotTables,
)
from semkv_deploy.methods.layout import CHUNK, DECODE, POSITION, TOKEN, TURN

if TYPE_CHECKING:
    from semkv_deploy.bundle.contract import Contract, GraphContract, ProgramContract, TensorContract
    from semkv_deploy.bundle.manifest import Manifest
    from semkv_deploy.methods.layout import Buffer

Contradiction = tuple[str, object, object]
"""The field, what it should be, what it is."""

_MODEL_FACTS = ("layers", "kv_heads", "query_heads", "head_dim", "vocab_size", "windows")
_STEP_INPUTS = ("input_ids", "position_ids", "logits_index", "length")
_REQUIRED = ("key", "value")
_COUNTED = ("length", "target", "recent")
_MOST = 1 << 24
ELEMENT_TYPES = ("float32", "float16", "bfloat16", "int8", "int64")


def check_manifest(manifest: Manifest, path: Path) -> None:
    """Fails where values of a manifest contradict each other, or name files outside the bundle.

    Raises:
        SemkvError: naming the field, what it should be and what it is.
    """
    for field, expected, got in _contradictions(manifest):
        raise SemkvError(
            f"{field} contradicts the rest of the manifest", where=path, expected=expected, got=got, fix=REBUILD
        )


def named_files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Every file that a manifest names outside its list of files, with the field that names it."""
    for field, contract in contracts(manifest):
        yield f"{field}.delimiters", contract.delimiters
        for graph in contract.graphs:
            yield f"{field}, graph {graph.name}", graph.onnx
            if graph.plan is not None:
                yield f"{field}, graph {graph.name}", graph.plan
    for name, record in manifest.targets.items():
        for file in record.files:
            yield f"targets.{name}", file


def contracts(manifest: Manifest) -> Iterator[tuple[str, Contract]]:
    """Every contract of a manifest, with the field it stands in."""
    for number, contract in enumerate(manifest.portable):
        yield f"portable.{number}", contract
    for name, record in manifest.targets.items():
        for number, built in enumerate(record.budgets):
            yield f"targets.{name}.budgets.{number}.contract", built.contract


def _contradictions(manifest: Manifest) -> Iterator[Contradiction]:
    model = manifest.model
    if manifest.max_context > model.max_position:
        yield "max_context", f"at most the model's {model.max_position} tokens", manifest.max_context
    for field, file in named_files(manifest):
        if not is_inside(file):
            yield field, "a path inside the bundle", repr(file)
    for field, contract in contracts(manifest):
        for name in _MODEL_FACTS:
            if getattr(contract, name) != getattr(model, name):
                yield f"{field}.{name}", f"the model's {getattr(model, name)}", getattr(contract, name)
        if contract.max_context > manifest.max_context:
            yield f"{field}.max_context", f"at most {manifest.max_context} tokens", contract.max_context
        for name, expected, got in (*_groups(contract), *_programs(contract), *_behaviours(contract)):
            yield f"{field}.{name}", expected, got


def _groups(contract: Contract) -> Iterator[Contradiction]:
    slots = math.ceil(contract.max_context / SLOT_MULTIPLE) * SLOT_MULTIPLE
    heads = Counter((group.layer, head) for group in contract.cache.groups for head in group.heads)
    every = {(layer, head) for layer in range(contract.layers) for head in range(contract.kv_heads)}
    if heads != Counter(every):
        where = sorted(set(heads) ^ every or {head for head, count in heads.items() if count > 1})
        yield "cache.groups", "every KV head of every layer once", f"layer and head {where[0]}"
    for number, group in enumerate(contract.cache.groups):
        if group.capacity > slots:
            yield f"cache.groups.{number}.capacity", f"at most {slots} slots, a whole conversation", group.capacity
        elif group.keep_slots + contract.prefill_chunk > group.capacity:
            most = group.capacity - contract.prefill_chunk
            yield f"cache.groups.{number}.keep_slots", f"at most {most}: room for a prefill chunk", group.keep_slots
    for buffer in (*contract.cache.buffers, *contract.cache.slot_columns, *contract.cache.step_inputs):
        sizes = buffer.shape.split(",")
        fine = [size in ("B", "Hkv", "C", "D") or (size.isdecimal() and 0 < int(size) <= _MOST) for size in sizes]
        if not all(fine) or buffer.dtype not in ("T", "float32", "int64"):
            yield f"cache, buffer {buffer.name}", "sizes B, Hkv, C, D or numbers", f"{buffer.shape} {buffer.dtype}"
    for buffer in contract.cache.step_inputs:
        if not re.fullmatch(r"(B,(\d+,)?)?\d+", buffer.shape) or buffer.dtype != "int64":
            expected = "int64 of one dimension, or of B rows of one or two"
            yield f"cache.step_inputs, {buffer.name}", expected, f"{buffer.shape} {buffer.dtype}"
    names = [buffer.name for buffer in contract.cache.buffers]
    required = [*_REQUIRED, *(("key_scale", "value_scale") if contract.dtype == "int8" else ())]
    if len(set(names)) < len(names) or not {*required} <= set(names):
        yield "cache.buffers", f"{' and '.join(required)}, each buffer once", names


def _programs(contract: Contract) -> Iterator[Contradiction]:
    if DECODE not in contract.programs:
        yield "programs", f"a program {DECODE}", sorted(contract.programs)
        return
    for name, program in contract.programs.items():
        buffers = {buffer.name: buffer for buffer in contract.cache.buffers}
        if not program.buffers.keys() <= buffers.keys():
            yield f"programs.{name}.buffers", f"of {sorted(buffers)}", sorted(program.buffers)
            return
        every = set(range(len(contract.cache.groups)))
        missing = every - {group for graph in program.graphs for group in graph.groups}
        if missing:
            yield f"programs.{name}.graphs", "a graph for every group", f"none for group {min(missing)}"
            return
        for graph in program.graphs:
            unknown = [tensor for tensor in (*graph.inputs, *graph.outputs) if tensor.dtype not in ELEMENT_TYPES]
            if unknown:
                yield f"graph {graph.name}, {unknown[0].name}", f"a type of {ELEMENT_TYPES}", repr(unknown[0].dtype)
                return
            if not set(graph.groups) <= every:
                yield f"graph {graph.name}", f"groups below {len(contract.cache.groups)}", graph.groups
                return
            yield from _bindings(contract, program, graph, buffers)
    bindings = contract.programs[DECODE].buffers.values()
    for graph in contract.decoders:
        pairs = [binding.names(group, len(contract.cache.groups)) for binding in bindings for group in graph.groups]
        known = {*_STEP_INPUTS, "logits", *(buffer.name for buffer in contract.cache.step_inputs)}
        for tensor in (*graph.inputs, *graph.outputs):
            if tensor.name not in known and not any(tensor.name in pair for pair in pairs):
                yield f"graph {graph.name}", "inputs and outputs that are buffers or known by name", tensor.name
        given = [name for name in _STEP_INPUTS if not graph.has_input(name)]
        if given:
            yield f"graph {graph.name}", f"an input {given[0]}", "none of that name"
        logits = next((tensor for tensor in graph.outputs if tensor.name == "logits"), None)
        if logits is None or (logits.shape and logits.shape[-1] not in (contract.vocab_size, "")):
            got = "no output logits" if logits is None else f"logits {logits.shape}"
            yield f"graph {graph.name}", f"{contract.vocab_size} logits, as many as the vocabulary", got


def _bindings(
    contract: Contract, program: ProgramContract, graph: GraphContract, buffers: dict[str, Buffer]
) -> Iterator[Contradiction]:
    """The buffers of each group have a graph's inputs and outputs of their names and shapes."""
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    for number in graph.groups:
        group = contract.cache.groups[number]
        for name, binding in program.buffers.items():
            sizes = {"Hkv": len(group.heads), "C": group.capacity, "D": contract.head_dim}
            shape = buffers[name].shape.split(",")
            expected = [int(size) if size.isdecimal() else sizes.get(size, size) for size in shape]
            bound = zip(binding.names(number, len(contract.cache.groups)), (inputs, outputs), strict=True)
            for tensor, there in bound:
                if tensor is None or (tensor not in there and binding.output is None):
                    # What is only read may not be taken: no decoder takes biases that are always zero.
                    continue
                if tensor not in there and name not in _REQUIRED:
                    continue  # a decoder without slot_bias counts every live slot once
                if tensor not in there:
                    yield f"graph {graph.name}", f"a tensor {tensor} for the cache", "none of that name"
                elif not _fits(there[tensor], expected):
                    yield f"graph {graph.name}, {tensor}", expected, list(there[tensor].shape)


def _fits(tensor: TensorContract, expected: list[int | str]) -> bool:
    """Whether a tensor has a buffer's shape, or the same bytes with the heads in the batch axis."""
    if len(tensor.shape) != len(expected):
        return False
    numbers = [(got, want) for got, want in zip(tensor.shape, expected, strict=True) if isinstance(got, int)]
    if all(got == want or isinstance(want, str) for got, want in numbers):
        return True
    first, second, *rest = tensor.shape
    heads = expected[1]
    folded = second == 1 and isinstance(heads, int) and (not isinstance(first, int) or first % heads == 0)
    return folded and all(not isinstance(got, int) or got == want for got, want in zip(rest, expected[2:], strict=True))


def _tables(contract: Contract, behaviour: BlockTables, field: str) -> Iterator[Contradiction]:
    """A table has room for every block that a conversation can have, and a run for those that it can close."""
    shortest = behaviour.shortest
    least = -(-max(group.capacity for group in contract.cache.groups) // shortest) + 2
    if behaviour.most < least:
        yield f"{field}.most", f"{least} blocks or more", behaviour.most
    closed = -(-contract.prefill_chunk // shortest) + 1
    if behaviour.closed < closed:
        yield f"{field}.closed", f"{closed} blocks or more", behaviour.closed
    shapes = {each.name: each.shape for each in contract.cache.step_inputs}
    if shapes.get(behaviour.input) != f"B,{behaviour.most}":
        yield f"{field}.input", f"one of cache.step_inputs, B,{behaviour.most}", behaviour.input
    if behaviour.program in contract.programs:
        yield from _map(contract, behaviour, field)
    if any(isinstance(each, MakeRoom) for each in contract.behaviours):
        yield field, "no behaviour that evicts", "make_room"


def _slot_tables(contract: Contract, behaviour: SlotTables, field: str) -> Iterator[Contradiction]:
    """A table has room for every block of a head, and what it follows is there before it."""
    groups = contract.cache.groups
    least = 2 * (max(group.capacity for group in groups) // (behaviour.join + 1)) + 3
    if behaviour.most < least:
        yield f"{field}.most", f"{least} blocks or more", behaviour.most
    shape = f"B,{sum(len(group.heads) for group in groups)},{behaviour.most}"
    if {each.name: each.shape for each in contract.cache.step_inputs}.get(behaviour.input) != shape:
        yield f"{field}.input", f"one of cache.step_inputs, {shape}", behaviour.input
    before = contract.behaviours[: contract.behaviours.index(behaviour)]
    columns = [each.column for each in before if isinstance(each, Blocks)]
    if behaviour.column not in columns:
        yield f"{field}.column", "that of a behaviour blocks before it", behaviour.column
    if any(isinstance(each, MakeRoom) for each in contract.behaviours[len(before) :]):
        yield field, "behind the behaviour that makes room", "before it"
    if behaviour.program in contract.programs:
        yield from _map(contract, behaviour, field)


def _map(contract: Contract, behaviour: BlockTables | SlotTables, field: str) -> Iterator[Contradiction]:
    """The program takes what a host gives it, and writes tables of as many rows as there are blocks."""
    program, buffers = contract.programs[behaviour.program], {each.name: each for each in contract.cache.buffers}
    given = {"block_start", "block_length", "block_number", *(str(each.input) for each in program.buffers.values())}
    for graph in program.graphs:
        for tensor in graph.inputs:
            if tensor.name not in given:
                yield f"{field}.program", f"a value of {tensor.name}", "none"
    for name, binding in program.buffers.items():
        if binding.output is not None and buffers[name].shape.split(",")[2:3] != [str(behaviour.most)]:
            yield f"cache, buffer {name}", f"{behaviour.most} rows, one a block", buffers[name].shape


def _blocks(contract: Contract, behaviour: Blocks | BlockTables, field: str) -> Iterator[Contradiction]:
    """Ids and sums are numbers that hosts can hold."""
    for name in ("token_ids", "turn_ids"):
        outside = [token for token in getattr(behaviour, name) if not 0 <= token < contract.vocab_size]
        if outside:
            yield f"{field}.{name}", f"ids below {contract.vocab_size}", outside[0]
    for domain in behaviour.domains:
        if any(abs(number) > _MOST for number in (*domain.weights, *domain.log_shares)):
            yield f"{field}.domains, {domain.name}", "numbers of a sensible size", "others"


def _reading(contract: Contract, behaviour: ReadAgain, field: str) -> Iterator[Contradiction]:
    if behaviour.input not in [buffer.name for buffer in contract.cache.step_inputs]:
        yield f"{field}.input", "one of cache.step_inputs", behaviour.input
    if behaviour.piece > contract.prefill_chunk:
        yield f"{field}.piece", f"at most {contract.prefill_chunk} tokens, a prompt's piece", behaviour.piece
    rooms = [each for each in contract.behaviours[contract.behaviours.index(behaviour) :] if isinstance(each, MakeRoom)]
    if not any(room.reserve == behaviour.piece for room in rooms):
        yield (
            field,
            "before one that makes room and keeps a reserve of its piece",
            [each.kind for each in rooms],
        )


def _turns(contract: Contract, behaviour: NexusTurns, field: str) -> Iterator[Contradiction]:
    if behaviour.decoder != DECODE:
        yield f"{field}.decoder", DECODE, behaviour.decoder
    if behaviour.first_id != contract.vocab_size:
        yield f"{field}.first_id", f"{contract.vocab_size}, the first id beyond the vocabulary", behaviour.first_id
    if behaviour.most * behaviour.turns > _MOST:
        yield f"{field}.most", "a table of a sensible size", f"{behaviour.most} rows of {behaviour.turns} turns"
    if math.ceil(behaviour.nexus_share * behaviour.tokens) > behaviour.most:
        yield f"{field}.tokens", f"at most {behaviour.most} Nexus rows", behaviour.tokens
    if TURN not in contract.cache.slot_columns:
        yield "cache.slot_columns", f"{TURN.name} {TURN.shape}", [each.name for each in contract.cache.slot_columns]
    common = set(behaviour.common)
    if len(common) < len(behaviour.common) or not common <= set(range(contract.vocab_size)):
        yield f"{field}.common", "ids of the vocabulary, each once", f"{len(behaviour.common)} ids"
    if behaviour.placement == "spread" and TOKEN not in contract.cache.slot_columns:
        yield "cache.slot_columns", f"{TOKEN.name} {TOKEN.shape}", [each.name for each in contract.cache.slot_columns]
    groups = contract.cache.groups
    fits = [0 < keep <= group.capacity for keep, group in zip(behaviour.keep_slots, groups, strict=False)]
    if len(behaviour.keep_slots) != len(groups) or not all(fits):
        yield f"{field}.keep_slots", f"{len(groups)} values, at most each group's capacity", behaviour.keep_slots
    program = contract.programs.get(behaviour.program)
    if program is None:
        return
    columns = [column.name for column in contract.cache.slot_columns]
    for graph in program.graphs:
        bound = {binding.names(group, len(groups))[0] for binding in program.buffers.values() for group in graph.groups}
        for tensor in graph.inputs:
            if tensor.name not in {"length", "keep_index", *columns, *bound}:
                yield f"graph {graph.name}", "inputs that are buffers, columns, length or keep_index", tensor.name
        if not graph.has_input("keep_index"):
            yield f"graph {graph.name}", "an input keep_index", "none of that name"


def _inputs(contract: Contract, behaviour: MakeRoom, field: str) -> Iterator[Contradiction]:
    """A program's inputs are buffers, what a host counts, or given by group, in the graph's type."""
    program = contract.programs.get(behaviour.program)
    if program is None:
        return
    for graph in program.graphs:
        for group in graph.groups:
            bound = {binding.names(group, len(contract.cache.groups))[0] for binding in program.buffers.values()}
            counted = {*_COUNTED, *(column.name for column in contract.cache.slot_columns), *bound}
            for tensor in graph.inputs:
                if tensor.name in counted:
                    continue
                if len(behaviour.by_group.get(tensor.name, ())) <= group:
                    yield f"{field}.by_group", f"a value of {tensor.name} for group {group}", "none"
                    return
                value = behaviour.by_group[tensor.name][group]
                if tensor.dtype != ("int64" if isinstance(value, int) else "float32"):
                    yield f"{field}.by_group.{tensor.name}", tensor.dtype, repr(value)


def _isolated(contract: Contract, behaviour: IsolatedTurns, field: str) -> Iterator[Contradiction]:
    """Without sinks a program would choose from older turns as from the open one."""
    halves = [keep - keep // 2 for keep in behaviour.keep_slots]
    sinks = behaviour.by_group.get("sinks", ())
    if not all(isinstance(each, int) and 0 <= each <= half for each, half in zip(sinks, halves, strict=False)):
        yield f"{field}.by_group.sinks", f"at most half of keep_slots, {halves}", sinks
    if not sinks:
        yield f"{field}.by_group", "values of sinks", sorted(behaviour.by_group)
    program = contract.programs.get(behaviour.program)
    for graph in program.graphs if program is not None else ():
        if not graph.has_input("sinks"):
            yield f"graph {graph.name}", "an input sinks", "none of that name"


def _behaviours(contract: Contract) -> Iterator[Contradiction]:
    groups = len(contract.cache.groups)
    for number, behaviour in enumerate(contract.behaviours):
        field = f"behaviours.{number}"
        if isinstance(behaviour, Blocks | BlockTables):
            yield from _blocks(contract, behaviour, field)
        if isinstance(behaviour, Blocks):
            columns = [column.name for column in contract.cache.slot_columns if column.name not in (POSITION, CHUNK)]
            if behaviour.column not in columns:
                yield f"{field}.column", f"one of cache.slot_columns beside {POSITION} and {CHUNK}", behaviour.column
            continue
        if behaviour.program not in contract.programs:
            yield f"{field}.program", f"of {sorted(contract.programs)}", behaviour.program
        if isinstance(behaviour, BlockTables):
            yield from _tables(contract, behaviour, field)
            continue
        if isinstance(behaviour, SlotTables):
            yield from _slot_tables(contract, behaviour, field)
            continue
        if isinstance(behaviour, ReadAgain):
            yield from _reading(contract, behaviour, field)
            continue
        if isinstance(behaviour, NexusTurns):
            yield from _turns(contract, behaviour, field)
            continue
        yield from _inputs(contract, behaviour, field)
        if isinstance(behaviour, IsolatedTurns):
            yield from _isolated(contract, behaviour, field)
        lists = {"keep_slots": behaviour.keep_slots, "turn_share": behaviour.turn_share, **behaviour.by_group}
        for name, values in lists.items():
            if len(values) != groups:
                yield f"{field}.{name}", f"{groups} values, one a group", len(values)
            flat = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
            if not all(abs(each) <= _MOST for each in flat):
                yield f"{field}.{name}", "numbers of a sensible size", "others"
            # A program is for groups with the same number of heads.
            counts = [len(value) if isinstance(value, tuple) else -1 for value in values]
            kinds = {(len(group.heads), count) for group, count in zip(contract.cache.groups, counts, strict=False)}
            if len(kinds) > len({heads for heads, _ in kinds}):
                yield f"{field}.{name}", "as many numbers for each group with as many heads", "other counts"
        rooms = list(zip(behaviour.keep_slots, contract.cache.groups, strict=False))
        most = min((group.capacity - keep for keep, group in rooms), default=0) - contract.prefill_chunk
        if behaviour.reserve > max(most, 0):
            yield f"{field}.reserve", f"at most {most} slots: room beside a prompt's piece", behaviour.reserve
        if any(not 0 < keep <= group.capacity for keep, group in rooms):
            yield f"{field}.keep_slots", "at most each group's capacity", behaviour.keep_slots
