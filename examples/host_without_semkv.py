"""A bundle driven without semkv-deploy: numpy, ONNX Runtime and `bundle.json`.

    python examples/host_without_semkv.py bundle/ --ids 5,6,7 --max-new-tokens 20

`contract_host.py` beside this file is the host: it reads a budget's contract and follows its rules, as one in C++
would. This file is a greedy loop on top of it. It prints token ids, because a tokenizer is the host's own choice. The
graphs of either target are run by ONNX Runtime, with float32 caches (for TensorRT: built with `--dtype float32`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from contract_host import Host


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue token ids, greedily.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--ids", required=True, help="token ids of the prompt, comma-separated")
    parser.add_argument("--target", default="onnxruntime-cpu")
    parser.add_argument("--budget", type=int, default=0, help="number of the budget in bundle.json")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--library", type=Path, help="libsemkv_onnxruntime.so, for a bundle with native operators")
    args = parser.parse_args()

    host = Host(args.bundle, args.target, budget=args.budget, library=args.library)
    logits = host.prompt(0, [int(token) for token in args.ids.split(",")])
    reply: list[int] = []
    while len(reply) < args.max_new_tokens:
        token = int(logits.argmax())
        if token in host.contract["stop_ids"]:
            break
        reply.append(token)
        logits = host.step(np.array([token]), wanted=[True])[0]
    host.end_turn()
    print(",".join(map(str, reply)))
    print(f"[{host.position[0]} tokens seen, {host.length.max()} slots used, {host.compressions} compressions]")


if __name__ == "__main__":
    main()
