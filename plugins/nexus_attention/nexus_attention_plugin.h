// NexusAttention as a TensorRT plugin. See README.md.
#pragma once

#include "../common/operator_plugin.h"
#include "nexus_attention.h"

namespace semkv
{
class NexusAttentionPlugin final : public OperatorPlugin
{
public:
    NexusAttentionPlugin();
    static OperatorContract const& contract();
    nvinfer1::IPluginV3* clone() noexcept override;

    // A tactic is the number of splits, in halves of what suits the sizes.
    int32_t getNbTactics() noexcept override;
    int32_t getValidTactics(int32_t* tactics, int32_t nbTactics) noexcept override;
    int32_t setTactic(int32_t tactic) noexcept override;

private:
    bool attributesValid() const override;
    bool sizesSupported(Sizes const& sizes) const override;
    size_t workspaceBytes(Sizes const& sizes, Element element) const override;
    cudaError_t run(Call const& call) const override;

    CacheElement cacheElement() const;
    // The launch parameters that are no pointers.
    NexusAttentionParams sizesAndAttributes(Sizes const& sizes) const;

    int32_t mSplitHalves{0};
};
} // namespace semkv
