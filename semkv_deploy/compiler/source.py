"""What a build starts from: an export, a checkpoint, or a stranger's decoder, as an export in the build's folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.exported import copy_export, open_export
from semkv_deploy.targets import is_tensorrt
from semkv_deploy.targets.build import Progress

if TYPE_CHECKING:
    from semkv_deploy.choices import StoredWeights, WeightFormat
    from semkv_deploy.model.config import ModelFacts


def weights_of_source(root: Path, weights: WeightFormat, targets: Sequence[str], progress: Progress) -> StoredWeights:
    """The format that `onnxruntime-*` targets store weights in: as they came, where they came quantised.

    Raises:
        SemkvError: when the source's weights are quantised and another format, or TensorRT, is asked for.
    """
    from semkv_deploy.export.foreign import keeps_weights

    operator = keeps_weights(root / "onnx" / "decoder.onnx")
    if operator is None:
        return weights
    if weights == "int8":
        raise SemkvError(
            "the source's weights are quantised already",
            where=f"--weights {weights}",
            expected="weights as they are",
            fix="leave --weights out, or give a float32 graph",
        )
    for name in targets:
        if is_tensorrt(name):
            raise SemkvError(
                "TensorRT targets take no weights that came quantised",
                where=f"--target {name}",
                expected="a graph with float32 or float16 weights",
                got=f"weights that {operator} reads",
                fix="export the checkpoint, or build for onnxruntime-cpu",
            )
    progress("weights came quantised: they stay as they are", None)
    return "kept"


def _check_folder(folder: Path) -> None:
    """Looks whether a folder that is taken for a checkpoint is what another exporter wrote: the graph is given then.

    Raises:
        SemkvError: naming the graph.
    """
    if not folder.is_dir() or any(file for kind in ("*.safetensors", "*.bin", "*.gguf") for file in folder.glob(kind)):
        return
    graphs = sorted(folder.glob("*.onnx"))
    if graphs:
        raise SemkvError(
            "a folder of ONNX graphs, and no checkpoint",
            where=folder,
            expected="the decoder's file",
            got=[graph.name for graph in graphs],
            fix=f"give that: semkv-deploy build {graphs[0]}",
        )


def take_source(
    source: str,
    root: Path,
    family: str | None,
    progress: Progress,
    *,
    prove_import: bool = True,
    config_from: Path | None = None,
) -> ModelFacts:
    """Puts the portable decoder into `root/onnx`, and tokenizer and delimiters into `root`; returns the model's facts.

    Raises:
        SemkvError: when it cannot be read or exported, or is of another family; for `config_from` with a source that
            has its own.
    """
    from semkv_deploy.export.foreign import import_decoder, is_foreign

    portable = Path(source)
    stranger = portable.suffix == ".onnx" and is_foreign(portable)
    model = open_export(portable) if portable.suffix == ".onnx" and not stranger else None
    if config_from is not None and not stranger:
        raise SemkvError("the source has a configuration of its own", where="--config-from", fix="leave it out")
    onnx_dir = root / "onnx"
    onnx_dir.mkdir()
    if stranger:
        model = import_decoder(portable, onnx_dir, beside=config_from, proof=prove_import, progress=progress)
    elif model is None:
        from semkv_deploy.export import export_checkpoint

        _check_folder(portable)
        model = export_checkpoint(source, onnx_dir, progress)
    else:
        # Copied, not linked: onnx tools refuse external data with several hard links.
        copy_export(portable, onnx_dir)
    if family is not None and family != model.family:
        raise SemkvError("the recipe is for another family of models", where=source, expected=family, got=model.family)
    for name in ("tokenizer", "delimiters.json"):
        shutil.move(onnx_dir / name, root / name)
    (onnx_dir / "model.json").unlink()
    for compressor in onnx_dir.glob("compressor*.onnx"):
        compressor.unlink()
    return model
