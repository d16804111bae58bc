"""A program that takes llama-server's options, as far as `bench` gives them, and serves with xllamacpp's."""

from __future__ import annotations

import argparse
import time

import xllamacpp

parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("model", "host", "cache-type-k", "cache-type-v", "flash-attn", "fit"):
    parser.add_argument(f"--{name}", required=name == "model")
for name in ("port", "parallel", "ctx-size", "threads", "threads-batch", "gpu-layers", "cache-ram", "ctx-checkpoints"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--no-ui", action="store_true")
parser.add_argument("--verbosity", type=int)
parser.add_argument("--version", action="version", version="version: a stand-in")
given = parser.parse_args()
if given.verbosity != 1:
    raise SystemExit(f"0.00 I cmn system_info: n_threads = 2 / 2 | {xllamacpp.get_system_info()}\nno model")
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.hostnames, parameters.port = given.model, [given.host], given.port
parameters.n_parallel, parameters.n_ctx, parameters.n_gpu_layers = given.parallel, given.ctx_size, given.gpu_layers
parameters.cpuparams.n_threads, parameters.cpuparams_batch.n_threads = given.threads, given.threads_batch
parameters.cache_type_k = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{given.cache_type_k.upper()}")
parameters.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{given.cache_type_v.upper()}")
assert given.flash_attn == "on" and given.fit == "off"
parameters.fit_params, parameters.cache_ram_mib = False, given.cache_ram
parameters.n_ctx_checkpoints, parameters.verbosity = given.ctx_checkpoints, 0
server = xllamacpp.Server(parameters)
while True:
    time.sleep(1)
