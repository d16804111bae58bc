"""Chat templates: a stranger's programs, rendered in a child process with limits on time, memory and length."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semkv_deploy.errors import SemkvError

CPU_SECONDS = 1
"""Processor time of one rendering; a conversation takes milliseconds."""

WALL_SECONDS = 30
"""Until a rendering is given up on a machine that is busy with other things, or that has no limit on CPU time."""

MAX_CHARACTERS = 1 << 24
"""Of one rendering."""

MAX_TEMPLATE = 1 << 20
"""Characters of a template itself."""

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from semkv_deploy.model.template_worker import serve; serve()"
)

Message = dict[str, str]


class ChatTemplate:
    """Renders conversations with one template.

    Args:
        source: the template.
        special_tokens: names such as `bos_token`, as templates use them.
        where: how errors name the template.
    """

    def __init__(self, source: str, special_tokens: dict[str, Any], where: str = "chat template") -> None:
        if len(source) > MAX_TEMPLATE:
            raise SemkvError(
                "the chat template is too long",
                where=where,
                expected=f"at most {MAX_TEMPLATE} characters",
                got=len(source),
            )
        self._source, self._where = source, where
        self._special_tokens = {name: value for name, value in special_tokens.items() if isinstance(value, str)}
        self._process: subprocess.Popen[bytes] | None = None
        self._endless: SemkvError | None = None
        """Set when a rendering was broken off: the template is not tried again."""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate | None:
        """The tokenizer's template, or None when it has none."""
        source = getattr(tokenizer, "chat_template", None)
        if isinstance(source, dict):
            source = source.get("default") or next(iter(source.values()), None)
        if not source:
            return None
        if not isinstance(source, str):
            raise SemkvError("not text", where="chat template", got=type(source).__name__)
        return cls(source, tokenizer.special_tokens_map)

    @classmethod
    def in_folder(cls, folder: Path) -> ChatTemplate | None:
        """The template of a saved tokenizer, read without loading the tokenizer; None when there is none to be seen."""
        source: object = None
        special: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            read = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            source = read.get("chat_template")
            special = read
        with contextlib.suppress(OSError, ValueError):
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(source, special) if isinstance(source, str) and source else None

    def check_ends(self) -> None:
        """Renders one message, so that a template without end is refused before anything large is loaded.

        Raises:
            SemkvError: when the rendering does not come to an end; other failures are left to the conversation.
        """
        try:
            self.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        except SemkvError:
            if self._endless is not None:
                raise
        finally:
            self.close()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as text.

        Raises:
            SemkvError: when the template refuses it, has a mistake, or exceeds a limit.
        """
        values = {
            **self._special_tokens,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        request = {"template": self._source, "values": values, "most": MAX_CHARACTERS, "seconds": CPU_SECONDS}
        reply = self._ask(json.dumps(request).encode() + b"\n")
        if "text" in reply:
            return reply["text"]
        if "refused" in reply:
            raise SemkvError("the chat template refuses the conversation", where=self._where, got=reply["refused"])
        raise SemkvError("the chat template fails", where=self._where, got=reply["error"])

    def close(self) -> None:
        """Ends the child process; the next rendering starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _ask(self, request: bytes) -> dict[str, str]:
        if self._endless is not None:
            raise self._endless
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        stdin, stdout = process.stdin, process.stdout

        def exchange() -> None:
            line = b""
            with contextlib.suppress(OSError, ValueError):
                stdin.write(request)
                stdin.flush()
                line = stdout.readline()
            answers.put(line)

        threading.Thread(target=exchange, daemon=True).start()
        try:
            line = answers.get(timeout=WALL_SECONDS)
        except queue.Empty:
            line = b""
        except BaseException:
            self.close()
            raise
        try:
            reply = json.loads(line)
        except ValueError:
            self.close()
            self._endless = SemkvError(
                "the chat template does not come to an end",
                where=self._where,
                expected=f"a conversation as text within {CPU_SECONDS} s of processor time and 1 GiB of memory",
                fix="correct the template, or complete text with --raw",
            )
            raise self._endless from None
        assert isinstance(reply, dict)
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                # The parent's own import path and nothing else; a session of its own, so that Ctrl-C is the parent's.
                [sys.executable, "-I", "-B", "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process
