"""A chat in the terminal, on a cache that never outgrows its budget.

    python examples/stream_a_chat.py bundle/ --budget 0.2

Text is shown as it becomes certain. After each reply a line says how many tokens were seen and how many slots hold
them. An empty line, or the end of the input, ends the chat.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from semkv_deploy import SemkvError, load_tokenizer, open_bundle, open_session
from semkv_deploy.runtime.chat import Chat


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--budget", help="one that was built; default: the smallest")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    args = parser.parse_args()

    session = open_session(open_bundle(args.bundle), budget=args.budget)
    chat = Chat(session, load_tokenizer(args.bundle), session.contract.stop_ids)
    while message := ask():
        chat.say(message, max_new_tokens=args.max_new_tokens, stream=lambda text: print(text, end="", flush=True))
        print(f"\n[{session.position[0]} tokens seen, {session.kept_slots[0]} slots used]")


def ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    try:
        main()
    except SemkvError as error:
        sys.exit(f"error: {error}")
