"""One measurement in a process of its own: `python -m semkv_deploy.bench.worker '{"engine": …}'` prints JSON.

Separate processes, one after the other, keep thread pools and memory of one measurement out of the next.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from semkv_deploy.bench import memory
from semkv_deploy.sizes import row_bytes


def prompt_tokens(encode: Any, count: int) -> list[int]:
    """`count` token ids of real text: the calibration text, over and over."""
    from semkv_deploy.compiler.calibrate import calibration_text

    text = encode(calibration_text())
    return (list(text) * (count // len(text) + 1))[:count]


def measure_bundle(
    root: Path,
    target: str,
    budget: float,
    context: int,
    tokens: int,
    *,
    turns: int = 1,
    reserve: int = 0,
    allow_plugins: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Times `turns` turns of `context / turns - reserve` tokens, the last `tokens` of each decoded, the rest prefilled.

    Args:
        reserve: positions of each turn that nothing is appended at: some method may take them for rows of its own.
        threads: of ONNX Runtime; None: one for each CPU that the process may use.

    Returns:
        prefill_s, total_s (of all turns), compress_s, decode_ms (median), decode_ms_all, kept (mean live slots of a
        cache group), cache_mib (allocated), read_mib (cache read by one step), peak_mib (most memory beside the loaded
        weights; not on a GPU, whose memory is not the process's).
    """
    from semkv_deploy.runtime.open import open_bundle, open_session
    from semkv_deploy.runtime.tokens import load_tokenizer

    bundle = open_bundle(root, target, allow_plugins=allow_plugins)
    tokenizer = load_tokenizer(bundle.root)
    prompt = context // turns - reserve - tokens
    ids = prompt_tokens(lambda text: tokenizer.encode(text, add_special_tokens=False), turns * prompt)
    session = open_session(bundle, budget=budget, target=target, threads=threads)
    # Weights are loaded, and no page of the caches is resident before something is written to it.
    with memory.PeakMemory() as peak:
        session.step(session.prefill(ids[:8]).argmax(-1))
        session.reset()
        begun, prefill = time.perf_counter(), 0.0
        times = []
        for turn in range(turns):
            started = time.perf_counter()
            logits = session.prefill(ids[turn * prompt : (turn + 1) * prompt])
            prefill += time.perf_counter() - started
            for _ in range(tokens):
                started = time.perf_counter()
                logits = session.step(logits.argmax(-1))
                times.append((time.perf_counter() - started) * 1e3)
            if turn < turns - 1:
                session.end_turn()
        total = time.perf_counter() - begun
    contract, memory_is_ours = session.contract, not bundle.target(target).on_gpu
    heads = np.array([len(group.heads) for group in contract.cache.groups])
    read = float((heads * session.length.mean(1)).sum()) * 2 * row_bytes(contract.dtype, contract.head_dim)
    kept = float(session.length.mean())
    return {
        "prefill_s": prefill,
        "total_s": total,
        "compress_s": session.stats.seconds,
        "compressions": session.stats.runs,
        "levels": {str(level): count for level, count in sorted(session.stats.levels.items())},
        "evicted": session.stats.evicted,
        "decode_ms": statistics.median(times),
        "decode_ms_all": times,
        "kept": kept,
        "cache_mib": session.engine.cache_bytes() / (1 << 20),
        "read_mib": read / (1 << 20),
        **({"peak_mib": peak.mib} if memory_is_ours else {}),
    }


def measure_genai(root: Path, context: int, tokens: int) -> dict[str, Any]:
    """The same for an onnxruntime-genai model with its full cache, which it prefills in one piece.

    No memory: its calls hold the interpreter lock, so that nothing can be sampled while they run.
    """
    import onnxruntime_genai as og

    model = og.Model(str(root))
    tokenizer = og.Tokenizer(model)
    ids = np.array([prompt_tokens(tokenizer.encode, context - tokens)], np.int32)

    def generator(length: int) -> Any:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, do_sample=False)
        return og.Generator(model, parameters)

    warm = generator(16)
    warm.append_tokens(ids[:, :8])
    warm.generate_next_token()
    del warm
    running = generator(context)
    started = time.perf_counter()
    running.append_tokens(ids)
    prefill = time.perf_counter() - started
    times = []
    # The first call picks a token from the prefill's logits; each later one runs a decode step.
    for _ in range(tokens - 1):
        started = time.perf_counter()
        running.generate_next_token()
        times.append((time.perf_counter() - started) * 1e3)
    return {
        "prefill_s": prefill,
        "decode_ms": statistics.median(times[1:]),
        "decode_ms_all": times[1:],
        "kept": float(context),
    }


def main() -> None:
    request = json.loads(sys.argv[1])
    root, context, tokens = Path(request["path"]), request["context"], request["tokens"]
    if request["engine"] == "genai":
        result = measure_genai(root, context, tokens)
    else:
        result = measure_bundle(
            root,
            request["target"],
            request["budget"],
            context,
            tokens,
            turns=request["turns"],
            reserve=request["reserve"],
            allow_plugins=request["allow_plugins"],
            threads=request["threads"],
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
