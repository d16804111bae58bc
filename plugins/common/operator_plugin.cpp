#include "operator_plugin.h"

#include <exception>

using namespace nvinfer1;

namespace semkv
{
namespace
{
std::string typeName(DataType type)
{
    switch (type)
    {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kBOOL: return "bool";
    case DataType::kUINT8: return "uint8";
    case DataType::kFP8: return "fp8";
    default: return "type " + std::to_string(static_cast<int32_t>(type));
    }
}

bool isCacheType(DataType type)
{
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

Element elementOf(DataType type)
{
    return type == DataType::kHALF ? Element::kFloat16
        : type == DataType::kBF16  ? Element::kBFloat16
                                   : Element::kFloat32;
}

size_t firstCacheInput(std::vector<TensorContract> const& inputs)
{
    size_t index = 0;
    while (inputs[index].type != TensorType::kCache)
    {
        ++index;
    }
    return index;
}

DataType requiredType(TensorContract const& tensor, DataType cacheType)
{
    switch (tensor.type)
    {
    case TensorType::kCache: return cacheType;
    case TensorType::kFloat32: return DataType::kFLOAT;
    case TensorType::kInt64: return DataType::kINT64;
    case TensorType::kInt8: return DataType::kINT8;
    case TensorType::kFp8: return DataType::kFP8;
    }
    return DataType::kFLOAT;
}

// No exception may cross into TensorRT.
template <typename Result, typename Function>
Result guarded(OperatorContract const& contract, Result failed, Function const& function) noexcept
{
    try
    {
        return function();
    }
    catch (std::exception const& error)
    {
        logLine(ILogger::Severity::kERROR, std::string("semkv::") + contract.name + ": " + error.what());
        return failed;
    }
}
} // namespace

OperatorPlugin::OperatorPlugin(OperatorContract const& contract)
    : mContract(contract)
{
    for (AttributeContract const& attribute : contract.attributes)
    {
        mValues.push_back(attribute.initial);
    }
    prepareFields();
}

OperatorPlugin::OperatorPlugin(OperatorPlugin const& other)
    : IPluginV3(other)
    , IPluginV3OneCore(other)
    , IPluginV3OneBuildV2(other)
    , IPluginV3OneRuntime(other)
    , mContract(other.mContract)
    , mValues(other.mValues)
{
    prepareFields();
}

bool OperatorPlugin::reject(std::string const& what, std::string const& expected, std::string const& got) const
{
    logLine(ILogger::Severity::kERROR,
        std::string("semkv::") + mContract.name + ": " + what + ": expected " + expected + ", got " + got);
    return false;
}

IPluginCapability* OperatorPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuildV2*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

char const* OperatorPlugin::getPluginName() const noexcept
{
    return mContract.name;
}

char const* OperatorPlugin::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* OperatorPlugin::getPluginNamespace() const noexcept
{
    return kNamespace;
}

int32_t OperatorPlugin::getNbOutputs() const noexcept
{
    return static_cast<int32_t>(mOutputs.size());
}

int32_t OperatorPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    return guarded(mContract, -1, [&] {
        if (!countsRight(nbInputs, nbOutputs))
        {
            return -1;
        }
        size_t const first = firstCacheInput(mInputs);
        DataType const cacheType = inputTypes[first];
        if (!isCacheType(cacheType))
        {
            reject(std::string("input ") + mInputs[first].name, "float32, float16 or bfloat16",
                typeName(cacheType));
            return -1;
        }
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            TensorContract const& tensor = mInputs[static_cast<size_t>(i)];
            DataType const required = requiredType(tensor, cacheType);
            if (inputTypes[i] != required)
            {
                reject(std::string("input ") + tensor.name, typeName(required), typeName(inputTypes[i]));
                return -1;
            }
        }
        for (int32_t i = 0; i < nbOutputs; ++i)
        {
            outputTypes[i] = requiredType(mOutputs[static_cast<size_t>(i)], cacheType);
        }
        return 0;
    });
}

int32_t OperatorPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& builder) noexcept
{
    return guarded(mContract, -1, [&] {
        if (!countsRight(nbInputs, nbOutputs))
        {
            return -1;
        }
        std::map<std::string, IDimensionExpr const*> known;
        std::vector<Dims> constants;
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            Dims dims{};
            dims.nbDims = inputs[i].nbDims;
            std::vector<std::string> const names
                = dimensionNames(mInputs[static_cast<size_t>(i)].shape);
            for (int32_t d = 0; d < dims.nbDims; ++d)
            {
                bool const constant = inputs[i].d[d]->isConstant();
                dims.d[d] = constant ? inputs[i].d[d]->getConstantValue() : -1;
                if (static_cast<size_t>(d) < names.size())
                {
                    auto const slot = known.emplace(names[static_cast<size_t>(d)], inputs[i].d[d]).first;
                    slot->second = constant ? inputs[i].d[d] : slot->second;
                }
            }
            constants.push_back(dims);
        }
        Sizes sizes;
        if (!collectSizes(constants, sizes) || !sizesSupported(sizes))
        {
            return -1;
        }
        for (size_t i = 0; i < mContract.attributes.size(); ++i)
        {
            known[mContract.attributes[i].name] = builder.constant(static_cast<int64_t>(attribute(i)));
        }
        for (int32_t i = 0; i < nbOutputs; ++i)
        {
            std::vector<std::string> const names
                = dimensionNames(mOutputs[static_cast<size_t>(i)].shape);
            outputs[i].nbDims = static_cast<int32_t>(names.size());
            for (size_t d = 0; d < names.size(); ++d)
            {
                outputs[i].d[d] = known.at(names[d]);
            }
        }
        return 0;
    });
}

bool OperatorPlugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    size_t const position = static_cast<size_t>(pos);
    if (nbInputs != static_cast<int32_t>(mInputs.size()) || nbOutputs != getNbOutputs() || pos < 0
        || pos >= nbInputs + nbOutputs || inOut[pos].desc.format != TensorFormat::kLINEAR)
    {
        return false;
    }
    TensorContract const& tensor = position < mInputs.size()
        ? mInputs[position]
        : mOutputs[position - mInputs.size()];
    size_t const first = firstCacheInput(mInputs);
    DataType const type = inOut[pos].desc.type;
    if (position == first)
    {
        return isCacheType(type);
    }
    if (tensor.type == TensorType::kCache && position < first)
    {
        return false;
    }
    return type == requiredType(tensor, position > first ? inOut[first].desc.type : DataType::kFLOAT);
}

int32_t OperatorPlugin::configurePlugin(
    DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) noexcept
{
    return guarded(mContract, -1, [&] {
        for (Dims DynamicPluginTensorDesc::*bound :
            {&DynamicPluginTensorDesc::min, &DynamicPluginTensorDesc::opt, &DynamicPluginTensorDesc::max})
        {
            std::vector<Dims> dims;
            for (int32_t i = 0; i < nbInputs; ++i)
            {
                dims.push_back(in[i].*bound);
            }
            Sizes sizes;
            if (!collectSizes(dims, sizes) || !sizesSupported(sizes))
            {
                return -1;
            }
        }
        return 0;
    });
}

size_t OperatorPlugin::getWorkspaceSize(
    DynamicPluginTensorDesc const* inputs, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) const noexcept
{
    return guarded(mContract, size_t{0}, [&]() -> size_t {
        std::vector<Dims> dims;
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            dims.push_back(inputs[i].max);
        }
        Sizes sizes;
        return collectSizes(dims, sizes)
            ? workspaceBytes(sizes, elementOf(inputs[firstCacheInput(mInputs)].desc.type))
            : 0;
    });
}

int32_t OperatorPlugin::getAliasedInput(int32_t outputIndex) noexcept
{
    return outputIndex >= 0 && outputIndex < getNbOutputs()
        ? mOutputs[static_cast<size_t>(outputIndex)].aliasOf
        : -1;
}

char const* OperatorPlugin::getTimingCacheID() noexcept
{
    return mTimingId.c_str();
}

int32_t OperatorPlugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t) noexcept
{
    return guarded(mContract, -1, [&] {
        std::vector<Dims> dims;
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            dims.push_back(in[i].dims);
        }
        Sizes sizes;
        return collectSizes(dims, sizes) && sizesSupported(sizes) ? 0 : -1;
    });
}

int32_t OperatorPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    return guarded(mContract, -1, [&] {
        std::vector<Dims> dims;
        for (size_t i = 0; i < mInputs.size(); ++i)
        {
            dims.push_back(inputDesc[i].dims);
        }
        Call call{};
        if (!collectSizes(dims, call.sizes))
        {
            return -1;
        }
        call.element = elementOf(inputDesc[firstCacheInput(mInputs)].type);
        call.inputs = inputs;
        call.outputs = outputs;
        call.workspace = workspace;
        call.stream = stream;
        cudaError_t const error = run(call);
        if (error != cudaSuccess)
        {
            reject("launch", "success", cudaGetErrorString(error));
            return -1;
        }
        return 0;
    });
}

IPluginV3* OperatorPlugin::attachToContext(IPluginResourceContext*) noexcept
{
    return clone();
}

PluginFieldCollection const* OperatorPlugin::getFieldsToSerialize() noexcept
{
    return &mCollection;
}
} // namespace semkv
