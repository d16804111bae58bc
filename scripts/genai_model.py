"""An int4 CPU model of onnxruntime-genai from any checkpoint semkv-deploy loads: python genai_model.py SOURCE OUT."""

from __future__ import annotations

import sys
from pathlib import Path

from foreign_graphs import by_genai

from semkv_deploy.bundle import new_directory
from semkv_deploy.export.checkpoint import load_checkpoint


def main(source: str, out: Path) -> None:
    """Saves the checkpoint in Hugging Face form, which is what genai's builder reads, and builds it."""
    checkpoint = load_checkpoint(source)
    with new_directory(out) as built:
        by_genai(checkpoint.model, checkpoint.tokenizer, built, "int4")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
