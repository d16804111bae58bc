// What ONNX Runtime calls when it loads the library.
#include "compact_cache/operator.h"
#include "nexus_attention/nexus_attention.h"
#include "nexus_attention/operator.h"
#include "ort/api.h"
#include "semantic_block_map/operator.h"
#include "semantic_block_select/operator.h"
#include "semantic_cluster/operator.h"

#include <iterator>

#define SEMKV_EXPORT extern "C" __attribute__((visibility("default")))

namespace
{
using namespace semkv::native;

std::vector<std::unique_ptr<Operator>>& operators()
{
    // Never freed: sessions may outlive static objects.
    static auto* all = [] {
        auto* made = new std::vector<std::unique_ptr<Operator>>(nexusAttentionOperators());
        for (auto&& more :
            {compactCacheOperators, semanticClusterOperators, semanticBlockMapOperators, semanticBlockSelectOperators})
        {
            auto some = more();
            std::move(some.begin(), some.end(), std::back_inserter(*made));
        }
        return made;
    }();
    return *all;
}
} // namespace

// Grows whenever graphs may name operators that libraries before do not have, or would mean something else by one.
SEMKV_EXPORT int semkv_onnxruntime_version()
{
    return 2;
}

// The instruction set that kernels run on here.
SEMKV_EXPORT char const* semkv_onnxruntime_simd()
{
    return nexusAttentionTarget();
}

SEMKV_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, OrtApiBase const* base)
{
    OrtApi const* api = base->GetApi(kOrtVersion);
    if (api == nullptr)
    {
        return base->GetApi(1)->CreateStatus(
            ORT_FAIL, "libsemkv_onnxruntime: expected ONNX Runtime 1.17 or newer, got an older one: update it");
    }
    setOrt(*api);
    return guarded([&] {
        // One domain for all sessions, made once; ONNX Runtime keeps what it needs of it.
        static OrtCustomOpDomain* const domain = [] {
            OrtCustomOpDomain* made = nullptr;
            check(ort().CreateCustomOpDomain("semkv", &made));
            for (auto const& op : operators())
            {
                check(ort().CustomOpDomain_Add(made, op.get()));
            }
            return made;
        }();
        check(ort().AddCustomOpDomain(options, domain));
    });
}
