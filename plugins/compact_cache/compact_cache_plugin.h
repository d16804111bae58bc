// CompactCache as a TensorRT plugin. See README.md.
#pragma once

#include "../common/operator_plugin.h"

namespace semkv
{
class CompactCachePlugin final : public OperatorPluginOf<CompactCachePlugin>
{
public:
    static OperatorContract const& contract();

private:
    bool sizesSupported(Sizes const& sizes) const override;
    size_t workspaceBytes(Sizes const& sizes, Element element) const override;
    cudaError_t run(Call const& call) const override;
};
} // namespace semkv
