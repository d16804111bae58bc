// A C interface to the kernels, for callers without TensorRT: the tests, scripts/gpu_check.sh, other languages.
// Every function returns a cudaError_t; `stream` is a cudaStream_t. Structures: the Params of each operator's header.
#pragma once

#include "../compact_cache/compact_cache.h"
#include "../nexus_attention/nexus_attention.h"
#include "../semantic_block_map/semantic_block_map.h"
#include "../semantic_block_select/semantic_block_select.h"
#include "../semantic_cluster/semantic_cluster.h"

#define SEMKV_C extern "C" __attribute__((visibility("default")))

SEMKV_C int semkv_nexus_attention(semkv::NexusAttentionParams const* params, void* stream);
SEMKV_C size_t semkv_nexus_attention_workspace(semkv::NexusAttentionParams const* params);
SEMKV_C int semkv_compact_cache(semkv::CompactCacheParams const* params, void* stream);
SEMKV_C size_t semkv_compact_cache_workspace(semkv::CompactCacheParams const* params);
SEMKV_C int semkv_semantic_cluster(semkv::SemanticClusterParams const* params, void* stream);
SEMKV_C size_t semkv_semantic_cluster_workspace(semkv::SemanticClusterParams const* params);
SEMKV_C int semkv_semantic_block_map(semkv::SemanticBlockMapParams const* params, void* stream);
SEMKV_C int semkv_semantic_block_select(semkv::SemanticBlockSelectParams const* params, void* stream);
SEMKV_C size_t semkv_semantic_block_select_workspace(semkv::SemanticBlockSelectParams const* params);
// Orders blocks, warps and lanes of the emulated build by a seed; does nothing on a GPU.
SEMKV_C void semkv_set_schedule(uint64_t seed);
// What the kernels of the emulated build claim to be built for (75: no tensor cores); does nothing on a GPU.
SEMKV_C void semkv_set_architecture(int architecture);
