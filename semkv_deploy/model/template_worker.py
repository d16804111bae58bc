"""Renders chat templates in a process of its own: started by `model.template`, fed lines of JSON, ended by a limit.

The environment is transformers' (`apply_chat_template`): the sandbox, its extensions, filters and globals; a test
compares the two. Only jinja2 is imported, so that the process is there in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from datetime import datetime
from typing import Any

MAX_BYTES = 1 << 30
"""Address space of the process."""


class Refused(Exception):
    """The template itself refused the conversation (`raise_exception`)."""


def environment(now: datetime) -> Any:
    """transformers' jinja environment, with a clock that stands still."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: marks what an assistant wrote; rendered as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_plain"), [], [], body).set_lineno(line)

        def _plain(self, caller: Any) -> Any:
            return caller()

    def refuse(message: str) -> None:
        raise Refused(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Dictionary:
        """`dict`, without the attributes of the type."""

        def __call__(self, *arguments: Any, **values: Any) -> Any:
            return dict(*arguments, **values)

        def fromkeys(self, *arguments: Any) -> Any:
            return dict.fromkeys(*arguments)

    class Namespace(jinja2.utils.Namespace):
        """`namespace`, without names that begin with an underscore."""

        def __init__(*arguments: Any, **values: Any) -> None:
            own, given = arguments[0], dict(*arguments[1:], **values)
            for name in given:
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(own, given)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = now.strftime
    made.globals["dict"] = Dictionary()
    made.globals["namespace"] = Namespace
    return made


@functools.cache
def _compiled(source: str) -> Any:
    return environment(datetime.now()).from_string(source)


def render(source: str, values: dict[str, Any], most: int) -> str:
    """The template's text; at most `most` characters.

    Raises:
        ValueError: when there are more.
    """
    pieces, size = [], 0
    for piece in _compiled(source).generate(**values):
        size += len(piece)
        if size > most:
            raise ValueError(f"it writes more than {most} characters")
        pieces.append(piece)
    return "".join(pieces)


def _limit(seconds: int) -> None:
    """Ends this process after so many more seconds of processor time."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system; the parent has a clock too
        import resource
        import time

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


def answer(request: dict[str, Any]) -> dict[str, str]:
    """The reply to one request: `text`, or `refused` or `error` with a reason."""
    try:
        return {"text": render(request["template"], request["values"], request["most"])}
    except Refused as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"error": "it needs more memory than it is given"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:  # a template can raise anything
        line = getattr(error, "lineno", None)
        return {"error": f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")}


def serve() -> None:
    """Answers requests from standard input, a line of JSON each, until it ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit(request["seconds"])
        sys.stdout.buffer.write(json.dumps(answer(request)).encode() + b"\n")
        sys.stdout.buffer.flush()
