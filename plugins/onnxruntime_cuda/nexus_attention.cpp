#include "operators.h"

#include "../nexus_attention/nexus_attention.h"
#include "device.h"

namespace semkv::ort_cuda
{
namespace
{
using native::reject;

char const* const kWhere = "semkv NexusAttention";

// Options and types of an operator, in one number.
struct Variant
{
    Element element;
    bool int8, indexed, mass;

    int64_t pack() const
    {
        return static_cast<int64_t>(element) | int64_t{int8} << 4 | int64_t{indexed} << 5 | int64_t{mass} << 6;
    }

    static Variant unpack(int64_t packed)
    {
        return {static_cast<Element>(packed & 15), (packed >> 4 & 1) != 0, (packed >> 5 & 1) != 0,
            (packed >> 6 & 1) != 0};
    }
};

class NexusAttentionKernel
{
public:
    NexusAttentionKernel(int64_t variant, OrtKernelInfo const* info)
        : mVariant(Variant::unpack(variant))
        , mScale(native::attribute(info, "scale", 0.0F))
        , mSoftcap(native::attribute(info, "softcap", 0.0F))
        , mWindow(native::attribute(info, "window", int64_t{0}))
        , mCausal(native::attribute(info, "causal", int64_t{1}) > 0)
    {
        if (mWindow > INT32_MAX)
        {
            reject(kWhere, "attribute window", "at most " + std::to_string(INT32_MAX), std::to_string(mWindow));
        }
    }

    void run(native::Run const& run) const
    {
        size_t next = 7;
        Tensor const query = run.input(0), key = run.input(1), value = run.input(2), keyCache = run.input(3);
        Tensor const valueCache = run.input(4), bias = run.input(5), length = run.input(6);
        Tensor index{}, keyScale{}, valueScale{};
        Sizes sizes(kWhere);
        sizes.add("query", "B,Hq,S,D", query.shape);
        sizes.add("key", "B,Hkv,S,D", key.shape);
        sizes.add("value", "B,Hkv,S,D", value.shape);
        sizes.add("key_cache", "B,Hkv,C,D", keyCache.shape);
        sizes.add("value_cache", "B,Hkv,C,D", valueCache.shape);
        sizes.add("slot_bias", "B,Hkv,C", bias.shape);
        sizes.add("length", "B", length.shape);
        if (mVariant.indexed)
        {
            index = run.input(next++);
            sizes.add("slot_index", "B,Hkv,W", index.shape);
        }
        if (mVariant.int8)
        {
            keyScale = run.input(next++);
            valueScale = run.input(next++);
            sizes.add("key_scale", "B,Hkv,C", keyScale.shape);
            sizes.add("value_scale", "B,Hkv,C", valueScale.shape);
        }
        check(sizes);
        NexusAttentionParams params = sized(sizes);
        params.query = query.data;
        params.key = key.data;
        params.value = value.data;
        params.slotBias = bias.as<float>();
        params.length = length.as<int64_t>();
        params.slotIndex = mVariant.indexed ? index.as<int64_t>() : nullptr;
        size_t const cacheBytes = mVariant.int8 ? 1 : static_cast<size_t>(elementBytes(mVariant.element));
        next = 3;
        params.output = output(run, kWhere, 0, query.shape).data;
        params.keyCache = continued(run, kWhere, 1, keyCache, cacheBytes).data;
        params.valueCache = continued(run, kWhere, 2, valueCache, cacheBytes).data;
        if (mVariant.int8)
        {
            params.keyScale = continued(run, kWhere, next++, keyScale, sizeof(float)).as<float>();
            params.valueScale = continued(run, kWhere, next++, valueScale, sizeof(float)).as<float>();
        }
        params.mass = mVariant.mass ? output(run, kWhere, next, bias.shape).as<float>() : nullptr;
        Scratch const scratch(run, nexusAttentionWorkspaceBytes(params));
        params.workspace = static_cast<float*>(scratch.data());
        launched(kWhere, nexusAttention(params, streamOf(run)));
    }

private:
    CacheElement cache() const { return mVariant.int8 ? CacheElement::kInt8 : CacheElement::kSame; }

    // What can be known without looking at the device's memory. A row whose length or slot_index cannot be gets NaN.
    void check(Sizes const& sizes) const
    {
        int64_t const heads = sizes["Hq"], kvHeads = sizes["Hkv"], rows = sizes["S"], capacity = sizes["C"];
        if (kvHeads == 0 || heads == 0 || heads % kvHeads != 0)
        {
            reject(kWhere, "query heads", "a multiple of " + std::to_string(kvHeads) + " KV heads", std::to_string(heads));
        }
        if (sizes["D"] > INT32_MAX || !nexusAttentionHeadSizeSupported(static_cast<int32_t>(sizes["D"])))
        {
            reject(kWhere, "head size", "64, 80, 96, 128 or 256", std::to_string(sizes["D"]));
        }
        if (rows > capacity)
        {
            reject(kWhere, "the new rows do not fit the cache", "at most " + std::to_string(capacity),
                std::to_string(rows));
        }
        int64_t const most = nexusAttentionMaxRows(size(sizes, kWhere, "Hq"), size(sizes, kWhere, "Hkv", kMostInGrid), cache());
        if (rows > most)
        {
            reject(kWhere, "new rows", "at most " + std::to_string(most), std::to_string(rows));
        }
        if (mVariant.indexed && sizes["W"] < 1)
        {
            reject(kWhere, "size W of slot_index", "1 or more", "0");
        }
    }

    NexusAttentionParams sized(Sizes const& sizes) const
    {
        NexusAttentionParams params{};
        params.batch = size(sizes, kWhere, "B", kMostInGrid);
        params.queryHeads = size(sizes, kWhere, "Hq");
        params.kvHeads = size(sizes, kWhere, "Hkv");
        params.rows = size(sizes, kWhere, "S");
        params.capacity = size(sizes, kWhere, "C");
        params.headSize = size(sizes, kWhere, "D");
        params.indexWidth = mVariant.indexed ? size(sizes, kWhere, "W") : 0;
        params.scale = mScale;
        params.softcap = mSoftcap;
        params.causal = mCausal ? 1 : 0;
        params.window = static_cast<int32_t>(mWindow);
        params.element = mVariant.element;
        params.cache = cache();
        return params;
    }

    Variant mVariant;
    float mScale;
    float mSoftcap;
    int64_t mWindow;
    bool mCausal;
};

std::unique_ptr<native::Operator> nexusAttentionOperator(Variant const& variant)
{
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    auto const rows = onnxType(variant.element);
    auto const cache = variant.int8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : rows;
    std::string name = "NexusAttention";
    std::vector<ONNXTensorElementDataType> inputs{rows, rows, rows, cache, cache, kFloat, kLong};
    std::vector<ONNXTensorElementDataType> outputs{rows, cache, cache};
    if (variant.indexed)
    {
        name += "_indexed";
        inputs.push_back(kLong);
    }
    if (variant.int8)
    {
        name += "_int8";
        inputs.insert(inputs.end(), 2, kFloat);
        outputs.insert(outputs.end(), 2, kFloat);
    }
    if (variant.mass)
    {
        name += "_mass";
        outputs.push_back(kFloat);
    }
    return native::makeOperator<NexusAttentionKernel>(name, std::move(inputs), std::move(outputs), variant.pack());
}
} // namespace

Operators nexusAttentionOperators()
{
    Operators operators;
    for (Element const element : kElements)
    {
        for (int options = 0; options < 8; ++options)
        {
            operators.push_back(
                nexusAttentionOperator({element, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0}));
        }
    }
    return operators;
}
} // namespace semkv::ort_cuda
