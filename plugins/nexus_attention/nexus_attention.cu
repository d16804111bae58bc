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
extern template cudaError_t launch<Int8>(NexusAttentionParams const&, cudaStream_t);
extern template cudaError_t launch<Fp8>(NexusAttentionParams const&, cudaStream_t);
} // namespace nexus

bool nexusAttentionHeadSizeSupported(int32_t headSize)
{
    return headSize == 64 || headSize == 80 || headSize == 96 || headSize == 128 || headSize == 256;
}

int64_t nexusAttentionMaxRows(int32_t queryHeads, int32_t kvHeads, CacheElement cache)
{
    int64_t const tiles = 65535 / kvHeads;
    return tiles * (cache == CacheElement::kSame ? 8 : 4) / (queryHeads / kvHeads);
}

size_t nexusAttentionWorkspaceBytes(NexusAttentionParams const& params)
{
    if (params.batch <= 0 || params.queryHeads <= 0 || params.kvHeads <= 0 || params.rows <= 0)
    {
        return 0;
    }
    // Grows with every size, as TensorRT asks only for the largest ones of a profile. More than one split is taken only
    // below 2048 blocks of at most sixteen rows, and there by rows x splits <= 2048 x 16 + rows.
    int64_t const queryRows = static_cast<int64_t>(params.batch) * params.queryHeads * params.rows;
    int64_t const rowsTimesSplits = queryRows * 128 < 65536 ? queryRows * 128 : 65536;
    int64_t floats = rowsTimesSplits * (params.headSize + 2);
    if (params.mass != nullptr)
    {
        bool const indexed = params.slotIndex != nullptr;
        floats += queryRows * (2 + (indexed ? params.indexWidth + params.rows : params.capacity)) + 3;
    }
    return sizeof(float) * static_cast<size_t>(floats);
}

cudaError_t nexusAttention(NexusAttentionParams const& params, cudaStream_t stream)
{
    if (params.batch < 0 || params.batch > 65535 || params.kvHeads <= 0
        || params.queryHeads <= 0 || params.queryHeads % params.kvHeads != 0
        || params.rows < 0 || params.capacity < 0 || !nexusAttentionHeadSizeSupported(params.headSize)
        || params.rows > nexusAttentionMaxRows(params.queryHeads, params.kvHeads, params.cache)
        || (params.slotIndex != nullptr && params.indexWidth < 0)
        || ((params.cache == CacheElement::kSame) != (params.keyScale == nullptr))
        || ((params.keyScale == nullptr) != (params.valueScale == nullptr)))
    {
        return cudaErrorInvalidValue;
    }
    if (params.mass != nullptr && (params.slotIndex != nullptr || params.rows == 0))
    {
        size_t const slots = static_cast<size_t>(params.batch) * static_cast<size_t>(params.kvHeads)
            * static_cast<size_t>(params.capacity);
        cudaError_t const error = cudaMemsetAsync(params.mass, 0, sizeof(float) * slots, stream);
        if (error != cudaSuccess)
        {
            return error;
        }
    }
    if (params.batch == 0 || params.rows == 0)
    {
        return cudaSuccess;
    }
    switch (params.cache)
    {
    case CacheElement::kInt8: return nexus::launch<Int8>(params, stream);
    case CacheElement::kFp8: return nexus::launch<Fp8>(params, stream);
    case CacheElement::kSame: break;
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
