"""Runs one prompt or a chat on a bundle, and writes replies as they come."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import ChatTemplate
from semkv_deploy.runtime.chat import Chat, complete
from semkv_deploy.runtime.open import open_bundle, open_session
from semkv_deploy.runtime.tokens import check_ids, checked_text, decoded_text, load_tokenizer, not_utf8
from semkv_deploy.terminal import printable

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget
    from semkv_deploy.runtime.sampling import Sampler
    from semkv_deploy.runtime.session import Session

BLOCK = '"""'
"""Opens and closes a message of several lines."""

LONGEST_PROMPT = 1 << 24
"""Bytes read of a prompt from a file."""


def read_prompt(prompt: str | None, file: str | None) -> str | None:
    """The prompt of `--prompt` (`-`: standard input) or `--prompt-file`; None: neither was given.

    Raises:
        SemkvError: when both are given, or the text is missing, empty, very long or not UTF-8.
    """
    if prompt is not None and file is not None:
        raise SemkvError("two prompts", where="--prompt-file", expected="--prompt or --prompt-file", got="both")
    if file is None and prompt != "-":
        return None if prompt is None else checked_text(prompt, "--prompt")
    if file is None or file == "-":
        where, data = "standard input", sys.stdin.buffer.read(LONGEST_PROMPT + 1)
    else:
        where = f"--prompt-file {file}"
        if not Path(file).is_file():
            raise SemkvError("no such file", where=where)
        with Path(file).open("rb") as opened:
            data = opened.read(LONGEST_PROMPT + 1)
    if len(data) > LONGEST_PROMPT:
        raise SemkvError("too long", where=where, expected=f"at most {LONGEST_PROMPT} bytes")
    text = decoded_text(data, where)
    # The line end that editors and echo put at a file's end is not part of the question.
    text = text[:-1] if text.endswith("\n") else text
    if not text.strip():
        raise SemkvError("the prompt is empty", where=where)
    return text


def run(
    root: Path,
    *,
    prompt: str | None,
    raw: bool,
    system: str | None,
    budget: Budget | None,
    max_new_tokens: int,
    sampler: Sampler,
    stats: bool,
    target: str,
    allow_plugins: bool = False,
    threads: int | None = None,
    stop: Sequence[str] = (),
) -> None:
    """Writes the model's replies to standard output as they come.

    Args:
        prompt: None: chat until an empty line or the input's end.
        raw: complete `prompt` as it is.
        stop: texts that end the model's text.
        allow_plugins: run native code of plugins in the bundle's engines.
        threads: of ONNX Runtime; None: one for each CPU that the process may use.
    """
    if raw and system is not None:
        raise SemkvError("--raw completes text without a template, which --system needs", where="--system")
    prompt = None if prompt is None else checked_text(prompt, "--prompt")
    system = None if system is None else checked_text(system, "--system")
    stop = tuple(checked_text(text, "--stop") for text in stop)
    if "" in stop:
        raise SemkvError("an empty text would end every output", where="--stop", fix="give a text, or leave it out")
    bundle = open_bundle(root, target, allow_plugins=allow_plugins)
    template = None if raw else ChatTemplate.in_folder(bundle.root / "tokenizer")
    if template is not None:
        template.check_ends()
    tokenizer = load_tokenizer(bundle.root)
    session = open_session(bundle, budget=budget, target=target, threads=threads)
    stop_ids, vocab_size = bundle.manifest.model.eos_token_ids, bundle.manifest.model.vocab_size

    if prompt is not None and raw:
        with _interruptible() as cancelled:
            reply = complete(
                session,
                tokenizer,
                check_ids(tokenizer, tokenizer.encode(prompt), vocab_size),
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                stop=stop,
                sampler=sampler,
                stream=_write,
                cancelled=cancelled,
            )
        click.echo()
    else:
        chat = Chat(session, tokenizer, stop_ids, system, stop=stop, vocab_size=vocab_size)

        def say(text: str) -> bool:
            with _interruptible() as cancelled:
                reply = chat.say(
                    text, max_new_tokens=max_new_tokens, sampler=sampler, stream=_write, cancelled=cancelled
                )
            click.echo()
            if stats:
                click.echo(describe(session), err=True)
            return reply.cancelled

        if prompt is None:
            for text in _messages():
                say(text)
            return
        if say(prompt):
            raise KeyboardInterrupt
        return
    if stats:
        click.echo(describe(session), err=True)
    if reply.cancelled:
        raise KeyboardInterrupt


def _write(text: str) -> None:
    """Writes generated text; on a terminal without control characters, which would be obeyed."""
    click.echo(printable(text) if sys.stdout.isatty() else text, nl=False)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a question to ask between tokens; the second one interrupts as always."""
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _messages() -> Iterator[str]:
    """The user's messages until an empty line, Ctrl-C or the input's end.

    A line that ends with a backslash goes on in the next; lines between two of three quotes are one message.
    """
    while (line := _line("you> ")) is not None:
        if line.strip() == BLOCK or (line.startswith(BLOCK) and not line.rstrip().endswith(BLOCK)):
            text = _block(line.strip().removeprefix(BLOCK))
        elif line.startswith(BLOCK) and len(line.rstrip()) >= 2 * len(BLOCK):
            text = line.rstrip()[len(BLOCK) : -len(BLOCK)]
        else:
            text = line
            while text.endswith("\\") and (more := _line("...> ")) is not None:
                text = text[:-1] + "\n" + more
        if not text.strip():
            return
        yield text


def _block(first: str) -> str:
    lines = [first] if first else []
    while (line := _line("...> ")) is not None:
        if line.rstrip().endswith(BLOCK):
            last = line.rstrip()[: -len(BLOCK)]
            return "\n".join([*lines, last] if last else lines)
        lines.append(line)
    return "\n".join(lines)


def _line(prompt: str) -> str | None:
    """The next line of standard input without its end; None at the input's end, or on Ctrl-C at the prompt.

    Raises:
        SemkvError: when the line is not UTF-8 text.
    """
    try:
        if sys.stdin.isatty():
            return checked_text(input(prompt), "standard input")
        click.echo(prompt, nl=False)
        data = sys.stdin.buffer.readline()
        if not data:
            click.echo()
            return None
        return decoded_text(data, "standard input").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise not_utf8("standard input", error.object[error.start], error.start) from None
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None


def describe(session: Session) -> str:
    """Describes in one line what the session holds, and what compression did to get there."""
    stats = session.stats
    seen, kept = int(session.position.max()), int(session.kept_slots.max())
    text = f"{seen} tokens seen, {kept} of {session.contract.capacity} slots live"
    if stats.runs:
        levels = ", ".join(f"level {level}: {count}" for level, count in sorted(stats.levels.items()) if level >= 0)
        text += f"; compressed {stats.runs} times in {stats.seconds:.2f} s ({levels}), {stats.evicted} slots evicted"
    return text
