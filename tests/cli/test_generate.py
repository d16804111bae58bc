"""`generate` as a user meets it: prompts from everywhere, in any encoding, stops, interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.cli import chat as chat_module
from semkv_deploy.cli.chat import read_prompt
from semkv_deploy.errors import SemkvError

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def generate(*arguments: Any, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "semkv_deploy.cli", "generate", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, env=ENVIRONMENT, check=False)


class Input:
    """Standard input that is no terminal."""

    def __init__(self, data: bytes) -> None:
        import io

        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        (b"one\ntwo\n\nthree\n", ["one", "two"]),
        (b"one\r\ntwo", ["one", "two"]),
        (b"a \\\nb\\\nc\nnext\n", ["a \nb\nc", "next"]),
        (b'"""\nfirst\n\n  second\n"""\nnext\n', ["first\n\n  second", "next"]),
        (b'"""first\nsecond"""\nnext\n', ["first\nsecond", "next"]),
        (b'"""all of it"""\n', ["all of it"]),
        (b'"""\nno end\n', ["no end"]),
        (b"", []),
        (b"\xef\xbb\xbfwith a mark\n", ["with a mark"]),
    ],
)
def test_messages_of_one_and_several_lines(data: bytes, messages: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", Input(data))
    assert list(chat_module._messages()) == messages


def test_a_message_in_another_encoding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", Input("fine\ncafé\n".encode("latin-1")))
    messages = chat_module._messages()
    assert next(messages) == "fine"
    with pytest.raises(SemkvError, match=r"standard input: not UTF-8 text .*byte 0xe9 at offset 3"):
        next(messages)


def test_prompts_from_files_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "prompt.txt").write_text("two\nlines\n")
    assert read_prompt(None, str(tmp_path / "prompt.txt")) == "two\nlines"
    for prompt, file in (("-", None), (None, "-")):
        monkeypatch.setattr(sys, "stdin", Input(b"piped\n"))
        assert read_prompt(prompt, file) == "piped"
    assert read_prompt("text", None) == "text" and read_prompt(None, None) is None


@pytest.mark.parametrize(
    ("prompt", "content", "words"),
    [
        ("x", b"y", "two prompts"),
        (None, None, "no such file"),
        (None, b" \n", "the prompt is empty"),
        (None, b"caf\xe9", "not UTF-8 text .*byte 0xe9 at offset 3"),
    ],
)
def test_prompts_that_are_refused(prompt: str | None, content: bytes | None, words: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "prompt.txt").write_bytes(content)
    with pytest.raises(SemkvError, match=words):
        read_prompt(prompt, str(tmp_path / "prompt.txt"))


def test_bytes_that_are_not_utf8_are_one_sentence(tiny_bundle: Path):
    for arguments, stdin in ((["--prompt", b"\xff\xfe caf\xe9"], b""), (["--prompt", "x", "--system", b"\xff"], b"")):
        done = generate(str(tiny_bundle), *arguments, stdin=stdin)
        assert done.returncode == 1 and done.stderr.startswith(b"error: --") and b"not UTF-8" in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_raw_takes_no_system_message(tiny_bundle: Path):
    done = generate(tiny_bundle, "--raw", "--prompt", "x", "--system", "y")
    assert done.returncode == 1 and done.stderr.startswith(b"error: --system: --raw completes text without a template")


def test_an_empty_stop_text_is_refused(tiny_bundle: Path):
    done = generate(tiny_bundle, "--prompt", "x", "--stop", "")
    assert done.returncode == 1 and b"--stop: an empty text would end every output" in done.stderr


def test_an_interrupt_ends_the_reply_and_not_the_chat(tiny_bundle: Path):
    """The first reply is broken off; the next message is answered; nothing is said of what was written."""
    command = [sys.executable, "-u", "-m", "semkv_deploy.cli", "generate", str(tiny_bundle), "--budget", "0.25"]
    chat = subprocess.Popen(
        [*command, "--max-new-tokens", "380"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert chat.stdin and chat.stdout and chat.stderr
    try:
        chat.stdin.write(b"Hello\n")
        chat.stdin.flush()
        os.read(chat.stdout.fileno(), 5)
        os.read(chat.stdout.fileno(), 1)
        chat.send_signal(signal.SIGINT)
        time.sleep(0.2)
        rest, errors = chat.communicate(b"More\n\n", timeout=60)
    finally:
        chat.kill()
    assert chat.returncode == 0, errors
    assert rest.count(b"you>") == 2 and b"written" not in errors
