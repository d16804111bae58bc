#include "nexus_attention_launch.cuh"

namespace semkv::nexus
{
template cudaError_t launch<__nv_bfloat16>(NexusAttentionParams const& call, cudaStream_t stream);
} // namespace semkv::nexus
