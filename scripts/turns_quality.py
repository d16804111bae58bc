"""What isolating turns is worth: `turns_quality.py MODEL --method semanticache --method importance:fit=none`.

Held-out dialogues are read turn by turn, in sessions of bundles with float32 weights. Each method compresses at every
turn's end, once with turns=together and once with turns=isolated, so that both keep the budget of what was seen. Each
token of a later turn is predicted with what is kept of the earlier ones: KL to the full cache, nats per token, mean
over the tokens of the turns from the third on (to the second both bring the same), then over dialogues. For each method
and budget: the slots that were kept in the end as a share of the tokens, both KLs, and their paired difference with its
95 % bootstrap interval over dialogues; less than 0: isolating is better. Where later turns say again what only earlier
ones say (`recall`), the share of these words that the model would have said as well.

Dialogues are those of `semkv-deploy train` (`python scripts/fetch.py smollm2 austen mt-bench`): prose cut into turns,
chats, and facts in prose of which later turns say something again; or a file of yours, `--source NAME=FILE`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from semkv_deploy import build_bundle, export_model, load_tokenizer, open_session
from semkv_deploy.evaluate.entries import Entry, parse_entry
from semkv_deploy.evaluate.metrics import estimate, log_softmax, paired
from semkv_deploy.methods import Full, Method
from semkv_deploy.runtime.session import Session
from semkv_deploy.train.data import Dialogues
from semkv_deploy.train.recipe import Data, Source

Turns = list[list[int]]
Answer = tuple[int, int, int]
"""A turn, and the first and last but one of its tokens that only an earlier turn tells."""

FIRST = 2
"""The first turn, from 0, whose tokens count."""


def value(text: str) -> Any:
    """An option's value: JSON where it is some, else a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def dialogues(
    folder: Path, sources: list[str], count: int, tokens: int, turns: int, seed: int
) -> list[tuple[Turns, list[Answer]]]:
    """Held-out dialogues of at least four turns, from the sources by turns; what is pinned is of the first turn."""
    named = [source.partition("=") for source in sources]
    data = Data(
        sources=tuple(Source(name=name, path=path or None) for name, _, path in named),
        tokens=tokens,
        turns=(4, turns),
        turn=(max(tokens // turns // 2, 4), max(2 * tokens // turns, 8)),
    )
    made, found, number = Dialogues(data, load_tokenizer(folder), seed=seed), [], 0
    while len(found) < count:
        drawn = made.dialogue("held-out", number, named[len(found) % len(named)][0])
        first, *rest = drawn.turns
        if len(rest) > FIRST:
            said = [[*drawn.pinned, *first], *map(list, rest)]
            found.append((said, [answer for answer in drawn.answers if answer[0] >= FIRST]))
        number += 1
        if number > 50 * count:
            raise SystemExit(f"too few dialogues of four turns in {' '.join(sources)}: raise --tokens")
    return found


def read(session: Session, turns: Turns) -> tuple[list[Any], float]:
    """Logits `[n,V]` of each turn that counts, and the share of slots that are kept of all turns before the last."""
    session.reset()
    logits = []
    for number, turn in enumerate(turns):
        if number == len(turns) - 1:
            kept = float(session.length[:, 0].mean() / session.position[0])
        found = session.prefill(turn, all_logits=True)
        logits += [found] if number >= FIRST else []
        session.end_turn()
    return logits, kept


def recalled(logits: list[Any], turns: Turns, answers: list[Answer]) -> list[bool]:
    """Of each answer, whether all of its tokens are the likeliest, given those before."""
    found = []
    for turn, start, end in answers:
        likeliest = logits[turn - FIRST][start - 1 : end - 1].argmax(-1)
        found.append(likeliest.tolist() == turns[turn][start:end])
    return found


def divergence(full: list[Any], ours: list[Any]) -> float:
    """Mean KL over the tokens of all turns, nats."""
    found = []
    for expected, got in ((p, q) for of, by in zip(full, ours, strict=True) for p, q in zip(of, by, strict=True)):
        log_p, log_q = log_softmax(expected), log_softmax(got)
        found.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
    return float(np.mean(found))


def compared(decoder: Path, entry: Entry, read_all: list[Any], full: list[Any], args: Any) -> dict[str, Any]:
    """By budget and form, of each dialogue: KL, kept share, and which answers are recalled."""
    found: dict[str, dict[str, Any]] = {f"{budget:g}": {} for budget in args.budget}
    for turns in ("together", "isolated"):
        method = entry.method().model_copy(update={"turns": turns, "compress_at": "turn"})
        with tempfile.TemporaryDirectory() as folder:
            options = entry.build_options
            built = build(decoder, Path(folder) / "bundle", method, args.budget, args.context, options)
            for budget in args.budget:
                session = open_session(built, budget=budget, threads=args.threads)
                rows = []
                for (dialogue, answers), expected in zip(read_all, full, strict=True):
                    logits, kept = read(session, dialogue)
                    rows.append((divergence(expected, logits), kept, recalled(logits, dialogue, answers)))
                found[f"{budget:g}"][turns] = rows
    return found


def build(decoder: Path, out: Path, method: Method, budgets: list[float], context: int, options: dict[str, Any]) -> Any:
    common: dict[str, Any] = {"weights": "fp32", "native": "off", "portable": False, "max_context": context}
    return build_bundle(decoder, out, budgets=budgets, method=method, **{**common, **options})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", action="append", required=True, help="NAME:OPTION=VALUE,… as evaluate takes it")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--source", nargs="+", default=["austen", "mt-bench", "recall"], help="NAME or NAME=FILE")
    parser.add_argument("--dialogues", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=900, help="of a dialogue at most")
    parser.add_argument("--turns", type=int, default=9, help="of a dialogue at most")
    parser.add_argument("--context", type=int, default=2048, help="that bundles are built for")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    entries = [parse_entry(text, value) for text in args.method]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        decoder = Path(args.model)
        if decoder.name != "decoder.onnx":
            export_model(args.model, root / "export", Full())
            decoder = root / "export" / "decoder.onnx"
        said = dialogues(decoder.parent, args.source, args.dialogues, args.tokens, args.turns, args.seed)
        whole = open_session(build(decoder, root / "full", Full(), [1.0], args.context, {}), threads=args.threads)
        full = [read(whole, dialogue)[0] for dialogue, _ in said]
        del whole
        table = {entry.text: compared(decoder, entry, said, full, args) for entry in entries}
    if args.json:
        print(json.dumps(table))
        return
    turns = np.mean([len(dialogue) for dialogue, _ in said])
    tokens = np.mean([sum(map(len, dialogue)) for dialogue, _ in said])
    known = [recalled(logits, *each) for logits, each in zip(full, said, strict=True)]
    print(f"{len(said)} dialogues of {turns:.1f} turns and {tokens:.0f} tokens in the mean, seed {args.seed};")
    print(f"with the full cache {sum(map(sum, known))} of {sum(map(len, known))} answers are recalled\n")
    print("| method | budget | kept, both forms | KL, together | KL, isolated | isolated - together | recalled |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, of in table.items():
        for budget, forms in of.items():
            (together, *first), (isolated, *second) = (zip(*forms[form], strict=True) for form in forms)
            difference = paired(isolated, together)
            (slots, right), (slots_isolated, right_isolated) = first, second
            print(
                f"| {name} | {budget} | {np.mean(slots):.3f}, {np.mean(slots_isolated):.3f} | "
                f"{estimate(together).mean:.4f} | {estimate(isolated).mean:.4f} | "
                f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}] | "
                f"{sum(map(sum, right))}, {sum(map(sum, right_isolated))} |"
            )


if __name__ == "__main__":
    main()
