// Sizes from shapes, and the limits on them that several plugins have.
#include "operator_plugin.h"

#include <sstream>

using namespace nvinfer1;

namespace semkv
{
namespace
{
// Of any dimension: kernels count in 32 bits, sums of two sizes included.
constexpr int64_t kMostSize = int64_t{1} << 30;
constexpr int64_t kMostInGrid = 65535;

std::string text(Dims const& dims)
{
    std::string out = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        out += (i > 0 ? "," : "") + std::to_string(dims.d[i]);
    }
    return out + "]";
}

} // namespace

std::vector<std::string> dimensionNames(char const* shape)
{
    std::vector<std::string> names;
    std::istringstream stream(shape);
    for (std::string name; std::getline(stream, name, ',');)
    {
        names.push_back(name);
    }
    return names;
}

bool OperatorPlugin::countsRight(int32_t nbInputs, int32_t nbOutputs) const
{
    if (nbInputs == static_cast<int32_t>(mInputs.size()) && nbOutputs == getNbOutputs())
    {
        return true;
    }
    std::string options;
    for (OptionContract const& option : mContract.options)
    {
        for (size_t i = 0; i < mValues.size(); ++i)
        {
            if (mValues[i] != 0.0 && std::string(mContract.attributes[i].name) == option.name)
            {
                options += (options.empty() ? "" : ", ") + std::string(option.name);
            }
        }
    }
    std::string const with = mContract.options.empty() ? ""
        : options.empty()                              ? " without options"
                                                       : " with " + options;
    return reject("number of inputs and outputs",
        std::to_string(mInputs.size()) + " and " + std::to_string(mOutputs.size()) + with,
        std::to_string(nbInputs) + " and " + std::to_string(nbOutputs));
}

bool OperatorPlugin::collectSizes(std::vector<Dims> const& dims, Sizes& sizes) const
{
    if (!countsRight(static_cast<int32_t>(dims.size()), getNbOutputs()))
    {
        return false;
    }
    for (size_t i = 0; i < dims.size(); ++i)
    {
        TensorContract const& tensor = mInputs[i];
        std::vector<std::string> const names = dimensionNames(tensor.shape);
        std::string const what = std::string("input ") + tensor.name;
        if (dims[i].nbDims != static_cast<int32_t>(names.size()))
        {
            return reject(what, std::string("shape [") + tensor.shape + "]", text(dims[i]));
        }
        for (size_t d = 0; d < names.size(); ++d)
        {
            int64_t const size = dims[i].d[d];
            if (size > kMostSize)
            {
                return reject(what + " dimension " + names[d], "at most " + std::to_string(kMostSize),
                    std::to_string(size));
            }
            auto const known = sizes.emplace(names[d], size).first;
            if (known->second < 0)
            {
                known->second = size;
            }
            if (size >= 0 && known->second != size)
            {
                return reject(what + " dimension " + names[d],
                    std::to_string(known->second) + " as in the inputs before it", std::to_string(size));
            }
        }
    }
    return true;
}

bool OperatorPlugin::gridSupported(Sizes const& sizes, std::vector<char const*> const& names) const
{
    for (char const* const name : names)
    {
        if (sizes.at(name) > kMostInGrid)
        {
            return reject(std::string("dimension ") + name, "at most " + std::to_string(kMostInGrid),
                std::to_string(sizes.at(name)));
        }
    }
    return true;
}

bool OperatorPlugin::headSizeSupported(Sizes const& sizes, char const* input) const
{
    int64_t const size = sizes.at("D");
    return size < 0 || (size > 0 && size % 8 == 0)
        || reject(std::string("input ") + input + " dimension D", "a multiple of 8", std::to_string(size));
}

bool OperatorPlugin::groupsSupported(Sizes const& sizes, char const* input) const
{
    int64_t const groups = sizes.at("G");
    int64_t const heads = sizes.at("H");
    return groups < 0 || heads < 0 || groups == 1 || groups == heads
        || reject(std::string("input ") + input + " dimension G", "1 or H = " + std::to_string(heads),
            std::to_string(groups));
}
} // namespace semkv
