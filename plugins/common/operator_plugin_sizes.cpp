// Limits on sizes that several plugins have.
#include "operator_plugin.h"

namespace semkv
{
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
