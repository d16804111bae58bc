"""Closed sets of names that users choose from, each stated once; importing them costs nothing."""

from __future__ import annotations

from typing import Literal

Target = Literal["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]
"""Runtimes that bundles are built for."""

TensorRTTarget = Literal["tensorrt", "tensorrt-rtx"]
"""Those of them that are TensorRT's."""

WeightFormat = Literal["fp32", "int8", "int4"]
"""How `onnxruntime-*` targets store weights."""

StoredWeights = Literal["fp32", "int8", "int4", "kept"]
"""How a bundle's are stored. kept: as they came, from a graph whose weights were quantised already."""

CacheType = Literal["float32", "float16", "bfloat16", "int8"]
"""Types of caches that `onnxruntime-cpu` has; all but float32 take native operators. `onnxruntime-cuda`: float32."""

Native = Literal["auto", "on", "off"]
"""Whether `onnxruntime-cpu` has native operators: where their library is, for certain, or never.

`onnxruntime-cuda` always has."""

DType = Literal["float16", "bfloat16", "float32"]
"""Types of weights and caches that `tensorrt*` targets have."""

EngineLayout = Literal["dual", "single", "split"]
"""How prefill and decode are built for `tensorrt*` targets.

dual: one engine with an optimization profile for each (weights twice where the builder packs them by profile);
single: one engine with one profile that covers both; split: two engines.
"""

TritonBackend = Literal["python", "cpp"]
"""What runs a bundle in Triton: its Python backend with this package, or libsemkv's own backend, without Python."""

BudgetBy = Literal["uniform", "layer", "head"]
"""How a budget is shared: alike, or as `build` calibrates it for each layer or each KV head."""
