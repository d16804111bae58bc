"""Texts for `chat.cpp`: makes ids of a conversation's messages, and texts of the ids that come back.

    python examples/cpp/talk.py chat/chat bundle/ "Why is the sky blue?" "And at night?"

The chat template and the tokenizer are Python's, the conversation is the program's.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from semkv_deploy import load_tokenizer
from semkv_deploy.runtime.conversation import ChatFormat, Conversation
from semkv_deploy.runtime.reply import Reply


def main() -> None:
    parser = argparse.ArgumentParser(description="Say texts to a chat in token ids.")
    parser.add_argument("program", type=Path, help="chat, as examples/cpp/CMakeLists.txt builds it")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", nargs="+", help="the user's messages, one a turn")
    parser.add_argument("--max-new-tokens", default="64")
    parser.add_argument("--budget", default="0", help="one that was built; default: the smallest")
    parser.add_argument("--library", help="libsemkv_onnxruntime.so, for a bundle with native operators")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.bundle)
    conversation = Conversation(ChatFormat(tokenizer, ()))
    command = [str(args.program.resolve()), str(args.bundle), args.max_new_tokens, args.budget]
    command += [args.library] if args.library else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as chat:
        assert chat.stdin is not None and chat.stdout is not None
        for text in args.texts:
            asked = [{"role": "user", "content": text}]
            print(*conversation.tokens(asked), file=chat.stdin, flush=True)
            ids = [int(word) for word in chat.stdout.readline().split()]
            reply = tokenizer.decode(ids, skip_special_tokens=True)
            conversation.record(asked, Reply(reply, reply))
            print(f"> {text}\n{reply}")
    if chat.returncode:
        raise SystemExit(chat.returncode)


if __name__ == "__main__":
    main()
