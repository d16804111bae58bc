"""A host of a bundle written from bundle.json alone, as one in C++ would be: numpy, and ONNX Runtime for every target.

Nothing of semkv_deploy is imported. TensorRT's graphs are float32. Where the contract's `native` is a number, graphs
have operators of libsemkv_onnxruntime.so, which ONNX Runtime is told to load. `host_without_semkv.py` is a program on
top of it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]


TYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


class _Graph:
    """A graph whose inputs and outputs are bound to buffers by name."""

    def __init__(self, root: Path, contract: dict[str, Any], library: Path | None) -> None:
        self.contract = contract
        options = onnxruntime.SessionOptions()
        if library is not None:
            options.register_custom_ops_library(str(library))
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(root / contract["onnx"]), options, providers=providers)
        self.inputs = {tensor["name"]: tensor for tensor in contract["inputs"]}
        self.outputs = {tensor["name"]: tensor for tensor in contract["outputs"]}

    def run(self, given: Arrays, results: Arrays) -> None:
        assert set(given) == set(self.inputs) and set(results) == set(self.outputs)
        binding, held = self.session.io_binding(), []
        for bind, arrays in ((binding.bind_ortvalue_input, given), (binding.bind_ortvalue_output, results)):
            for name, array in arrays.items():
                assert array.flags.c_contiguous
                held.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
                bind(name, held[-1])
        self.session.run_with_iobinding(binding)


class Host:
    """A conversation in every row of one budget."""

    def __init__(
        self, root: Path, target: str, budget: int = 0, batch: int = 1, *, library: Path | None = None
    ) -> None:
        manifest = json.loads((root / "bundle.json").read_text(encoding="utf-8"))
        self.contract = contract = manifest["targets"][target]["budgets"][budget]["contract"]
        if contract["native"] is not None and library is None:
            raise ValueError(f"the graphs need libsemkv_onnxruntime.so of version {contract['native']}")
        self.batch = contract["batch"] or batch
        self.groups = contract["cache"]["groups"]
        self.graphs = {
            name: [_Graph(root, graph, library) for graph in program["graphs"]]
            for name, program in contract["programs"].items()
        }
        buffers = contract["cache"]["buffers"]
        self.buffers: dict[str, list[NDArray[Any]]] = {
            buffer["name"]: [np.full(self._shape(buffer, group), 7, self._type(buffer)) for group in self.groups]
            for buffer in buffers
        }
        self.spare: Arrays = {}
        self.columns: dict[str, list[Ids]] = {
            column["name"]: [np.zeros(self._shape(column, group), np.int64) for group in self.groups]
            for column in contract["cache"]["slot_columns"]
        }
        self.delimiters = set(json.loads((root / contract["delimiters"]).read_text(encoding="utf-8"))["token_ids"])
        self.compressions = 0
        self.cutters = [each for each in contract["behaviours"] if each["kind"] in ("blocks", "block_tables")]
        self.new_conversation()

    def _type(self, buffer: dict[str, Any]) -> Any:
        return TYPES[self.contract["dtype"] if buffer["dtype"] == "T" else buffer["dtype"]]

    def _shape(self, buffer: dict[str, Any], group: dict[str, Any]) -> list[int]:
        sizes = {
            "B": self.batch,
            "Hkv": len(group["heads"]),
            "C": group["capacity"],
            "D": self.contract["head_dim"],
        }
        return [sizes[size] if size in sizes else int(size) for size in buffer["shape"].split(",")]

    def new_conversation(self) -> None:
        self.position = np.zeros(self.batch, np.int64)
        self.length = np.zeros((len(self.groups), self.batch), np.int64)
        self.chunk, self.after_delimiter = [0] * self.batch, [False] * self.batch
        self.turn, self.begun, self.ended = (np.zeros(self.batch, np.int64) for _ in range(3))
        self.frozen = np.zeros_like(self.length)
        self.unread: list[list[int]] = [[] for _ in range(self.batch)]
        self.open: list[list[int]] = [[] for _ in range(self.batch)]
        self.closed = [0] * self.batch
        self.ends: list[list[int]] = [[] for _ in range(self.batch)]
        self.sums = [[0] * sum(len(each["domains"]) for each in self.cutters) for _ in range(self.batch)]
        for buffer in self.contract["cache"]["buffers"]:
            for said in self.buffers[buffer["name"]] if buffer["dtype"] == "float32" else []:
                said.fill(0)

    def prompt(self, row: int, ids: list[int]) -> NDArray[np.float32]:
        """`[V]` logits after the last token."""
        self._finish_turns([row])
        piece = self.contract["prefill_chunk"]
        for start in range(0, len(ids), piece):
            tokens = ids[start : start + piece]
            appended = np.zeros(self.batch, np.int64)
            appended[row] = len(tokens)
            self._make_room(appended)
            logits = self._run(np.array([tokens]), row, len(tokens) - 1)
            self._count(row, tokens)
        return logits[0, 0]

    def step(self, tokens: Ids, wanted: list[bool]) -> NDArray[np.float32]:
        """`[B,V]` logits after one token in each row; rows that are not wanted stay as they are."""
        self._finish_turns(np.flatnonzero(wanted).tolist())
        self._make_room(np.array(wanted, np.int64))
        capacity = np.array([group["capacity"] for group in self.groups])[:, None]
        if (self.length[:, ~np.array(wanted)] >= capacity).any():
            logits = np.zeros((self.batch, 1, self.contract["vocab_size"]), np.float32)
            for row in np.flatnonzero(wanted):
                logits[row] = self._run(tokens[row : row + 1, None], int(row), 0)[0]
        else:
            logits = self._run(tokens[:, None], None, 0)
        for row, token in enumerate(tokens.tolist()):
            if wanted[row]:
                self._count(row, [token])
        return logits[:, 0]

    def end_turn(self, rows: list[int] | None = None) -> None:
        for behaviour in self.contract["behaviours"]:
            if behaviour["kind"] in ("nexus_turns", "isolated_turns"):
                ended = np.isin(np.arange(self.batch), range(self.batch) if rows is None else rows)
                self.ended |= ended & (self.position > self.begun)
                if behaviour["when"] == "turn":
                    self._finish_turns(list(range(self.batch)))
                continue
            if behaviour.get("when") != "turn":
                continue
            if behaviour["kind"] == "read_again":
                self._read_again(behaviour, list(range(self.batch)))
            else:
                for group, keep in enumerate(behaviour["keep_slots"]):
                    target = np.ceil(behaviour["turn_share"][group] * self.position).astype(np.int64)
                    self._compress(behaviour, group, np.clip(target, behaviour["least"], keep))
                self.compressions += 1

    def _finish_turns(self, rows: list[int]) -> None:
        rows = [row for row in rows if self.ended[row]]
        if not rows:
            return
        (behaviour,) = (each for each in self.contract["behaviours"] if each["kind"].endswith("_turns"))
        if behaviour["kind"] == "isolated_turns":
            self._finish_isolated(behaviour, rows)
            return
        gone = np.zeros((2, self.batch), np.int64)
        for row in rows:
            first = max(int(self.begun[row]), behaviour["sinks"])
            length = int(self.position[row]) - first
            slots = behaviour["tokens"] or math.ceil(behaviour["kept"] * length)
            share = math.ceil(behaviour["nexus_share"] * slots)
            if slots < length:
                nexus = min(share, behaviour["most"])
                gone[:, row] = first, self.position[row] - (slots - share)
                number = min(int(self.turn[row]), behaviour["turns"] - 1) * behaviour["most"]
                if behaviour.get("placement") == "spread":
                    self._append_spread(row, behaviour, nexus, number, gone[:, row])
                else:
                    first_id = behaviour["first_id"] + number
                    self._append(row, list(range(first_id, first_id + nexus)))
        kept = []
        for group, live in enumerate(self._live()):
            position, turn = (self.columns[name][group][:, 0] for name in ("slot_position", "slot_turn"))
            of_turn = (turn == 2 * self.turn[:, None]) & (position >= gone[0, :, None]) & (position < gone[1, :, None])
            kept.append(live & ~of_turn)
        self._drop(behaviour, kept)
        self.turn[rows] += 1
        self.begun[rows], self.ended[rows] = self.position[rows], 0

    def _finish_isolated(self, behaviour: dict[str, Any], rows: list[int]) -> None:
        for each in self.contract["behaviours"]:
            if each["kind"] == "read_again":
                self._read_again(each, rows)
        share = np.array(behaviour["turn_share"])[:, None]
        own = np.ceil(share * (self.position - self.begun)).astype(np.int64)
        wanted = np.isin(np.arange(self.batch), rows) & np.ones_like(self.length, bool)
        self._fit(behaviour, wanted, np.maximum(own, behaviour["least"] - self.frozen), 0)
        self.frozen[:, rows] = self.length[:, rows]
        self.begun[rows], self.ended[rows] = self.position[rows], 0

    def _fit(self, behaviour: dict[str, Any], wanted: NDArray[np.bool_], own: Ids, recent_least: int) -> None:
        """Fits rows of groups, `[groups,B]`, to `own` slots of their open turns. This host pins nothing."""
        keep = np.array(behaviour["keep_slots"])[:, None]
        sinks = np.array(behaviour["by_group"]["sinks"])[:, None] + np.zeros_like(self.frozen)
        own = np.minimum(np.minimum(own, self.length - self.frozen), np.maximum(keep - self.frozen, keep // 2))
        recent = np.maximum(np.floor(behaviour["recent_share"] * own).astype(np.int64), recent_least)
        over = wanted & (self.frozen + own < self.length)
        self._compress_alike(behaviour, over, np.maximum(sinks, self.frozen), self.frozen + own, recent)
        before = self.length.copy()
        over, target = wanted & (before > keep), keep + np.zeros_like(before)
        self._compress_alike(behaviour, over, sinks, target, before - self.frozen)
        self.frozen -= before - self.length

    def _compress_alike(
        self, behaviour: dict[str, Any], over: NDArray[np.bool_], sinks: Ids, target: Ids, recent: Ids
    ) -> None:
        while over.any():
            for group in np.flatnonzero(over.any(1)):
                least = sinks[group][over[group]].min()
                alike = over[group] & (sinks[group] == least)
                slots = np.where(alike, target[group], self.groups[group]["capacity"])
                given = {"target": slots, "recent": np.where(alike, recent[group], 0), "sinks": np.array(least)}
                self._run_group(behaviour["program"], group, {**self._fixed(behaviour, group), **given})
                over[group] &= ~alike
            self.compressions += 1

    def _append(self, row: int, ids: list[int]) -> None:
        self._room_for(row, len(ids))
        piece = self.contract["prefill_chunk"]
        for start in range(0, len(ids), piece):
            rows = ids[start : start + piece]
            self._run(np.array([rows]), row, len(rows) - 1)
            self._count(row, rows)

    def _room_for(self, row: int, count: int) -> None:
        appended = np.zeros(self.batch, np.int64)
        appended[row] = count
        self._make_room(appended)

    def _append_spread(self, row: int, behaviour: dict[str, Any], count: int, number: int, gone: Ids) -> None:
        """Nexus rows that begin as tokens of the turn with positions from gone[0] until before gone[1]."""
        self._room_for(row, count)
        at, turn, token = (self.columns[name][0][row, 0] for name in ("slot_position", "slot_turn", "slot_token"))
        live = np.arange(len(at)) < self.length[0, row]
        body = np.flatnonzero(live & (turn == 2 * self.turn[row]) & (at >= gone[0]) & (at < gone[1]))
        n, bits = len(body), max(1, (len(body) - 1).bit_length())
        places = (n - 1 - int(f"{each:0{bits}b}"[::-1], 2) for each in range(1 << bits))
        rank = {of: place for place, of in enumerate(behaviour.get("common", ()))}
        rarity = {place: rank.get(int(token[slot]), len(rank)) for place, slot in enumerate(body)}
        rarest = sorted((place for place in places if place >= 0), key=lambda place: -rarity[place])
        order: list[int] = []
        for last, rare in zip(range(n - 1, -1, -1), rarest, strict=True):
            order += [each for each in dict.fromkeys((last, rare)) if each not in order]
        chosen = body[order[:count]]
        first_id = behaviour["first_id"]
        ids = [first_id + (number + j) * first_id + int(token[slot]) for j, slot in enumerate(chosen)]
        positions, seen, piece = at[chosen].copy(), int(self.position[row]), self.contract["prefill_chunk"]
        for start in range(0, len(ids), piece):
            part = slice(start, start + piece)
            self._run(np.array([ids[part]]), row, len(ids[part]) - 1, position=positions[part])
            for one, position in zip(ids[part], positions[part].tolist(), strict=True):
                self.position[row] = position
                self._count(row, [one])
            self.position[row] = seen

    def _live(self) -> list[NDArray[np.bool_]]:
        """By group, `[B,C]`."""
        return [
            np.arange(of["capacity"]) < length[:, None] for of, length in zip(self.groups, self.length, strict=True)
        ]

    def _drop_turns(self, behaviour: dict[str, Any], appended: Ids) -> None:
        kept = self._live()
        for group, stays in enumerate(kept):
            position, turn = (self.columns[name][group][:, 0] for name in ("slot_position", "slot_turn"))
            free = stays & (turn != -1) & (position >= behaviour["sinks"])
            for row in np.flatnonzero(self.length[group] + appended > self.groups[group]["capacity"]):
                most = self.groups[group]["capacity"] - int(appended[row])
                for number in range(int(self.turn[row])):
                    if stays[row].sum() > most:
                        stays[row, free[row] & (turn[row] // 2 == number)] = False
                if stays[row].sum() > most:
                    excess = stays[row].sum() - min(most, behaviour["keep_slots"][group])
                    stays[row, np.flatnonzero(free[row] & stays[row])[:excess]] = False
        self._drop(behaviour, kept)

    def _drop(self, behaviour: dict[str, Any], kept: list[NDArray[np.bool_]]) -> None:
        changed = [bool((stays.sum(1) < length).any()) for stays, length in zip(kept, self.length, strict=True)]
        self.compressions += any(changed)
        for group in np.flatnonzero(changed):
            index = np.full((self.batch, 1, self.groups[group]["capacity"]), -1)
            for row, stays in enumerate(kept[group]):
                index[row, 0, : stays.sum()] = np.flatnonzero(stays)
            self._run_group(behaviour["program"], int(group), {"keep_index": index})

    def _read_again(self, behaviour: dict[str, Any], rows: list[int]) -> None:
        for row in rows:
            first = min(int(self.position[row]), self.contract["max_context"] - behaviour["piece"])
            starts = range(0, len(self.unread[row]), behaviour["piece"])
            for number, start in enumerate(starts, 1):
                tokens = self.unread[row][start : start + behaviour["piece"]]
                recorded = {behaviour["input"]: np.array([number, len(starts)])}
                self._run(np.array([tokens]), row, 0, position=first, recorded=recorded)
            self.unread[row] = []

    def _run(
        self,
        tokens: Ids,
        row: int | None,
        index: int,
        *,
        position: int | Ids | None = None,
        recorded: Arrays | None = None,
    ) -> NDArray[np.float32]:
        rows = slice(None) if row is None else slice(row, row + 1)
        count, width = tokens.shape
        phase = "prefill" if row is not None else "decode"
        program = self.contract["programs"]["decode"]
        graph = next(graph for graph in self.graphs["decode"] if graph.contract["phase"] in (phase, "decoder"))
        given: Arrays = {
            "input_ids": tokens,
            "position_ids": position[None]
            if isinstance(position, np.ndarray)
            else (self.position[rows, None] if position is None else position) + np.arange(width)[None],
            "logits_index": np.full((count, 1), index),
            "length": np.ascontiguousarray(self.length[:, rows]),
            **{
                each["name"]: (recorded or {}).get(each["name"], np.zeros(int(each["shape"]), np.int64))
                if each["shape"].isdecimal()
                else self._block_ends(rows, each["shape"])
                for each in self.contract["cache"]["step_inputs"]
                if each["name"] in graph.inputs
            },
        }
        results: Arrays = {"logits": np.zeros((count, 1, self.contract["vocab_size"]), np.float32)}
        for name, patterns in program["buffers"].items():
            for group, buffer in enumerate(self.buffers[name]):
                source, result = (self._name(patterns[side], group) for side in ("input", "output"))
                if source not in graph.inputs:
                    continue
                view, shape = buffer[rows], graph.inputs[source]["shape"]
                if shape[1] != view.shape[1]:  # heads lie in the first axis
                    view = view.reshape(-1, *(size for size in shape[1:]))
                given[source] = view
                if result is not None:
                    assert graph.contract["aliases"][source] == result
                    results[result] = view
        graph.run(given, results)
        return results["logits"]

    def _block_ends(self, rows: slice, shape: str) -> Ids:
        for behaviour in self.contract["behaviours"]:
            if behaviour["kind"] == "slot_tables":
                return np.ascontiguousarray(self.slot_tables(behaviour)[rows])
        ends = np.zeros((self.batch, int(shape.removeprefix("B,"))), np.int64)
        for row, closed in enumerate(self.ends):
            every = [*closed, *([int(self.position[row])] if self.open[row] else [])]
            ends[row, : len(every)] = every
        return np.ascontiguousarray(ends[rows])

    def slot_tables(self, behaviour: dict[str, Any]) -> Ids:
        """`[B,heads,most]` ends of blocks; maps all of them, each time: what did not change stays what it was."""
        tables = []
        for group, column in enumerate(self.columns[behaviour["column"]]):
            ends = np.zeros((*column.shape[:2], behaviour["most"]), np.int64)
            for row, head in np.ndindex(column.shape[:2]):
                numbers = column[row, head, : self.length[group, row]].tolist()
                found: list[int] = []
                for slot, number in enumerate(numbers, 1):
                    if slot == len(numbers) or numbers[slot] != number:
                        start = found[-2] if len(found) > 1 else 0
                        if found and slot < len(numbers) and slot - start <= behaviour["join"]:
                            found[-1] = slot
                        else:
                            found.append(slot)
                ends[row, head, : len(found)] = found
            tables.append(ends)
            starts = np.pad(ends[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
            last = np.maximum((ends > 0).sum(-1, keepdims=True) - 1, 0)
            for first in range(0, int(last.max()), behaviour["closed"]):
                number = first + np.arange(behaviour["closed"])
                used = number < last
                block = np.where(used, number, behaviour["most"] - 1)
                start, end = (np.where(used, np.take_along_axis(of, block, 2), 0) for of in (starts, ends))
                self._map_group(
                    behaviour, group, {"block_start": start, "block_length": end - start, "block_number": block}
                )
        return np.concatenate(tables, 1)

    def _map(self, behaviour: dict[str, Any], row: int, first: int) -> None:
        """Maps the row's blocks from a number on: they were closed by what was appended last."""
        length = np.zeros((self.batch, behaviour["closed"]), np.int64)
        start, number = length.copy(), np.full_like(length, behaviour["most"] - 1)
        for place, block in enumerate(range(first, len(self.ends[row]))):
            begin = self.ends[row][block - 1] if block else 0
            start[row, place], length[row, place] = begin, self.ends[row][block] - begin
            number[row, place] = block
        for group in range(len(self.groups)):
            self._map_group(behaviour, group, {"block_start": start, "block_length": length, "block_number": number})

    def _map_group(self, behaviour: dict[str, Any], group: int, blocks: Arrays) -> None:
        patterns = self.contract["programs"][behaviour["program"]]["buffers"]
        given = blocks | {of["input"]: self.buffers[name][group] for name, of in patterns.items()}
        graph = next(graph for graph in self.graphs[behaviour["program"]] if group in graph.contract["groups"])
        source, result = (patterns["representatives"][side] for side in ("input", "output"))
        table = self.buffers["representatives"][group]
        written = table if graph.contract["aliases"].get(source) == result else np.empty_like(table)
        graph.run(given, {result: written})
        self.buffers["representatives"][group] = written

    def _name(self, pattern: str | None, group: int) -> str | None:
        width = max(2, len(str(len(self.groups) - 1)))
        return pattern and pattern.replace("{group}", f"{group:0{width}d}")

    def _count(self, row: int, tokens: list[int]) -> None:
        self.unread[row] += tokens
        first = len(self.ends[row])
        self._count_each(row, tokens)
        for behaviour in self.cutters:
            if behaviour["kind"] == "block_tables" and len(self.ends[row]) > first:
                self._map(behaviour, row, first)

    def _count_each(self, row: int, tokens: list[int]) -> None:
        for token in tokens:
            nexus = token >= self.contract["vocab_size"]
            delimiter = token in self.delimiters and not nexus
            if self.after_delimiter[row] and not delimiter:
                self.chunk[row] += 1
            self.after_delimiter[row] = delimiter
            for group, length in enumerate(self.length[:, row]):
                self.columns["slot_position"][group][row, :, length] = self.position[row]
                self.columns["slot_chunk"][group][row, :, length] = 2 * self.chunk[row] + delimiter
                if "slot_token" in self.columns:
                    self.columns["slot_token"][group][row, :, length] = token
                if "slot_turn" in self.columns:
                    self.columns["slot_turn"][group][row, :, length] = 2 * self.turn[row] + nexus
                for behaviour in self.cutters:
                    if "column" in behaviour:
                        self.columns[behaviour["column"]][group][row, :, length] = self.closed[row]
            self.length[:, row] += 1
            self.position[row] += 1
            for behaviour in self.cutters:
                self._cut(behaviour, row, token)

    def _cut(self, behaviour: dict[str, Any], row: int, token: int) -> None:
        """A token more in the row's open block; it may be whole now."""
        turn, other, domains = -2, len(behaviour["token_ids"]), behaviour["domains"]
        code = -1
        if domains and token in behaviour["turn_ids"]:
            code = turn
        elif domains and token in behaviour["token_ids"]:
            code = behaviour["token_ids"].index(token)
        elif domains and token in self.delimiters:
            code = other
        if code >= 0:
            self.sums[row] = [s + d["log_shares"][code] for s, d in zip(self.sums[row], domains, strict=True)]
        self.open[row].append(code)
        base, search, tokens = behaviour["base"], behaviour["search"], self.open[row]
        if code == turn and len(tokens) >= base - search:
            length = len(tokens)
        elif len(tokens) < base + search:
            return
        else:
            length = base
            if any(each != -1 for each in tokens[base - search - 1 :]):
                likeliest = behaviour["domain"]
                if likeliest is None:
                    likeliest = int(np.argmax(self.sums[row]))
                length = max(
                    (n for n in range(base - search, base + search + 1) if tokens[n - 1] != -1),
                    key=lambda n: (
                        domains[likeliest]["weights"][tokens[n - 1]] * max(search, 1)
                        - behaviour["nearness"] * abs(n - base),
                        -abs(n - base),
                        -n,
                    ),
                )
        self.open[row] = tokens[length:]
        self.closed[row] += 1
        self.ends[row].append((self.ends[row][-1] if self.ends[row] else 0) + length)
        if "column" not in behaviour:
            return
        first = self.position[row] - len(self.open[row])
        for group, positions in enumerate(self.columns["slot_position"]):
            live = np.arange(positions.shape[2]) < self.length[group, row]
            newer = live & (positions[row] >= first)
            self.columns[behaviour["column"]][group][row][newer] = self.closed[row]

    def _make_room(self, appended: Ids) -> None:
        reserve = max((each.get("reserve", 0) for each in self.contract["behaviours"]), default=0)
        full = [(self.length[group] + appended > of["capacity"] - reserve) for group, of in enumerate(self.groups)]
        if not np.any(full):
            return
        for each in self.contract["behaviours"]:
            if each["kind"] == "nexus_turns":
                self._drop_turns(each, appended)
                return
        kinds = ("make_room", "isolated_turns")
        (behaviour,) = (each for each in self.contract["behaviours"] if each["kind"] in kinds)
        for each in self.contract["behaviours"]:
            if each["kind"] == "read_again":
                self._read_again(each, np.flatnonzero(np.any(full, axis=0)).tolist())
        if behaviour["kind"] == "isolated_turns":
            self._fit(behaviour, np.array(full), self.length - self.frozen, behaviour["recent_least"])
            return
        for group, rows in enumerate(full):
            if rows.any():
                keep, capacity = behaviour["keep_slots"][group], self.groups[group]["capacity"]
                self._compress(behaviour, group, np.where(rows, keep, capacity))
        self.compressions += 1

    def _compress(self, behaviour: dict[str, Any], group: int, target: Ids) -> None:
        recent = np.maximum(np.floor(behaviour["recent_share"] * target), behaviour["recent_least"]).astype(np.int64)
        given: Arrays = {"target": target, "recent": recent, **self._fixed(behaviour, group)}
        self._run_group(behaviour["program"], group, given)

    def _fixed(self, behaviour: dict[str, Any], group: int) -> Arrays:
        given = {name: np.array(values[group]) for name, values in behaviour["by_group"].items()}
        return {name: each.astype(np.float32) if each.dtype == np.float64 else each for name, each in given.items()}

    def _run_group(self, name_of_program: str, group: int, given: Arrays) -> None:
        program = self.contract["programs"][name_of_program]
        graph = next(graph for graph in self.graphs[name_of_program] if group in graph.contract["groups"])
        columns = {name: column[group] for name, column in self.columns.items()}
        given = {**given, **columns, "length": self.length[group].copy()}
        results = {f"{name}_out": np.zeros_like(given[name]) for name in ("length", *self.columns)}
        results |= {name: np.zeros(self.batch, np.int64) for name in ("level", "evicted")}
        for name, patterns in program["buffers"].items():
            given[patterns["input"]] = self.buffers[name][group]
            results[patterns["output"]] = np.zeros_like(self.buffers[name][group])
        graph.run({name: given[name] for name in graph.inputs}, results)
        self.length[group] = results["length_out"]
        for name, column in self.columns.items():
            column[group] = results[f"{name}_out"]
        decoder = self.graphs["decode"][0].inputs
        for name, patterns in program["buffers"].items():
            self.buffers[name][group] = results[patterns["output"]]
            read = self._name(self.contract["programs"]["decode"]["buffers"][name]["input"], group)
            if name == "slot_bias" and read not in decoder:
                self.buffers[name][group].fill(0)
