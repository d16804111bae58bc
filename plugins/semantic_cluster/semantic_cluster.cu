#include "semantic_cluster.cuh"

namespace semkv
{
namespace cluster
{
template <typename T>
cudaError_t run(SemanticClusterParams const& params, Scratch const& scratch, cudaStream_t stream)
{
    unsigned const batch = static_cast<unsigned>(params.batch);
    unsigned const heads = static_cast<unsigned>(params.heads);
    unsigned const groups = static_cast<unsigned>(params.groups);
    unsigned const words = static_cast<unsigned>(scratch.words);
    unsigned const slotBlocks = static_cast<unsigned>(ceilDivide(params.capacity, kThreads));
    SEMKV_LAUNCH(dim3(static_cast<unsigned>(ceilDivide(params.capacity, kThreads / 32)), heads, batch), dim3(kThreads),
        0, stream, (normKernel<T>), params, scratch);
    SEMKV_LAUNCH(dim3(words, groups, batch), dim3(kBandThreads), kNeighbourShared, stream, (neighbourKernel<T>), params,
        scratch);
    SEMKV_LAUNCH(dim3(static_cast<unsigned>(params.levels), groups, batch), dim3(kThreads),
        seedShared(scratch.words), stream, (seedKernel), params, scratch);
    SEMKV_LAUNCH(dim3(static_cast<unsigned>(ceilDivide(params.capacity, kPlaceThreads)), groups, batch),
        dim3(kPlaceThreads), kPlaceShared, stream, (placeKernel), params, scratch);
    SEMKV_LAUNCH(dim3(slotBlocks, heads, batch), dim3(kThreads), 0, stream, (weightKernel), params, scratch);
    cudaError_t const error
        = copyBias(params.slotBiasOut, scratch.bias, params.batch, params.heads, params.capacity, stream);
    RowMove const move{{params.keyCache, params.valueCache}, {params.keyCacheOut, params.valueCacheOut}, nullptr,
        scratch.source, scratch.members, scratch.weight,
        scratch.count, nullptr, params.heads, params.groups, params.capacity, params.headSize};
    return error != cudaSuccess ? error : moveCaches(move, params.element, params.batch, stream);
}
} // namespace cluster

size_t semanticClusterWorkspaceBytes(SemanticClusterParams const& params)
{
    SemanticClusterParams sizes = params;
    sizes.workspace = nullptr;
    cluster::Scratch scratch{};
    return cluster::carve(sizes, scratch);
}

cudaError_t semanticCluster(SemanticClusterParams const& params, cudaStream_t stream)
{
    if (params.batch < 0 || params.batch > 65535 || params.heads <= 0 || params.heads > 65535 || params.capacity < 0
        || params.capacity > kSemanticClusterMaxCapacity || params.headSize <= 0
        || params.headSize * elementBytes(params.element) % 16 != 0
        || (params.groups != 1 && params.groups != params.heads) || params.levels <= 0 || params.span < 1
        || params.span > kSemanticClusterMaxSpan)
    {
        return cudaErrorInvalidValue;
    }
    if (params.batch == 0 || params.capacity == 0)
    {
        return cudaSuccess;
    }
    cluster::Scratch scratch{};
    cluster::carve(params, scratch);
    return forElement(
        params.element, [&](auto type) { return cluster::run<decltype(type)>(params, scratch, stream); });
}
} // namespace semkv
