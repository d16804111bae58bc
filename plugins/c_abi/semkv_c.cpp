#include "semkv_c.h"

#include <cuda_runtime.h>

using namespace semkv;

int semkv_nexus_attention(NexusAttentionParams const* params, void* stream)
{
    return nexusAttention(*params, static_cast<cudaStream_t>(stream));
}

size_t semkv_nexus_attention_workspace(NexusAttentionParams const* params)
{
    return nexusAttentionWorkspaceBytes(*params);
}

int semkv_compact_cache(CompactCacheParams const* params, void* stream)
{
    return compactCache(*params, static_cast<cudaStream_t>(stream));
}

size_t semkv_compact_cache_workspace(CompactCacheParams const* params)
{
    return compactCacheWorkspaceBytes(*params);
}

int semkv_semantic_cluster(SemanticClusterParams const* params, void* stream)
{
    return semanticCluster(*params, static_cast<cudaStream_t>(stream));
}

size_t semkv_semantic_cluster_workspace(SemanticClusterParams const* params)
{
    return semanticClusterWorkspaceBytes(*params);
}

int semkv_semantic_block_map(SemanticBlockMapParams const* params, void* stream)
{
    return semanticBlockMap(*params, static_cast<cudaStream_t>(stream));
}

int semkv_semantic_block_select(SemanticBlockSelectParams const* params, void* stream)
{
    return semanticBlockSelect(*params, static_cast<cudaStream_t>(stream));
}

size_t semkv_semantic_block_select_workspace(SemanticBlockSelectParams const* params)
{
    return semanticBlockSelectWorkspaceBytes(*params);
}

void semkv_set_schedule([[maybe_unused]] uint64_t seed)
{
#if defined(SEMKV_EMULATED)
    emulation::setSchedule(seed);
#endif
}

void semkv_set_architecture([[maybe_unused]] int architecture)
{
#if defined(SEMKV_EMULATED)
    emulation::architecture() = architecture;
#endif
}
