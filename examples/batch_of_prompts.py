"""Several prompts at once, one to a batch row, each with its own cache.

    python examples/batch_of_prompts.py bundle/ prompts.txt --max-new-tokens 64

One line of the file is one prompt, completed as it is. Rows have lengths and ends of their own: a row that said its
stop token waits, and needs no room, while the others go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from semkv_deploy import SemkvError, load_tokenizer, open_bundle, open_session


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete several prompts in one batch.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompts", type=Path, help="text file, one prompt a line")
    parser.add_argument("--budget", help="one that was built; default: the smallest")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = load_tokenizer(args.bundle)
    session = open_session(open_bundle(args.bundle), budget=args.budget, batch=len(prompts))
    replies = session.generate(
        [tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=args.max_new_tokens,
        stop_ids=session.contract.stop_ids,
    )
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        print(f"{prompt}{tokenizer.decode(reply)}")
        print(f"[row {row}: {session.position[row]} tokens seen, {session.kept_slots[row]} slots used]")


if __name__ == "__main__":
    try:
        main()
    except SemkvError as error:
        sys.exit(f"error: {error}")
