#include "operators.h"

#include "../semantic_block_select/semantic_block_select.h"
#include "device.h"

namespace semkv::ort_cuda
{
namespace
{
using native::reject;

char const* const kWhere = "semkv SemanticBlockSelect";

class SemanticBlockSelectKernel
{
public:
    SemanticBlockSelectKernel(int64_t variant, OrtKernelInfo const* info)
        : mElement(static_cast<Element>(variant))
        , mWidth(native::attribute(info, "width", int64_t{1024}))
        , mLargest(native::attribute(info, "reduce_max", int64_t{0}) > 0)
    {
        if (mWidth < 1 || mWidth > INT32_MAX)
        {
            reject(kWhere, "width", "1 to " + std::to_string(INT32_MAX), std::to_string(mWidth));
        }
    }

    void run(native::Run const& run) const
    {
        Tensor const query = run.input(0), representatives = run.input(1), slots = run.input(2), count = run.input(3);
        Tensor const pinned = run.input(4);
        Sizes sizes(kWhere);
        sizes.add("query", "B,Hq,S,D", query.shape);
        sizes.add("representatives", "B,Hkv,N,R,D", representatives.shape);
        sizes.add("block_slots", "B,N,L", slots.shape);
        sizes.add("block_count", "B", count.shape);
        sizes.add("pinned", "B,N", pinned.shape);
        check(sizes);
        SemanticBlockSelectParams params{};
        params.batch = size(sizes, kWhere, "B", kMostInGrid);
        params.queryHeads = size(sizes, kWhere, "Hq");
        params.kvHeads = size(sizes, kWhere, "Hkv", kMostInGrid);
        params.rows = size(sizes, kWhere, "S");
        params.headSize = size(sizes, kWhere, "D", kSemanticBlockSelectMaxHeadSize);
        params.blocks = size(sizes, kWhere, "N", kSemanticBlockSelectMaxBlocks);
        params.vectors = size(sizes, kWhere, "R");
        params.maxBlockLength = size(sizes, kWhere, "L");
        params.width = static_cast<int32_t>(mWidth);
        params.reduceMax = mLargest ? 1 : 0;
        params.element = mElement;
        params.query = query.data;
        params.representatives = representatives.data;
        params.blockSlots = slots.as<int64_t>();
        params.blockCount = count.as<int64_t>();
        params.pinned = pinned.as<int64_t>();
        params.slotIndex = output(run, kWhere, 0, {sizes["B"], sizes["Hkv"], mWidth}).as<int64_t>();
        Scratch const scratch(run, semanticBlockSelectWorkspaceBytes(params));
        params.workspace = scratch.data();
        launched(kWhere, semanticBlockSelect(params, streamOf(run)));
    }

private:
    void check(Sizes const& sizes) const
    {
        checkHeadSize(sizes, kWhere, mElement);
        if (sizes["Hkv"] == 0 || sizes["Hq"] % sizes["Hkv"] != 0)
        {
            reject(kWhere, "query heads", "a multiple of " + std::to_string(sizes["Hkv"]) + " KV heads",
                std::to_string(sizes["Hq"]));
        }
        if (sizes["R"] != 1 && sizes["R"] != 2)
        {
            reject(kWhere, "representatives of a block", "1 or 2", std::to_string(sizes["R"]));
        }
        for (char const* const name : {"S", "N", "L"})
        {
            if (sizes[name] < 1)
            {
                reject(kWhere, std::string("size ") + name, "1 or more", "0");
            }
        }
        if (sizes["N"] > INT32_MAX / sizes["L"])
        {
            reject(kWhere, "slots of all blocks, N x L", "at most " + std::to_string(INT32_MAX),
                std::to_string(sizes["N"]) + " x " + std::to_string(sizes["L"]));
        }
    }

    Element mElement;
    int64_t mWidth;
    bool mLargest;
};
} // namespace

Operators semanticBlockSelectOperators()
{
    constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    Operators operators;
    for (Element const element : kElements)
    {
        auto const type = onnxType(element);
        operators.push_back(native::makeOperator<SemanticBlockSelectKernel>(
            "SemanticBlockSelect", {type, type, kLong, kLong, kLong}, {kLong}, static_cast<int64_t>(element)));
    }
    return operators;
}
} // namespace semkv::ort_cuda
