#include "nexus_attention_launch.cuh"

namespace semkv::nexus
{
template cudaError_t launch<__half>(NexusAttentionParams const& call, cudaStream_t stream);
} // namespace semkv::nexus
