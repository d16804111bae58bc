"""What splitting by meaning is worth before anything is built: `split_quality.py MODEL [--block 16] [--budget 0.2]`.

Texts are read once for the queries of some layers, and once more for the attention that each slot gets when the text
is read again, which is the importance that `--method dynsplit` keeps by. They are split in four ways: fixed; at the
nearest delimiter; dynamic, by weights of the texts that ship with the package; online, each candidate by its own score
in this very text, the reference of DD-Select. For each:

  length     tokens of a block, mean
  score      DD-Select's score of the places where blocks end: what dynamic splitting raises
  between    share of the variance of log attention that lies between blocks: how alike slots of a block are
  mean, mass share of the attention that stays where blocks of the highest mean score (or attention: pool=mass) do, with
             sinks and a recent window of half the budget; "slots" is what single slots keep
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from semkv_deploy.compiler import reading
from semkv_deploy.compiler.domains import read_domain_texts, read_domains
from semkv_deploy.compiler.source import take_source
from semkv_deploy.evaluate.texts import load_corpora
from semkv_deploy.methods import DynSplit
from semkv_deploy.methods.dd_select import DomainText, delimiter_table, online_scores, segment_online
from semkv_deploy.methods.dynsplit import DynSplitSettings
from semkv_deploy.methods.importance_prediction import LEAST_ATTENTION
from semkv_deploy.model.blocks import BlockRule, segment
from semkv_deploy.model.delimiters import Delimiters
from semkv_deploy.runtime.tokens import load_tokenizer

Array = np.ndarray[Any, Any]
SKIPPED = 4096
"""Tokens of a corpus before those that are read: its beginning is no text, often."""


def kept(attention: Array, block: Array, budget: float, pool: str) -> float:
    """Share of the attention `[heads,n]` that stays.

    Args:
        block: `[n]` numbers of blocks.
        pool: "mean" or "mass".
    """
    count = attention.shape[1]
    target = int(np.ceil(budget * count))
    recent = max(target // 2, 32)
    pinned = (np.arange(count) < 4) | (np.arange(count) >= count - recent)
    size = np.bincount(block)
    shares = []
    for row in attention:
        score = np.log(row) if pool == "mean" else row
        pooled = np.where(pinned, np.inf, (np.bincount(block, score) / size)[block])
        best = np.lexsort((-np.arange(count), -pooled))[:target]
        shares.append(row[best].sum() / row.sum())
    return float(np.mean(shares))


def between(attention: Array, block: Array) -> float:
    """Share of the variance of log attention that lies between blocks, mean over heads."""
    size = np.bincount(block)
    rows = np.log(attention)
    return float(np.mean([(np.bincount(block, row) / size)[block].var() / max(row.var(), 1e-12) for row in rows]))


def measured(text: DomainText, attention: Array, lengths: list[int], method: DynSplit, budget: float) -> dict[str, Any]:
    """One way of splitting one text."""
    ends = np.cumsum(lengths)
    block = np.searchsorted(ends, np.arange(len(text.tokens)), side="right")
    places = np.zeros(len(text.tokens), bool)
    places[ends - 1] = True
    scores = online_scores(text._replace(candidate=places), method.regions)
    return {
        "length": round(float(np.mean(lengths)), 2),
        "score": round(float(np.nanmean(scores)), 4),
        "between": round(between(attention, block), 3),
        "mean": round(kept(attention, block, budget, "mean"), 4),
        "mass": round(kept(attention, block, budget, "mass"), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `build` takes")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="in place of the corpora")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--every", type=int, default=4, help="of how many queries online splitting takes one")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    method = DynSplit(block=args.block)
    given = {name: Path(file) for name, _, file in (text.partition("=") for text in args.text)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = take_source(args.model, root, None, lambda what, share: None)
        decoder, tokenizer = root / "onnx" / "decoder.onnx", load_tokenizer(root)
        delimiters = Delimiters.read(root / "delimiters.json")
        known = read_domain_texts(root, model, method, None, lambda what, share: None)
        table = delimiter_table(known, method.regions, model.vocab_size)
        corpora = load_corpora(given or ("prose", "code", "chat"), given, tokenizer)
        tokens = {}
        for name, corpus in corpora.items():
            first = min(SKIPPED, max(len(corpus.tokens) - args.tokens, 0))
            tokens[name] = list(corpus.tokens[first : first + args.tokens])
        texts = read_domains(decoder, root / "work", model, tokenizer, delimiters, tokens)
        readings = reading.read_again(decoder, root / "work", model, list(tokens.values()))
        is_delimiter = delimiters.table(model.vocab_size)
    settings = DynSplitSettings(table=table, scores=None)
    rules = {
        kind: BlockRule(**method.model_copy(update={"blocks": kind}).rule(model, settings))
        for kind in ("fixed", "delimiters", "dynamic")
    }
    found: dict[str, Any] = {}
    for text, read in zip(texts, readings, strict=True):
        attention = np.maximum(np.concatenate(read.attention), LEAST_ATTENTION)
        splits = {kind: segment(rule, text.tokens.tolist(), is_delimiter) for kind, rule in rules.items()}
        splits["online"] = segment_online(text, rules["dynamic"], method.regions, every=args.every)
        rows = {kind: measured(text, attention, lengths, method, args.budget) for kind, lengths in splits.items()}
        alone = np.arange(len(text.tokens))
        found[text.domain] = {**rows, "slots": {"mean": round(kept(attention, alone, args.budget, "mean"), 4)}}
    if args.json:
        print(json.dumps(found))
        return
    for name, rows in found.items():
        print(f"{name}, blocks of {args.block}, {args.budget:.0%} kept")
        for kind, row in rows.items():
            print(f"  {kind:12}" + "".join(f" {label} {value:<8}" for label, value in row.items()))


if __name__ == "__main__":
    main()
