// What the semkv plugins share: an operator's contract as data, and an IPluginV3 that does everything a contract
// determines (types, formats, output shapes, size checks, fields, clone, aliasing). A plugin adds its contract, the sizes it
// supports, its workspace and its launch.
#pragma once

#include "element.h"

#include <NvInferRuntime.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace semkv
{
constexpr char const* kNamespace = "semkv";
constexpr char const* kVersion = "1";

// Writes one line to TensorRT's logger (standard error before one is known).
void logLine(nvinfer1::ILogger::Severity severity, std::string const& text);
void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

enum class TensorType
{
    kCache, // float32, float16 or bfloat16; one choice for a whole node
    kFloat32,
    kInt64,
    kInt8, // with an option only
    kFp8,  // with an option only
};

struct TensorContract
{
    char const* name;
    char const* shape; // names of the dimensions, as in semkv_deploy/ops: "B,Hkv,C,D"
                       // one of an output that is named like an attribute has its value
    TensorType type;
    int32_t aliasOf{-1}; // outputs only: input that this output is written in place of
};

struct AttributeContract
{
    char const* name;
    nvinfer1::PluginFieldType type; // kFLOAT32 or kINT32
    double initial;
};

// What a node may have besides; it says so with an int attribute of the option's name, 1, which is among the attributes.
struct OptionContract
{
    char const* name;
    std::vector<TensorContract> inputs;  // after the operator's, in the order of the options
    std::vector<TensorContract> outputs; // aliasOf counts the option's own inputs
    TensorType type{TensorType::kCache}; // what the tensors of the next line become
    std::vector<char const*> retyped{};
};

struct OperatorContract
{
    char const* name;
    std::vector<TensorContract> inputs;
    std::vector<TensorContract> outputs;
    std::vector<AttributeContract> attributes;
    std::vector<OptionContract> options{};
};

using Sizes = std::map<std::string, int64_t>;

// Names of the dimensions of a shape like "B,Hkv,C,D".
std::vector<std::string> dimensionNames(char const* shape);

// Everything a launch needs.
struct Call
{
    Sizes sizes;
    Element element;
    void const* const* inputs;
    void* const* outputs;
    void* workspace;
    cudaStream_t stream;
};

class OperatorPlugin : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuildV2,
                       public nvinfer1::IPluginV3OneRuntime
{
public:
    explicit OperatorPlugin(OperatorContract const& contract);
    OperatorPlugin(OperatorPlugin const& other);

    // Attributes from fields. Where one is absent its default is taken when building; a plan has all of them, so that in
    // the runtime phase one is missing because the plan is another version's. Logs and returns false on a missing or an
    // unknown field, one of the wrong type or length, or a value out of range.
    bool readFields(nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase phase);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;
    int32_t getAliasedInput(int32_t outputIndex) noexcept override;
    char const* getTimingCacheID() noexcept override;

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

protected:
    double attribute(size_t index) const
    {
        return mValues[index];
    }
    // Inputs and outputs with those of the node's options.
    std::vector<TensorContract> const& inputs() const
    {
        return mInputs;
    }
    std::vector<TensorContract> const& outputs() const
    {
        return mOutputs;
    }
    // "what: expected ..., got ..." under the plugin's name, as an error. Returns false.
    bool reject(std::string const& what, std::string const& expected, std::string const& got) const;

    // The named dimensions, which are dimensions of the launch grid: at most 65535.
    bool gridSupported(Sizes const& sizes, std::vector<char const*> const& names) const;
    // Dimension D of the named input: a multiple of 8.
    bool headSizeSupported(Sizes const& sizes, char const* input) const;
    // Dimension G of the named input: one group for all KV heads or one for each.
    bool groupsSupported(Sizes const& sizes, char const* input) const;

    virtual bool attributesValid() const
    {
        return true;
    }
    virtual bool sizesSupported(Sizes const& sizes) const = 0;
    virtual size_t workspaceBytes(Sizes const&, Element) const
    {
        return 0;
    }
    virtual cudaError_t run(Call const& call) const = 0;

private:
    bool countsRight(int32_t nbInputs, int32_t nbOutputs) const;
    bool takeField(nvinfer1::PluginField const& field);
    bool collectSizes(std::vector<nvinfer1::Dims> const& dims, Sizes& sizes) const;
    void prepareFields();
    void prepareTensors();

    OperatorContract const& mContract;
    std::vector<double> mValues;
    std::vector<TensorContract> mInputs;
    std::vector<TensorContract> mOutputs;
    std::vector<float> mFloats;
    std::vector<int32_t> mInts;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
    std::string mTimingId;
};

// Base of a plugin class: `class CompactCachePlugin final : public OperatorPluginOf<CompactCachePlugin>`. The class has
// `static OperatorContract const& contract()` and the private functions above that it needs.
template <typename Plugin>
class OperatorPluginOf : public OperatorPlugin
{
public:
    OperatorPluginOf()
        : OperatorPlugin(Plugin::contract())
    {
    }
    nvinfer1::IPluginV3* clone() noexcept override
    {
        try
        {
            return new Plugin(static_cast<Plugin const&>(*this));
        }
        catch (std::exception const&)
        {
            return nullptr;
        }
    }
};

// Creator of one plugin class, which must have `static OperatorContract const& contract()`.
template <typename Plugin>
class OperatorCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    OperatorCreator()
    {
        for (AttributeContract const& attribute : Plugin::contract().attributes)
        {
            mFields.emplace_back(attribute.name, nullptr, attribute.type, 1);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }
    nvinfer1::IPluginV3* createPlugin(char const*, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override
    {
        try
        {
            auto plugin = std::make_unique<Plugin>();
            return plugin->readFields(fields, phase) ? plugin.release() : nullptr;
        }
        catch (std::exception const& error)
        {
            logLine(nvinfer1::ILogger::Severity::kERROR,
                std::string("semkv::") + Plugin::contract().name + ": " + error.what());
            return nullptr;
        }
    }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }
    char const* getPluginName() const noexcept override
    {
        return Plugin::contract().name;
    }
    char const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }
    char const* getPluginNamespace() const noexcept override
    {
        return kNamespace;
    }

private:
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};
} // namespace semkv
