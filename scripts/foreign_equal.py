"""Other exporters' graphs of a model beside the bundles that `build` makes of them: the same replies? how fast?

python scripts/foreign_equal.py SmolLM2-135M-Instruct.Q4_1.gguf work/ --json equal.json

For each exporter: the graph is written, built at budget 1 with float32 weights, and both hold one conversation in
ONNX Runtime, choosing greedily. Then both decode at `--context` slots, in turn, so that a machine's moods touch both
alike. The original's caches are what they are at home: one buffer in place for genai's graph, Concat for torch's.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import onnxruntime
from foreign_graphs import by_genai, by_optimum, by_torch
from numpy.typing import NDArray

from semkv_deploy import Session, open_bundle, open_session
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.export.checkpoint import load_checkpoint
from semkv_deploy.export.foreign.interface import find_interface
from semkv_deploy.methods import METHODS

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Name three things that one can do there on a rainy day.",
    "Write two sentences about the second of them.",
)
TORCH = {"torch": ("eager", 20), "torch-attention": ("sdpa", 23), "torch-script": ("eager", 14)}
"""Exporters of torch: how transformers attends, and the opset; below 18 by TorchScript."""

GENAI = {"genai": ("fp32", "cpu"), "genai-fp16": ("fp16", "cuda")}
"""Precision and provider of onnxruntime-genai's builder. What it (0.18) writes in float16 for its own CPU states wrong
sizes, and runs prompts alone there."""

EXPORTERS = ("genai", *TORCH)

OPTIMUM = "optimum"
PIECE = 512


class Original:
    """A stranger's graph in ONNX Runtime, one row.

    Args:
        slots: of shared buffers, which `GroupQueryAttention` appends to in place; None: caches that grow.
    """

    def __init__(self, path: Path, slots: int | None, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        roles = find_interface(ir.load(path), path.name)
        self.logits, self.position = str(roles.logits.name), 0
        self.pairs = [
            (str(past.name), str(present.name))
            for layer in roles.layers
            for past, present in zip(layer.past, layer.present, strict=True)
        ]
        shapes = {each.name: each.shape for each in self.session.get_inputs()}
        self.wanted, self.shared = set(shapes), slots is not None
        heads, size = roles.layers[0].kv_heads, shapes[self.pairs[0][0]][3]
        if not isinstance(size, int):
            size = json.loads((path.parent / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
        types = {each.name: each.type for each in self.session.get_inputs()}
        dtype = np.float16 if types[self.pairs[0][0]] == "tensor(float16)" else np.float32
        empty = np.zeros((1, heads, slots or 0, size), dtype)
        self.caches = {past: onnxruntime.OrtValue.ortvalue_from_numpy(empty.copy()) for past, _ in self.pairs}

    def run(self, tokens: list[int]) -> NDArray[Any]:
        """Logits `[V]` after the last token."""
        end = self.position + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.position, end)[None],
        }
        binding = self.session.io_binding()
        for name in self.wanted & set(feeds):
            binding.bind_cpu_input(name, feeds[name])
        binding.bind_output(self.logits)
        for past, present in self.pairs:
            binding.bind_ortvalue_input(past, self.caches[past])
            if self.shared:
                binding.bind_ortvalue_output(present, self.caches[past])
            else:
                binding.bind_output(present)
        self.session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        if not self.shared:
            self.caches = {past: value for (past, _), value in zip(self.pairs, presents, strict=True)}
        self.position = end
        result: NDArray[Any] = logits.numpy()[0, -1].astype(np.float32)
        return result

    def prompt(self, tokens: list[int]) -> NDArray[Any]:
        """The same, in pieces: a mask of all rows by all slots at once takes gigabytes."""
        for start in range(0, len(tokens), PIECE):
            logits = self.run(tokens[start : start + PIECE])
        return logits


def written(exporter: str, checkpoint: Any, folder: Path, optimum: str) -> Path:
    """The exporter's graph, its folder complete.

    Args:
        optimum: the Python that has it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if exporter in GENAI:
        return by_genai(checkpoint.model, checkpoint.tokenizer, folder, *GENAI[exporter])
    if exporter == OPTIMUM:
        return by_optimum(checkpoint.model, checkpoint.tokenizer, folder, optimum)
    attends, opset = TORCH[exporter]
    checkpoint.model.set_attn_implementation(attends)
    return by_torch(checkpoint.model, checkpoint.tokenizer, folder, opset, script=opset < 18)


def replies(original: Original, session: Session, turns: list[list[int]], count: int) -> dict[str, Any]:
    """Greedy tokens of both, each on its own replies, and the largest difference of logits while they agree.

    Reported beside them: how many of the tokens are equal before the first that is not, and the nearest choice until
    then (`margin`): one nearer than the difference falls as rounding falls.
    """
    same, worst, margin, agreed, lists = True, 0.0, np.inf, 0, []
    for turn in turns:
        theirs, ours = original.prompt(turn), session.prefill(turn)[0]
        said: tuple[list[int], list[int]] = ([], [])
        for _ in range(count):
            if same:
                worst = max(worst, float(np.abs(theirs - ours).max() / np.abs(theirs).max()))
                second, first = np.sort(theirs)[-2:]
                margin = min(margin, float((first - second) / np.abs(theirs).max()))
            said[0].append(int(theirs.argmax()))
            said[1].append(int(ours.argmax()))
            same = same and said[0] == said[1]
            agreed += same
            theirs, ours = original.run(said[0][-1:]), session.step(said[1][-1:])[0]
        lists.append(said)
    return {
        "equal": [first == second for first, second in lists],
        "tokens": count * len(turns),
        "agreed": agreed,
        "position": original.position,
        "difference": worst,
        "margin": margin,
        "reply": lists[0][0],
    }


def steps(original: Original, session: Session, tokens: list[int], count: int) -> dict[str, Any]:
    """Milliseconds of decode steps of both after a prompt of so many tokens, one after the other."""
    original.prompt(tokens)
    session.prefill(tokens)
    times: dict[str, list[float]] = {"original": [], "bundle": []}
    runs = {"original": lambda: original.run(tokens[:1]), "bundle": lambda: session.step(tokens[:1])}
    for number in range(count + 2):
        for name, run in runs.items():
            time.sleep(0.02)  # until the threads of the one before have stopped spinning
            start = time.perf_counter()
            run()
            if number > 1:
                times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: float(np.median(each)) for name, each in times.items()}
    quartiles = {f"{name}_quartile": float(np.quantile(each, 0.25)) for name, each in times.items()}
    return {"slots": len(tokens), **medians, **quartiles, "ratio": medians["original"] / medians["bundle"]}


@click.command()
@click.argument("source")
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--exporter", "exporters", multiple=True, type=click.Choice([*GENAI, *TORCH, OPTIMUM]), default=EXPORTERS)
@click.option("--optimum-python", help="Python that has optimum-onnx, which takes transformers below 5.")
@click.option("--reply", default=32, help="Tokens of each of three replies.")
@click.option("--context", default=8000, help="Slots at which a decode step is timed.")
@click.option("--steps", "count", default=16, help="Steps timed.")
@click.option("--threads", type=int, default=lambda: len(os.sched_getaffinity(0)), help="Of both.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="File to write.")
def main(
    source: str,
    work: Path,
    exporters: tuple[str, ...],
    reply: int,
    context: int,
    count: int,
    threads: int,
    path: Path | None,
    optimum_python: str | None,
) -> None:
    """Exits with 1 where a reply differs."""
    if OPTIMUM in exporters and not optimum_python:
        raise click.UsageError("--exporter optimum needs --optimum-python")
    found = {}
    for exporter in exporters:
        checkpoint = load_checkpoint(source)
        tokenizer = checkpoint.tokenizer
        graph = written(exporter, checkpoint, work / exporter, optimum_python or "")
        del checkpoint
        bundle = work / f"{exporter}-bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        options: dict[str, Any] = {"budgets": [1.0], "weights": "fp32", "native": "off"}
        build_bundle(str(graph), bundle, method=METHODS["full"](), **options)
        opened = open_bundle(bundle)
        slots = opened.manifest.max_context if exporter in GENAI else None
        turns = []
        for question in QUESTIONS:
            said = [{"role": "user", "content": question}]
            turns.append(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"])

        def pair(opened: Any = opened, graph: Path = graph, slots: int | None = slots) -> tuple[Original, Session]:
            return Original(graph, slots, threads), open_session(opened, budget=1.0, threads=threads)

        result = replies(*pair(), turns, reply)
        random = np.random.default_rng(0).integers(2, opened.manifest.model.vocab_size, context).tolist()
        found[exporter] = {**result, "decode": steps(*pair(), random, count)}
        said_ = found[exporter]
        click.echo(
            f"{exporter}: replies equal {said_['equal']} (the first {said_['agreed']} of {said_['tokens']} tokens), "
            f"logits apart {said_['difference']:.1e}, nearest choice {said_['margin']:.1e} of the largest logit; "
            f"a step at {context} slots: original {said_['decode']['original']:.1f} ms, "
            f"bundle {said_['decode']['bundle']:.1f} ms ({said_['decode']['ratio']:.2f} x)"
        )
        if path:
            path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if not all(all(result["equal"]) for result in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
