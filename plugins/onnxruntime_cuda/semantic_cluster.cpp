#include "operators.h"

#include "../semantic_cluster/semantic_cluster.h"
#include "device.h"

namespace semkv::ort_cuda
{
namespace
{
using native::reject;

char const* const kWhere = "semkv SemanticCluster";

class SemanticClusterKernel
{
public:
    SemanticClusterKernel(int64_t variant, OrtKernelInfo const* info)
        : mElement(static_cast<Element>(variant))
        , mSpan(native::attribute(info, "span", int64_t{64}))
    {
        if (mSpan < 1 || mSpan > kSemanticClusterMaxSpan)
        {
            reject(kWhere, "attribute span", "1 to " + std::to_string(kSemanticClusterMaxSpan), std::to_string(mSpan));
        }
        if (native::attribute(info, "seed_keys", int64_t{0}) != 0)
        {
            reject(kWhere, "attribute seed_keys", "0: the CUDA kernels average keys", "1");
        }
    }

    void run(native::Run const& run) const
    {
        Tensor const keys = run.input(0), values = run.input(1), bias = run.input(2), length = run.input(3);
        Tensor const chunks = run.input(4), thresholds = run.input(5), target = run.input(6);
        Sizes sizes(kWhere);
        sizes.add("key_cache", "B,H,C,D", keys.shape);
        sizes.add("value_cache", "B,H,C,D", values.shape);
        sizes.add("slot_bias", "B,H,C", bias.shape);
        sizes.add("length", "B", length.shape);
        sizes.add("chunk_id", "B,G,L,C", chunks.shape);
        sizes.add("thresholds", "L", thresholds.shape);
        sizes.add("target", "B", target.shape);
        checkGroups(sizes, kWhere, "chunk_id");
        checkHeadSize(sizes, kWhere, mElement);
        if (sizes["C"] % mSpan != 0)
        {
            reject(kWhere, "the capacity", "a multiple of span " + std::to_string(mSpan), std::to_string(sizes["C"]));
        }
        if (sizes["L"] < 1)
        {
            reject(kWhere, "size L of thresholds", "1 or more", "0");
        }
        SemanticClusterParams params{};
        params.batch = size(sizes, kWhere, "B", kMostInGrid);
        params.heads = size(sizes, kWhere, "H", kMostInGrid);
        params.capacity = size(sizes, kWhere, "C", kSemanticClusterMaxCapacity);
        params.headSize = size(sizes, kWhere, "D");
        params.groups = size(sizes, kWhere, "G");
        params.levels = size(sizes, kWhere, "L");
        params.span = static_cast<int32_t>(mSpan);
        params.element = mElement;
        params.keyCache = keys.data;
        params.valueCache = values.data;
        params.slotBias = bias.as<float>();
        params.length = length.as<int64_t>();
        params.chunkId = chunks.as<int64_t>();
        params.thresholds = thresholds.as<float>();
        params.target = target.as<int64_t>();
        params.keyCacheOut = output(run, kWhere, 0, keys.shape).data;
        params.valueCacheOut = output(run, kWhere, 1, values.shape).data;
        params.slotBiasOut = output(run, kWhere, 2, bias.shape).as<float>();
        params.lengthOut = output(run, kWhere, 3, {sizes["B"]}).as<int64_t>();
        params.sourceSlot = output(run, kWhere, 4, {sizes["B"], sizes["G"], sizes["C"]}).as<int64_t>();
        params.level = output(run, kWhere, 5, {sizes["B"]}).as<int64_t>();
        Scratch const scratch(run, semanticClusterWorkspaceBytes(params));
        params.workspace = scratch.data();
        launched(kWhere, semanticCluster(params, streamOf(run)));
    }

private:
    Element mElement;
    int64_t mSpan;
};
} // namespace

Operators semanticClusterOperators()
{
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    Operators operators;
    for (Element const element : kElements)
    {
        auto const type = onnxType(element);
        operators.push_back(native::makeOperator<SemanticClusterKernel>("SemanticCluster",
            {type, type, kFloat, kLong, kLong, kFloat, kLong}, {type, type, kFloat, kLong, kLong, kLong},
            static_cast<int64_t>(element)));
    }
    return operators;
}
} // namespace semkv::ort_cuda
