"""Child process of test_inspect_lint.py: lints models with random damage, as many as its argument says.

Prints one JSON line `{"findings": count, "sentence": count}`. Anything but findings or a
SemkvError ends it with a traceback that names the seed; a hang or a crash ends it too.
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import Message

from semkv_deploy.cli.lint_report import LINTED, lint_file
from semkv_deploy.errors import SemkvError
from tests.lint.tensorrt_lint_cases import CASES
from tests.lint.tensorrt_own_cases import OWN_CASES

SECONDS = 20
"""A model that takes longer hangs."""

OPERATORS = ("Loop", "If", "Scan", "Attention", "TensorScatter", "Constant", "Identity", "Concat", "TRT_Attention")
NUMBERS = (-1, 0, 1, 7, 99, 2**31 - 1, 2**40)


def messages(root: Message) -> list[Message]:
    """A message and all in it."""
    found = [root]
    for field, value in root.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if isinstance(value, Message) else value:
                found += messages(inner)
    return found


def damage(model: onnx.ModelProto, choose: random.Random) -> None:
    """Clears, drops, repeats or replaces one field somewhere."""
    everything = messages(model)
    holder = choose.choice(everything)
    if not (fields := holder.ListFields()):
        return
    field, value = choose.choice(fields)
    how = choose.random()
    if how < 0.35:
        holder.ClearField(field.name)
    elif hasattr(value, "append"):
        at = choose.randrange(len(value))
        if how < 0.6 and field.type == field.TYPE_MESSAGE:
            value.append(value[at])
        elif how < 0.8:
            del value[at]
        else:
            replace(value, at, field, everything, choose)
    elif field.type != field.TYPE_MESSAGE:
        fresh: list[Any] = [value]
        replace(fresh, 0, field, everything, choose)
        try:
            setattr(holder, field.name, fresh[0])
        except (ValueError, TypeError):
            holder.ClearField(field.name)


def replace(values: Any, at: int, field: Any, everything: list[Message], choose: random.Random) -> None:
    """Another value of the field's type, where there is one that the format can hold."""
    if field.type == field.TYPE_STRING:
        names = [
            name for node in everything if isinstance(node, onnx.NodeProto) for name in (*node.input, *node.output)
        ]
        values[at] = choose.choice([*names, *OPERATORS, "", "semkv"])
    elif field.type == field.TYPE_BYTES:
        values[at] = choose.choice([b"", b"\xff\xfe", b"linear"])
    elif field.type != field.TYPE_MESSAGE:
        try:
            values[at] = choose.choice(NUMBERS)
        except (ValueError, TypeError):
            del values[at]


def main() -> None:
    originals = [case.model() for case in (*CASES, *OWN_CASES)]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for seed in range(int(sys.argv[1])):
            choose = random.Random(seed)
            model = onnx.ModelProto()
            model.CopyFrom(choose.choice(originals))
            for _ in range(choose.choice((1, 1, 2, 4))):
                damage(model, choose)
            path.write_bytes(model.SerializeToString())
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                lint_file(path, choose.choice(LINTED))
                counts["findings"] += 1
            except SemkvError:
                counts["sentence"] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}") from error
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
