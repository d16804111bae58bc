"""An int4 CPU model of onnxruntime-genai from any checkpoint semkv-deploy loads: python genai_model.py SOURCE OUT."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from semkv_deploy.bundle import new_directory
from semkv_deploy.export.checkpoint import load_checkpoint


def main(source: str, out: Path) -> None:
    """Saves the checkpoint in Hugging Face form, which is what genai's builder reads, and builds it."""
    checkpoint = load_checkpoint(source)
    model = checkpoint.model
    # Dequantised GGUF weights are ordinary weights, but transformers remembers where they came from and refuses.
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    with tempfile.TemporaryDirectory() as folder, new_directory(out) as built:
        model.save_pretrained(folder)
        checkpoint.tokenizer.save_pretrained(folder)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", str(built)]
        subprocess.run([*command, "-p", "int4", "-e", "cpu", "-c", folder], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
