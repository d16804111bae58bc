#include "nexus_attention_launch.cuh"

namespace semkv::nexus
{
template cudaError_t launch<Int8>(NexusAttentionParams const& call, cudaStream_t stream);
} // namespace semkv::nexus
