// NexusAttention's attention mass: weights from the products and softmax statistics that the decode kernel left.
#include "nexus_attention_launch.cuh"

namespace semkv::nexus
{
namespace
{
// One thread sums one entry over all query rows. Grid: entries, KV heads, batch.
__global__ void __launch_bounds__(kThreads) massKernel(Plan const plan)
{
    NexusAttentionParams const& call = plan.call;
    int const entry = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    int64_t const head = static_cast<int64_t>(blockIdx.z) * call.kvHeads + blockIdx.y;
    float* const mass = call.mass + head * call.capacity;
    int64_t const given = call.length[blockIdx.z];
    if (!lengthFits(plan, given))
    {
        if (entry < call.capacity)
        {
            mass[entry] = notANumber();
        }
        return;
    }
    if (entry >= plan.entries)
    {
        return;
    }
    int const length = static_cast<int>(given);
    int const slot = slotOfEntry(plan, head, length, entry);
    float const bias = biasOfSlot(plan, head, length, slot);
    float total = 0.0F;
    for (int tile = 0; tile * plan.rowTile < plan.queries; ++tile)
    {
        Range const range = visibleRange(plan, length, tile);
        int const end = min((tile + 1) * plan.rowTile, plan.queries);
        for (int row = tile * plan.rowTile; entry >= range.begin && entry < range.end && row < end; ++row)
        {
            int64_t const queryRow = head * plan.queries + row;
            float const* const statistics = plan.statistics + 2 * queryRow;
            float const product = plan.products[queryRow * plan.entries + entry];
            float const x = maskedLogit(plan, product, length + row % call.rows, slot, bias);
            total += exp2f(x - statistics[0]) / statistics[1];
        }
    }
    if (call.slotIndex == nullptr)
    {
        mass[entry] = total;
        return;
    }
    // Zero before the launch; an addition, because a slot may be named more than once.
    if (slot >= 0)
    {
        atomicAdd(mass + slot, total);
    }
}
} // namespace

cudaError_t launchMass(Plan const& plan, cudaStream_t stream)
{
    int const threads = max(plan.entries, plan.call.capacity);
    dim3 const grid(static_cast<unsigned>(ceilDivide(threads, kThreads)), static_cast<unsigned>(plan.call.kvHeads),
        static_cast<unsigned>(plan.call.batch));
    SEMKV_LAUNCH(grid, dim3(kThreads), 0, stream, (massKernel), plan);
    return cudaGetLastError();
}
} // namespace semkv::nexus
