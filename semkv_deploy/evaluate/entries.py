"""What is compared, as users name it: `semanticache`, `semanticache:recent=0.75,sinks=8`, `kvpress/SnapKV`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from semkv_deploy.choices import CacheType
from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.texts import read_bytes
from semkv_deploy.methods import METHODS, method_from_options

if TYPE_CHECKING:
    from semkv_deploy.methods import Method

FULL, NO_CONTEXT = "full", "no context"
"""The ends of the scale: everything is kept; nothing was read."""

PEER = "kvpress/"
"""Before the name of a press of kvpress, without its `Press`."""

PEERS = ("StreamingLLM", "ObservedAttention", "SnapKV", "TOVA", "Knorm", "KeyDiff", "ExpectedAttention", "KVzip")
"""Presses that a table has where nothing else is asked for; any other can be named. ObservedAttention is H2O."""

_OURS_TO_SET = frozenset(
    (
        *(
            "source",
            "out",
            "budgets",
            "method",
            "max_context",
            "target",
            "weights",
            "tensorrt",
            "calibration",
        ),
        *("native", "family", "portable", "force", "progress"),
    )
)
"""Arguments of `build_bundle` that an evaluation decides; the others are options of an entry."""


CALIBRATION_TEXT = "calibration_text"
"""Option of our entries: the file that a bundle is calibrated on."""

HOLD = "hold"
"""Option of our entries: `hold=all` reads in a cache that holds everything, as presses do, and compresses then."""


@dataclass(frozen=True)
class Entry:
    """A method with its options, as a row of a table.

    Attributes:
        text: as the user wrote it.
        name: of a method of `METHODS`, or of a press of kvpress after `kvpress/`.
        options: parameters of the method or press, of `build_bundle`, and `HOLD`.
    """

    text: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_peer(self) -> bool:
        """Whether kvpress runs it."""
        return self.name.startswith(PEER)

    @property
    def is_end(self) -> bool:
        """Whether it is an end of the scale, which no budget changes."""
        return self.name in (FULL, NO_CONTEXT)

    def method(self) -> Method:
        """The method of an entry of ours.

        Raises:
            SemkvError: when it does not take an option.
        """
        others = {*self.build_options, HOLD}
        return method_from_options(self.name, {name: v for name, v in self.options.items() if name not in others})

    def check(self) -> None:
        """Fails where an option of an entry of ours is not taken.

        Raises:
            SemkvError: naming it.
        """
        self.method()
        if self.chooses and "attend" in self.options:
            raise SemkvError(
                "a step attends to what the budget allows",
                where=f"--method {self.text}",
                got="attend",
                fix="leave it out, and give --budget",
            )
        hold = self.options.get(HOLD, "budget")
        if hold not in ("budget", "all"):
            raise SemkvError("unknown value", where=f"--method {self.text}", expected=f"{HOLD}=budget or all", got=hold)
        if self.cache_dtype not in get_args(CacheType):
            expected = f"cache_dtype={', '.join(get_args(CacheType))}"
            raise SemkvError("unknown value", where=f"--method {self.text}", expected=expected, got=self.cache_dtype)
        if self.calibration_text is not None:
            read_bytes(self.calibration_text, f"--method {self.text}")

    @property
    def holds_all(self) -> bool:
        """Whether examples are read in a cache that holds all of them."""
        return bool(self.options.get(HOLD) == "all")

    @property
    def chooses(self) -> bool:
        """Whether everything stays, and a budget is the share that a step attends to."""
        method = None if self.is_peer else self.method()
        return method is not None and method.selects and not method.compresses

    @property
    def cache_dtype(self) -> str:
        """Element type of the caches; all but float32 take native operators."""
        return str(self.options.get("cache_dtype", "float32"))

    @property
    def calibration_text(self) -> Path | None:
        """The file that bundles are calibrated on; None: the text that ships with the package."""
        file = self.options.get(CALIBRATION_TEXT)
        return None if file is None else Path(str(file)).expanduser()

    @property
    def build_options(self) -> dict[str, Any]:
        """Options that are arguments of `build_bundle`, such as `groups`."""
        from semkv_deploy.compiler.pipeline import build_bundle

        allowed = set(inspect.signature(build_bundle).parameters) - _OURS_TO_SET
        return {name: value for name, value in self.options.items() if name in allowed}


def parse_entry(text: str, value: Callable[[str], Any]) -> Entry:
    """Reads `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE`.

    Args:
        value: reads an option's value.

    Raises:
        SemkvError: on an unknown name or option.
    """
    name, _, rest = text.partition(":")
    options = {}
    # Commas inside a value stay: only one before a name and an equals sign ends it.
    for option in re.split(r",(?=\w[\w-]*=)", rest) if rest else []:
        key, equals, written = option.partition("=")
        if not equals:
            raise SemkvError("not of the form NAME:OPTION=VALUE,…", where="--method", got=text)
        options[key.replace("-", "_")] = value(written)
    if not name.startswith(PEER) and name not in METHODS:
        expected = f"{', '.join(METHODS)}, or {PEER} and the name of a press, such as {PEER}{PEERS[2]}"
        raise SemkvError("unknown method", where="--method", expected=expected, got=name)
    entry = Entry(text, name, options)
    if not entry.is_peer:
        entry.check()
    return entry
