// Forms that libsemkv_onnxruntime.so has and no CUDA kernel: a session with one is refused when it is made, in words,
// where ONNX Runtime would only say that there is no such operator.
#include "operators.h"

#include "device.h"

namespace semkv::ort_cuda
{
namespace
{
using Types = std::vector<ONNXTensorElementDataType>;

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kLong = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
constexpr auto kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;

enum Reason : int64_t
{
    kMixed,
    kFitted,
    kUnrotated,
    kCodes,
};

class Refused
{
public:
    Refused(int64_t reason, OrtKernelInfo const*)
    {
        switch (static_cast<Reason>(reason))
        {
        case kMixed:
            native::reject("semkv NexusAttention", "caches for the CUDA kernels", "the type of the query, or int8",
                "a narrower type: cast the rows around the node");
        case kFitted:
            native::reject("semkv CompactCache_fitted", "a form for the CUDA kernels", "CompactCache",
                "slots fitted to reference queries: fit them in standard operators, as the portable graph does");
        case kUnrotated:
            native::reject("semkv SemanticCluster_unrotated", "a form for the CUDA kernels", "SemanticCluster",
                "keys as rotated: rotate them in standard operators, as the portable graph does");
        case kCodes:
            native::reject("semkv CompactCache or SemanticCluster", "caches for the CUDA kernels",
                "float32, float16 or bfloat16", "int8");
        }
    }

    void run(native::Run const&) const {}
};

// Adds the operator with `more` inputs, and for codes their scales.
void add(Operators& operators, std::string name, Types inputs, Types outputs, Types const& more, Reason reason)
{
    inputs.insert(inputs.end(), more.begin(), more.end());
    if (inputs[0] == kInt8)
    {
        name += "_int8";
        inputs.insert(inputs.end(), 2, kFloat);
        outputs.insert(outputs.end(), 2, kFloat);
    }
    operators.push_back(native::makeOperator<Refused>(std::move(name), std::move(inputs), std::move(outputs), reason));
}
} // namespace

Operators refusedOperators()
{
    Operators operators;
    for (Element const element : {Element::kFloat16, Element::kBFloat16})
    {
        auto const cache = onnxType(element);
        for (char const* const options : {"", "_indexed", "_mass", "_indexed_mass"})
        {
            std::string const name = std::string("NexusAttention") + options;
            Types inputs{kFloat, kFloat, kFloat, cache, cache, kFloat, kLong}, outputs{kFloat, cache, cache};
            if (name.find("_indexed") != std::string::npos)
            {
                inputs.push_back(kLong);
            }
            if (name.find("_mass") != std::string::npos)
            {
                outputs.push_back(kFloat);
            }
            add(operators, name, inputs, outputs, {}, kMixed);
        }
    }
    for (auto const type : {onnxType(Element::kFloat32), onnxType(Element::kFloat16), onnxType(Element::kBFloat16), kInt8})
    {
        Types const compact{type, type, kFloat, kLong}, cluster{type, type, kFloat, kLong, kLong, kFloat, kLong};
        Types const clustered{type, type, kFloat, kLong, kLong, kLong};
        add(operators, "CompactCache_fitted", compact, compact, {kLong, kLong, kFloat, kFloat}, kFitted);
        add(operators, "SemanticCluster_unrotated", cluster, clustered, {kLong, kFloat}, kUnrotated);
        if (type == kInt8)
        {
            add(operators, "CompactCache", compact, compact, {}, kCodes);
            add(operators, "SemanticCluster", cluster, clustered, {}, kCodes);
        }
    }
    return operators;
}
} // namespace semkv::ort_cuda
