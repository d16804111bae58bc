#include "nexus_attention_launch.cuh"

namespace semkv::nexus
{
template cudaError_t launch<Fp8>(NexusAttentionParams const& call, cudaStream_t stream);
} // namespace semkv::nexus
