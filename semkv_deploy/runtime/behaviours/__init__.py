"""Interpreters of the contract's behaviours, one file each; `interpreter` picks by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from semkv_deploy.runtime.behaviours.base import Interpreter
from semkv_deploy.runtime.behaviours.block_tables import BlockTabulator
from semkv_deploy.runtime.behaviours.blocks import BlockKeeper
from semkv_deploy.runtime.behaviours.isolated_turns import TurnIsolator
from semkv_deploy.runtime.behaviours.make_room import RoomMaker
from semkv_deploy.runtime.behaviours.nexus_turns import TurnKeeper
from semkv_deploy.runtime.behaviours.read_again import Rereader
from semkv_deploy.runtime.behaviours.slot_tables import SlotTabulator

if TYPE_CHECKING:
    from semkv_deploy.methods.behaviours import Behaviour
    from semkv_deploy.runtime.slots import Slots
    from semkv_deploy.targets.engine import Engine

_BY_KIND: dict[str, Callable[[Any, Engine, Slots], Interpreter]] = {
    "make_room": RoomMaker,
    "isolated_turns": TurnIsolator,
    "read_again": Rereader,
    "nexus_turns": TurnKeeper,
    "blocks": BlockKeeper,
    "block_tables": BlockTabulator,
    "slot_tables": SlotTabulator,
}


def interpreter(behaviour: Behaviour, engine: Engine, slots: Slots) -> Interpreter:
    """What carries out a behaviour on an engine's buffers and a session's slots."""
    return _BY_KIND[behaviour.kind](behaviour, engine, slots)
