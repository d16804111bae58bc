"""A document is read once; every question starts where the reading ended.

    python examples/save_and_load_a_session.py bundle/ text.txt --state read.safetensors --question "Who is in it?"

The first run prefills the document and saves the session: the compressed cache, positions and counters, in one file.
Runs after it load the file, so that only the question is prefilled. A file of another bundle or budget, or a damaged
one, is refused. With `--whole` the document is read in a cache that holds all of it, and compressed once: that takes
the full cache's memory while it is read, on ONNX Runtime, and forgets less.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from semkv_deploy import SemkvError, load_tokenizer, open_bundle, open_session


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask questions about a document that is read once.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("document", type=Path)
    parser.add_argument("--state", type=Path, required=True, help="file of the saved session")
    parser.add_argument("--question", required=True)
    parser.add_argument("--budget", help="one that was built; default: the smallest")
    parser.add_argument("--whole", action="store_true", help="read in a cache that holds the whole document")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    bundle, tokenizer = open_bundle(args.bundle), load_tokenizer(args.bundle)
    if not args.state.exists():
        reader = open_session(bundle, budget=args.budget, capacity=bundle.manifest.max_context if args.whole else None)
        reader.prefill(tokenizer.encode(args.document.read_text(encoding="utf-8")))
        reader.end_turn()
        if args.whole:
            reader.compress()
        reader.save(args.state)
        print(f"[read {reader.position[0]} tokens, saved {args.state.stat().st_size} bytes]")

    session = open_session(bundle, budget=args.budget, state=args.state)
    question = tokenizer.encode(f"\n{args.question}\n", add_special_tokens=False)
    (reply,) = session.generate(question, max_new_tokens=args.max_new_tokens, stop_ids=session.contract.stop_ids)
    print(tokenizer.decode(reply))


if __name__ == "__main__":
    try:
        main()
    except SemkvError as error:
        sys.exit(f"error: {error}")
