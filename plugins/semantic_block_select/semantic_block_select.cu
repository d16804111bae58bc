#include "semantic_block_select.cuh"

namespace semkv
{
namespace block_select
{
template <typename T>
cudaError_t run(SemanticBlockSelectParams const& params, Scratch const& scratch, cudaStream_t stream)
{
    unsigned const heads = static_cast<unsigned>(params.kvHeads);
    unsigned const batch = static_cast<unsigned>(params.batch);
    size_t const weightBytes
        = sizeof(float) * static_cast<size_t>(params.vectors) * static_cast<size_t>(params.headSize);
    SEMKV_LAUNCH(dim3(static_cast<unsigned>(ceilDivide(params.blocks, kBlocksPerGroup)), heads, batch),
        dim3(kScoreThreads), weightBytes, stream, (blockScoreKernel<T>), params, scratch);
    SEMKV_LAUNCH(
        dim3(heads, batch), dim3(kSelectThreads), kSelectShared, stream, (blockSelectKernel), params, scratch);
    return cudaGetLastError();
}
} // namespace block_select

size_t semanticBlockSelectWorkspaceBytes(SemanticBlockSelectParams const& params)
{
    SemanticBlockSelectParams sizes = params;
    sizes.workspace = nullptr;
    block_select::Scratch scratch{};
    return block_select::carve(sizes, scratch);
}

cudaError_t semanticBlockSelect(SemanticBlockSelectParams const& params, cudaStream_t stream)
{
    if (params.batch < 0 || params.batch > 65535 || params.kvHeads <= 0 || params.kvHeads > 65535
        || params.queryHeads <= 0 || params.queryHeads % params.kvHeads != 0 || params.rows <= 0 || params.headSize <= 0
        || params.headSize > kSemanticBlockSelectMaxHeadSize || params.headSize * elementBytes(params.element) % 16 != 0
        || params.blocks <= 0 || params.blocks > kSemanticBlockSelectMaxBlocks
        || (params.vectors != 1 && params.vectors != 2) || params.maxBlockLength < 1
        || static_cast<int64_t>(params.blocks) * params.maxBlockLength > INT32_MAX || params.width < 1)
    {
        return cudaErrorInvalidValue;
    }
    if (params.batch == 0)
    {
        return cudaSuccess;
    }
    block_select::Scratch scratch{};
    block_select::carve(params, scratch);
    return forElement(
        params.element, [&](auto type) { return block_select::run<decltype(type)>(params, scratch, stream); });
}
} // namespace semkv
