"""llama.cpp with its full cache, behind its server.

Times are those that the server takes of itself, so that HTTP and JSON cost it nothing.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from semkv_deploy.bench.engines.base import Engine, Rows, require_package, require_vocabulary
from semkv_deploy.bench.engines.llama_servers import PackagedServer, ProgramServer, ServerOptions, check_program
from semkv_deploy.errors import SemkvError

OPTION = "--llama-cpp"
PROGRAM_OPTION = "--llama-server"

CACHE_TYPES = ("f16", "q8_0", "f32", "bf16", "q4_0")
"""Of both keys and values, as llama.cpp calls them."""

_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Of an element; blocks of 32 have a scale of 2 bytes."""

_SPARE = 8
"""Positions of a row beyond its context: the server wants one free when it chooses the last token."""


BLOCK = 32
"""Elements of a head that share a scale in q8_0 and q4_0."""


def check(path: Path, caches: Sequence[str], vocabulary: int, program: Path | None = None) -> None:
    """Fails unless the server is there and the file is a GGUF that takes the caches and the tokens.

    Args:
        program: a llama-server; None: the package's.
        vocabulary: entries that it must have at least.

    Raises:
        SemkvError: with what is missing.
    """
    if not path.is_file():
        raise SemkvError("no such file", where=f"{OPTION} {path}", expected="a .gguf file")
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise SemkvError("not a GGUF file", where=f"{OPTION} {path}", expected="it to start with 'GGUF'", got=start)
    if program is None:
        require_package("xllamacpp", OPTION)
    else:
        check_program(program, PROGRAM_OPTION)
    facts = _Facts.read(path)
    require_vocabulary(facts.vocabulary, vocabulary, f"{OPTION} {path}")
    for cache in caches:
        if cache.startswith("q") and (facts.key_size % BLOCK or facts.value_size % BLOCK):
            raise SemkvError(
                f"a {cache} cache has blocks of {BLOCK} elements",
                where=f"{OPTION} {path}",
                expected=f"heads of a multiple of {BLOCK} elements",
                got=facts.key_size,
                fix="measure other types: --llama-cpp-cache f16",
            )


def compiled_below(about: str, flags: Sequence[str]) -> str | None:
    """What to know where llama.cpp was compiled for less than the processor has; None where it was not.

    Args:
        about: what llama.cpp says of itself.
        flags: the processor's, of `machine`.
    """
    if "avx512f" not in flags or "AVX512 = 1" in about:
        return None
    return (
        "llama.cpp was not compiled for this processor's AVX-512: one built here may be faster "
        f"(scripts/llama_server.sh, {PROGRAM_OPTION})"
    )


class _Facts(NamedTuple):
    """Of a GGUF's metadata: KV heads of all layers together, elements of a head's key and value, vocabulary."""

    kv_heads: int
    key_size: int
    value_size: int
    vocabulary: int

    @classmethod
    def read(cls, path: Path) -> _Facts:
        """Reads the file's metadata.

        Raises:
            SemkvError: when it is damaged.
        """
        from gguf import GGUFReader

        try:
            fields = GGUFReader(path).fields
            architecture = fields["general.architecture"].contents()
            tokens = len(fields["tokenizer.ggml.tokens"].data)

            def value(name: str, default: Any = None) -> Any:
                field = fields.get(f"{architecture}.{name}")
                return default if field is None else field.contents()

            heads = int(value("attention.head_count"))
            size = int(value("attention.key_length", int(value("embedding_length")) // heads))
            by_layer = value("attention.head_count_kv", heads)
            kv_heads = sum(by_layer) if isinstance(by_layer, list) else int(value("block_count")) * int(by_layer)
            return cls(kv_heads, size, int(value("attention.value_length", size)), tokens)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SemkvError(f"its metadata cannot be read: {error}", where=f"{OPTION} {path}") from None

    @property
    def slot_elements(self) -> int:
        """Elements of one position's keys and values over all layers."""
        return self.kv_heads * (self.key_size + self.value_size)


class LlamaCppEngine(Engine):
    """A server with a slot for each row, and flash attention.

    Args:
        path: the GGUF file.
        cache: one of `CACHE_TYPES`.
        context: tokens of a row.
        program: a llama-server to start; None: the package xllamacpp's.
    """

    def __init__(
        self, path: str, cache: str, batch: int, threads: int, context: int, program: str | None = None
    ) -> None:
        self._batch, self._context = batch, context + _SPARE
        asked = ServerOptions(path, cache, slots=batch, context=batch * self._context, threads=threads)
        self._server = PackagedServer(asked) if program is None else ProgramServer(Path(program), asked)
        self._slot_mib = batch * _Facts.read(Path(path)).slot_elements * _BYTES[cache] / (1 << 20)
        self._threads = ThreadPoolExecutor(batch)
        self.reset()

    def reset(self) -> None:
        self._ids: list[list[int]] = [[] for _ in range(self._batch)]
        self._next: list[list[int]] = [[] for _ in range(self._batch)]

    def prefill(self, rows: Rows) -> float:
        carried = [len(tokens) for tokens in self._next]
        for row, ids in enumerate(rows):
            self._ids[row] += [*self._next[row], *ids]
        started = time.perf_counter()
        timings = self._complete(1, keep=any(carried))
        wall = time.perf_counter() - started
        for row, timing in enumerate(timings):
            self._expect(row, timing, len(rows[row]) + carried[row])
        # The clock of a row starts when the server turns to it, which with several is not when it was asked.
        return wall if self._batch > 1 else float(timings[0]["prompt_ms"]) / 1e3

    def decode(self, count: int) -> float:
        for row in range(self._batch):
            self._ids[row] += self._next[row]
        # The first step is the chosen token as a prompt of one; the server times the others.
        timings = self._complete(count)
        steps = []
        for row, timing in enumerate(timings):
            self._expect(row, timing, 1)
            self._ids[row] += self._new[row][:-1]
            steps.append(timing["predicted_ms"] / (timing["predicted_n"] - 1))
        return sum(steps) / len(steps)

    def _expect(self, row: int, timing: dict[str, Any], fresh: int) -> None:
        """Fails when the server read again what its slot should have had: it would be timed as something else."""
        if timing["prompt_n"] != fresh:
            raise SemkvError(
                "llama.cpp did not find a row's conversation in its cache",
                where=f"{OPTION}, row {row}",
                expected=f"{fresh} tokens to read",
                got=timing["prompt_n"],
            )

    def _complete(self, count: int, *, keep: bool = True) -> list[dict[str, Any]]:
        """Lets every row's conversation go on by `count` tokens; returns the rows' timings.

        Args:
            keep: what the slots have of it; else they read all of it.
        """

        def row(number: int) -> dict[str, Any]:
            return self._post(
                "/completion",
                prompt=self._ids[number], n_predict=count, id_slot=number, cache_prompt=keep, ignore_eos=True,
                return_tokens=True, samplers=["top_k"], top_k=1,
            )  # fmt: skip

        answers = list(self._threads.map(row, range(self._batch)))
        self._new = [answer["tokens"] for answer in answers]
        self._next = [tokens[-1:] for tokens in self._new]
        return [answer["timings"] for answer in answers]

    def _post(self, path: str, **data: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.address + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            raise SemkvError(f"llama.cpp refuses: {error.read().decode(errors='replace')}", where=OPTION) from None

    @property
    def pid(self) -> int | None:
        return self._server.pid

    def facts(self) -> dict[str, Any]:
        live = len(self._ids[0])
        return {
            "live_slots": float(live),
            "cache_mib": self._context * self._slot_mib,
            "read_mib": live * self._slot_mib,
        }

    def about(self) -> dict[str, str]:
        return self._server.about()

    def close(self) -> None:
        self._threads.shutdown()
        self._server.close()
