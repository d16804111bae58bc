#include "nexus_attention.cuh"

namespace semkv
{
namespace nexus
{
template <typename T>
cudaError_t launch(NexusAttentionParams const& call, cudaStream_t stream);
extern template cudaError_t launch<float>(NexusAttentionParams const&, cudaStream_t);
extern template cudaError_t launch<__half>(NexusAttentionParams const&, cudaStream_t);
extern template cudaError_t launch<__nv_bfloat16>(NexusAttentionParams const&, cudaStream_t);
} // namespace nexus

bool nexusAttentionHeadSizeSupported(int32_t headSize)
{
    return headSize == 64 || headSize == 80 || headSize == 96 || headSize == 128 || headSize == 256;
}

int64_t nexusAttentionMaxRows(int32_t queryHeads, int32_t kvHeads)
{
    int64_t const tiles = 65535 / kvHeads;
    return tiles * 8 / (queryHeads / kvHeads);
}

size_t nexusAttentionWorkspaceBytes(int32_t batch, int32_t queryHeads, int32_t kvHeads, int32_t rows, int32_t headSize)
{
    if (batch <= 0 || queryHeads <= 0 || kvHeads <= 0 || rows <= 0)
    {
        return 0;
    }
    // Grows with every size, as TensorRT asks only for the largest ones of a profile. More than one split is taken only
    // below 2048 blocks of at most eight rows, and there by rows x splits <= 2048 x 8 + rows.
    int64_t const queryRows = static_cast<int64_t>(batch) * queryHeads * rows;
    int64_t const rowsTimesSplits = queryRows * 128 < 32768 ? queryRows * 128 : 32768;
    return sizeof(float) * static_cast<size_t>(rowsTimesSplits) * static_cast<size_t>(headSize + 2);
}

cudaError_t nexusAttention(NexusAttentionParams const& params, cudaStream_t stream)
{
    if (params.batch < 0 || params.batch > 65535 || params.kvHeads <= 0
        || params.queryHeads <= 0 || params.queryHeads % params.kvHeads != 0
        || params.rows < 0 || params.capacity < 0 || !nexusAttentionHeadSizeSupported(params.headSize)
        || params.rows > nexusAttentionMaxRows(params.queryHeads, params.kvHeads))
    {
        return cudaErrorInvalidValue;
    }
    if (params.batch == 0 || params.rows == 0)
    {
        return cudaSuccess;
    }
    switch (params.element)
    {
    case Element::kFloat32: return nexus::launch<float>(params, stream);
    case Element::kFloat16: return nexus::launch<__half>(params, stream);
    case Element::kBFloat16: return nexus::launch<__nv_bfloat16>(params, stream);
    }
    return cudaErrorInvalidValue;
}
} // namespace semkv
