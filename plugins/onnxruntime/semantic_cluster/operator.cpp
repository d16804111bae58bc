#include "operator.h"

#include "../ort/rows.h"
#include "semantic_cluster.h"

#include <optional>

namespace semkv::native
{
namespace
{
char const* const kWhere = "semkv SemanticCluster";

// Beside the element type in a variant: nodes with positions and frequencies.
constexpr int64_t kUnrotated = 16;

class SemanticClusterKernel
{
public:
    SemanticClusterKernel(int64_t variant, OrtKernelInfo const* info)
        : mElement(static_cast<Element>(variant % kUnrotated))
        , mUnrotated(variant >= kUnrotated)
        , mSpan(attribute(info, "span", int64_t{64}))
        , mSeedKeys(attribute(info, "seed_keys", int64_t{0}) != 0)
    {
    }

    void run(Run const& run) const
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
        size_t next = 7;
        std::optional<Tensor> position, frequency, keyScale, valueScale;
        if (mUnrotated)
        {
            position = run.input(next++);
            frequency = run.input(next++);
            sizes.add("slot_position", "B,G,C", position->shape);
            sizes.add("frequency", "F", frequency->shape);
        }
        if (mElement == Element::kInt8)
        {
            keyScale = run.input(next++);
            valueScale = run.input(next++);
            sizes.add("key_scale", "B,H,C", keyScale->shape);
            sizes.add("value_scale", "B,H,C", valueScale->shape);
        }
        check(sizes, length);
        int64_t const batch = sizes["B"], groups = sizes["G"], capacity = sizes["C"];
        Rows const keysOut(run, 0, keys, elementBytes(mElement)), valuesOut(run, 1, values, elementBytes(mElement));
        Rows const biasOut(run, 2, bias, sizeof(float));
        int64_t* lengthOut = run.output(3, {batch}).as<int64_t>();
        int64_t* source = run.output(4, {batch, groups, capacity}).as<int64_t>();
        int64_t* level = run.output(5, {batch}).as<int64_t>();
        std::optional<Rows> keyScaleOut, valueScaleOut;
        if (keyScale)
        {
            keyScaleOut.emplace(run, 6, *keyScale, sizeof(float));
            valueScaleOut.emplace(run, 7, *valueScale, sizeof(float));
        }
        auto const cache = [](Rows const& rows, std::optional<Rows> const& scales) {
            return CacheRows{rows.from(), rows.to(), scales ? static_cast<float const*>(scales->from()) : nullptr,
                scales ? static_cast<float*>(scales->to()) : nullptr};
        };
        semanticCluster({cache(keysOut, keyScaleOut), cache(valuesOut, valueScaleOut),
                            static_cast<float const*>(biasOut.from()), static_cast<float*>(biasOut.to()),
                            length.as<int64_t>(), chunks.as<int64_t>(), thresholds.as<float>(), target.as<int64_t>(),
                            position ? position->as<int64_t>() : nullptr, frequency ? frequency->as<float>() : nullptr,
                            lengthOut, source, level, batch, sizes["H"], capacity, sizes["D"], groups, sizes["L"],
                            mUnrotated ? sizes["F"] : 0, mSpan, mSeedKeys, mElement},
            run.parallel());
    }

private:
    void check(Sizes const& sizes, Tensor const& length) const
    {
        int64_t const heads = sizes["H"], capacity = sizes["C"], groups = sizes["G"];
        if (groups != 1 && groups != heads)
        {
            reject(kWhere, "groups of chunk_id", "1 or " + std::to_string(heads), std::to_string(groups));
        }
        if (mSpan < 1 || capacity % mSpan != 0)
        {
            reject(kWhere, "the capacity", "a multiple of span " + std::to_string(mSpan), std::to_string(capacity));
        }
        if (mUnrotated && 2 * sizes["F"] > sizes["D"])
        {
            reject(kWhere, "frequencies", "at most " + std::to_string(sizes["D"] / 2) + ", half the head size",
                std::to_string(sizes["F"]));
        }
        for (int64_t b = 0; b < sizes["B"]; ++b)
        {
            int64_t const used = length.as<int64_t>()[b];
            if (used < 0 || used > capacity)
            {
                reject(kWhere, "length of batch row " + std::to_string(b), "0 to " + std::to_string(capacity),
                    std::to_string(used));
            }
        }
    }

    Element mElement;
    bool mUnrotated;
    int64_t mSpan;
    bool mSeedKeys;
};
} // namespace

std::vector<std::unique_ptr<Operator>> semanticClusterOperators()
{
    using Types = std::vector<ONNXTensorElementDataType>;
    constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    std::vector<std::unique_ptr<Operator>> operators;
    for (auto const& [type, element] :
        {std::pair(kFloat, Element::kFloat32), std::pair(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, Element::kFloat16),
            std::pair(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, Element::kBfloat16),
            std::pair(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, Element::kInt8)})
    {
        for (bool unrotated : {false, true})
        {
            std::string name = "SemanticCluster";
            Types inputs{type, type, kFloat, kLong, kLong, kFloat, kLong}, outputs{type, type, kFloat, kLong, kLong, kLong};
            if (unrotated)
            {
                name += "_unrotated";
                inputs.insert(inputs.end(), {kLong, kFloat});
            }
            if (element == Element::kInt8)
            {
                name += "_int8";
                inputs.insert(inputs.end(), {kFloat, kFloat});
                outputs.insert(outputs.end(), {kFloat, kFloat});
            }
            operators.push_back(makeOperator<SemanticClusterKernel>(
                name, inputs, outputs, static_cast<int64_t>(element) + (unrotated ? kUnrotated : 0)));
        }
    }
    return operators;
}
} // namespace semkv::native
