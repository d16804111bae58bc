#include "operator.h"

#include "../ort/rows.h"
#include "fit.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>

namespace semkv::native
{
namespace
{
char const* const kWhere = "semkv CompactCache";

// Beside the element type in a variant: nodes with reference queries, which slots that stay are fitted to.
constexpr int64_t kFitted = 16;

// What fitting takes beside caches and slots.
struct Fitted
{
    Tensor length, target, scored, queries;
};

class CompactCacheKernel
{
public:
    CompactCacheKernel(int64_t variant, OrtKernelInfo const* info)
        : mElement(static_cast<Element>(variant % kFitted))
        , mFitted(variant >= kFitted)
        , mFitValues(attribute(info, "values", int64_t{1}) != 0)
    {
    }

    void run(Run const& run) const
    {
        Tensor const keys = run.input(0), values = run.input(1), bias = run.input(2), index = run.input(3);
        Sizes sizes(kWhere);
        sizes.add("key_cache", "B,H,C,D", keys.shape);
        sizes.add("value_cache", "B,H,C,D", values.shape);
        sizes.add("slot_bias", "B,H,C", bias.shape);
        sizes.add("keep_index", "B,G,C", index.shape);
        int64_t const batch = sizes["B"], heads = sizes["H"], capacity = sizes["C"], groups = sizes["G"];
        if (groups != 1 && groups != heads)
        {
            reject(kWhere, "groups of keep_index", "1 or " + std::to_string(heads), std::to_string(groups));
        }
        int64_t const* keep = index.as<int64_t>();
        int64_t const* beyond
            = std::find_if(keep, keep + batch * groups * capacity, [=](int64_t slot) { return slot >= capacity; });
        if (beyond != keep + batch * groups * capacity)
        {
            reject(kWhere, "keep_index names a slot outside the cache", "below " + std::to_string(capacity),
                std::to_string(*beyond));
        }
        std::optional<Fitted> fitted;
        if (mFitted)
        {
            fitted = {run.input(4), run.input(5), run.input(6), run.input(7)};
            sizes.add("length", "B", fitted->length.shape);
            sizes.add("target", "B", fitted->target.shape);
            // A scalar, or the one element that some hosts make of it.
            if (fitted->scored.shape.size() > 1 || (fitted->scored.shape.size() == 1 && fitted->scored.shape[0] != 1))
            {
                reject(kWhere, "shape of scored", "[]", text(fitted->scored.shape));
            }
            sizes.add("reference_queries", "B,H,R,D", fitted->queries.shape);
            checkLive(sizes, *fitted, keep);
        }
        // What moves with a slot, its bias aside: rows, and for codes their scales.
        std::vector<Rows> moved;
        moved.reserve(4);
        moved.emplace_back(run, 0, keys, elementBytes(mElement));
        moved.emplace_back(run, 1, values, elementBytes(mElement));
        for (size_t scale = 0; mElement == Element::kInt8 && scale < 2; ++scale)
        {
            Tensor const scales = run.input((mFitted ? 8 : 4) + scale);
            sizes.add(scale == 0 ? "key_scale" : "value_scale", "B,H,C", scales.shape);
            moved.emplace_back(run, 4 + scale, scales, sizeof(float));
        }
        Rows const biasOut(run, 2, bias, sizeof(float));
        int64_t* length = run.output(3, {batch}).as<int64_t>();
        for (int64_t b = 0; b < batch; ++b)
        {
            length[b] = 0;
            for (int64_t g = 0; g < groups; ++g)
            {
                int64_t const* first = keep + (b * groups + g) * capacity;
                int64_t const kept = std::count_if(first, first + capacity, [](int64_t slot) { return slot >= 0; });
                length[b] = std::max(length[b], kept);
            }
        }
        run.parallel()(static_cast<size_t>(batch * heads), [&](size_t head) {
            int64_t const b = static_cast<int64_t>(head) / heads, h = static_cast<int64_t>(head) % heads;
            int64_t const* wanted = keep + (b * groups + h * groups / heads) * capacity;
            int64_t const row = static_cast<int64_t>(head) * capacity;
            int64_t to = 0;
            for (int64_t n = 0; n < capacity;)
            {
                if (wanted[n] < 0)
                {
                    ++n;
                    continue;
                }
                // Slots that follow each other move together: most do.
                int64_t count = 1;
                while (n + count < capacity && wanted[n + count] == wanted[n] + count)
                {
                    ++count;
                }
                for (Rows const& rows : moved)
                {
                    rows.copy(row + to, row + wanted[n], count);
                }
                biasOut.copy(row + to, row + wanted[n], count);
                to += count;
                n += count;
            }
            for (Rows const& rows : moved)
            {
                rows.clear(row + to, capacity - to);
            }
            auto* biases = static_cast<float*>(biasOut.to()) + row;
            std::fill(biases + to, biases + std::max(to, length[b]), -std::numeric_limits<float>::infinity());
            std::fill(biases + std::max(to, length[b]), biases + capacity, 0.0f);
            if (fitted && *fitted->scored.as<float>() != 0.0f
                && fitted->length.as<int64_t>()[b] > fitted->target.as<int64_t>()[b])
            {
                fitHead(sizes, *fitted, moved, biasOut, static_cast<int64_t>(head), wanted);
            }
        });
    }

private:
    // Slots of rows that are fitted must be live: dead ones have no attention to give on.
    static void checkLive(Sizes const& sizes, Fitted const& fitted, int64_t const* keep)
    {
        int64_t const count = sizes["G"] * sizes["C"];
        for (int64_t b = 0; b < sizes["B"]; ++b)
        {
            int64_t const length = fitted.length.as<int64_t>()[b];
            int64_t const most = *std::max_element(keep + b * count, keep + (b + 1) * count);
            if (length < 0 || length > sizes["C"] || most >= length)
            {
                reject(kWhere, "length of batch row " + std::to_string(b),
                    std::to_string(most + 1) + " to " + std::to_string(sizes["C"]), std::to_string(length));
            }
        }
    }

    void fitHead(Sizes const& sizes, Fitted const& fitted, std::vector<Rows> const& moved, Rows const& bias, int64_t head,
        int64_t const* wanted) const
    {
        int64_t const capacity = sizes["C"], first = head * capacity;
        std::vector<int64_t> kept;
        std::copy_if(wanted, wanted + capacity, std::back_inserter(kept), [](int64_t slot) { return slot >= 0; });
        bool const codes = moved.size() == 4;
        fitKernels().fit({mElement, sizes["D"], first, fitted.length.as<int64_t>()[head / sizes["H"]], moved[0].from(),
            moved[1].from(), codes ? static_cast<float const*>(moved[2].from()) : nullptr,
            codes ? static_cast<float const*>(moved[3].from()) : nullptr, static_cast<float const*>(bias.from(first)),
            kept.data(), static_cast<int64_t>(kept.size()),
            fitted.queries.as<float>() + head * sizes["R"] * sizes["D"], sizes["R"], mFitValues, moved[1].to(),
            codes ? static_cast<float*>(moved[3].to()) : nullptr, static_cast<float*>(bias.to(first))});
    }

    Element mElement;
    bool mFitted, mFitValues;
};
} // namespace

std::vector<std::unique_ptr<Operator>> compactCacheOperators()
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
        for (bool fitted : {false, true})
        {
            std::string name = "CompactCache";
            Types inputs{type, type, kFloat, kLong}, outputs{type, type, kFloat, kLong};
            if (fitted)
            {
                name += "_fitted";
                inputs.insert(inputs.end(), {kLong, kLong, kFloat, kFloat});
            }
            if (element == Element::kInt8)
            {
                name += "_int8";
                inputs.insert(inputs.end(), {kFloat, kFloat});
                outputs.insert(outputs.end(), {kFloat, kFloat});
            }
            operators.push_back(makeOperator<CompactCacheKernel>(
                name, inputs, outputs, static_cast<int64_t>(element) + (fitted ? kFitted : 0)));
        }
    }
    return operators;
}
} // namespace semkv::native
