// SemanticBlockSelect as a TensorRT plugin. See README.md.
#pragma once

#include "../common/operator_plugin.h"

namespace semkv
{
class SemanticBlockSelectPlugin final : public OperatorPluginOf<SemanticBlockSelectPlugin>
{
public:
    static OperatorContract const& contract();

private:
    bool attributesValid() const override;
    bool sizesSupported(Sizes const& sizes) const override;
    size_t workspaceBytes(Sizes const& sizes, Element element) const override;
    cudaError_t run(Call const& call) const override;
};
} // namespace semkv
