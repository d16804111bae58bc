// CompactCache as a TensorRT plugin. See README.md.
#pragma once

#include "../common/operator_plugin.h"

namespace semkv
{
class CompactCachePlugin final : public OperatorPlugin
{
public:
    CompactCachePlugin();
    static OperatorContract const& contract();
    nvinfer1::IPluginV3* clone() noexcept override;

private:
    bool attributesValid() const override;
    bool sizesSupported(Sizes const& sizes) const override;
    size_t workspaceBytes(Sizes const& sizes, Element element) const override;
    cudaError_t run(Call const& call) const override;
};
} // namespace semkv
