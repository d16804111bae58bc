#include "operator.h"

#include "kernels.h"
#include "nexus_attention.h"

#include <algorithm>
#include <cmath>

namespace semkv::native
{
namespace
{
constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

struct Types
{
    Element element;
    Element cache;
};

ONNXTensorElementDataType onnxType(Element element)
{
    switch (element)
    {
    case Element::kFloat32: return kFloat;
    case Element::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Element::kBfloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case Element::kInt8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

// Options and types of an operator, in one number.
struct Variant
{
    Types types;
    bool indexed;
    bool mass;

    int64_t pack() const
    {
        return static_cast<int64_t>(types.element) | static_cast<int64_t>(types.cache) << 4 | int64_t{indexed} << 8
            | int64_t{mass} << 9;
    }

    explicit Variant(int64_t packed)
        : types{static_cast<Element>(packed & 15), static_cast<Element>(packed >> 4 & 15)}
        , indexed((packed >> 8 & 1) != 0)
        , mass((packed >> 9 & 1) != 0)
    {
    }

    Variant(Types types, bool indexed, bool mass)
        : types(types)
        , indexed(indexed)
        , mass(mass)
    {
    }

    bool int8() const { return types.cache == Element::kInt8; }
};

char const* const kWhere = "semkv NexusAttention";

class NexusAttentionKernel
{
public:
    NexusAttentionKernel(int64_t variant, OrtKernelInfo const* info)
        : mVariant(variant)
        , mScale(attribute(info, "scale", 0.0f))
        , mSoftcap(attribute(info, "softcap", 0.0f))
        , mWindow(attribute(info, "window", int64_t{0}))
        , mCausal(attribute(info, "causal", int64_t{1}) > 0)
    {
    }

    void run(Run const& run) const
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
        if (mVariant.int8())
        {
            keyScale = run.input(next++);
            valueScale = run.input(next++);
            sizes.add("key_scale", "B,Hkv,C", keyScale.shape);
            sizes.add("value_scale", "B,Hkv,C", valueScale.shape);
        }
        NexusAttentionCall call{};
        call.batch = sizes["B"];
        call.heads = sizes["Hq"];
        call.kvHeads = sizes["Hkv"];
        call.rows = sizes["S"];
        call.capacity = sizes["C"];
        call.headSize = sizes["D"];
        call.width = mVariant.indexed ? sizes["W"] : 0;
        call.length = length.as<int64_t>();
        call.slotIndex = index.as<int64_t>();
        checkValues(call);
        call.query = query.data;
        call.key = key.data;
        call.value = value.data;
        call.slotBias = bias.as<float>();
        call.scale = mScale != 0.0f ? mScale : 1.0f / std::sqrt(static_cast<float>(call.headSize));
        call.softcap = mSoftcap;
        call.window = mWindow;
        call.causal = mCausal;
        call.element = mVariant.types.element;
        call.cacheElement = mVariant.types.cache;
        next = 3;
        call.output = run.output(0, query.shape).data;
        call.keyCache = run.continued(1, keyCache, elementBytes(call.cacheElement)).data;
        call.valueCache = run.continued(2, valueCache, elementBytes(call.cacheElement)).data;
        if (mVariant.int8())
        {
            call.keyScale = run.continued(next++, keyScale, sizeof(float)).as<float>();
            call.valueScale = run.continued(next++, valueScale, sizeof(float)).as<float>();
        }
        call.mass = mVariant.mass ? run.output(next, bias.shape).as<float>() : nullptr;
        nexusAttention(call, run.parallel());
    }

private:
    static void checkValues(NexusAttentionCall const& call)
    {
        if (call.kvHeads == 0 || call.heads % call.kvHeads != 0)
        {
            reject(kWhere, "query heads", "a multiple of " + std::to_string(call.kvHeads) + " KV heads",
                std::to_string(call.heads));
        }
        if (call.headSize < 1 || call.headSize > kLongestHead)
        {
            reject(kWhere, "head size", "1 to " + std::to_string(kLongestHead), std::to_string(call.headSize));
        }
        for (int64_t b = 0; b < call.batch; ++b)
        {
            if (call.length[b] < 0 || call.length[b] + call.rows > call.capacity)
            {
                reject(kWhere, "the new rows do not fit the cache of batch row " + std::to_string(b),
                    "0 <= length, length + " + std::to_string(call.rows) + " <= " + std::to_string(call.capacity),
                    "length " + std::to_string(call.length[b]));
            }
            int64_t const* first = call.slotIndex + b * call.kvHeads * call.width;
            int64_t const* end = first + call.kvHeads * call.width;
            auto const beyond = std::find_if(first, end, [&](int64_t slot) { return slot >= call.length[b]; });
            if (beyond != end)
            {
                reject(kWhere, "slot_index names a slot of batch row " + std::to_string(b) + " that is not there",
                    "less than length " + std::to_string(call.length[b]), std::to_string(*beyond));
            }
        }
    }

    Variant mVariant;
    float mScale;
    float mSoftcap;
    int64_t mWindow;
    bool mCausal;
};

std::unique_ptr<Operator> nexusAttentionOperator(Variant const& variant)
{
    auto const rows = onnxType(variant.types.element), cache = onnxType(variant.types.cache);
    std::string name = "NexusAttention";
    std::vector<ONNXTensorElementDataType> inputs{rows, rows, rows, cache, cache, kFloat, kLong};
    std::vector<ONNXTensorElementDataType> outputs{rows, cache, cache};
    if (variant.indexed)
    {
        name += "_indexed";
        inputs.push_back(kLong);
    }
    if (variant.int8())
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
    return makeOperator<NexusAttentionKernel>(name, std::move(inputs), std::move(outputs), variant.pack());
}
} // namespace

std::vector<std::unique_ptr<Operator>> nexusAttentionOperators()
{
    constexpr Types kTypes[] = {{Element::kFloat32, Element::kFloat32}, {Element::kFloat16, Element::kFloat16},
        {Element::kBfloat16, Element::kBfloat16}, {Element::kFloat32, Element::kFloat16},
        {Element::kFloat32, Element::kBfloat16}, {Element::kFloat32, Element::kInt8}, {Element::kFloat16, Element::kInt8},
        {Element::kBfloat16, Element::kInt8}};
    std::vector<std::unique_ptr<Operator>> operators;
    for (Types const& types : kTypes)
    {
        for (bool indexed : {false, true})
        {
            for (bool mass : {false, true})
            {
                operators.push_back(nexusAttentionOperator({types, indexed, mass}));
            }
        }
    }
    return operators;
}
} // namespace semkv::native
