// What ONNX Runtime calls when it loads the library.
#include "ort/library.h"

#include "compact_cache/operator.h"
#include "nexus_attention/nexus_attention.h"
#include "nexus_attention/operator.h"
#include "semantic_block_map/operator.h"
#include "semantic_block_select/operator.h"
#include "semantic_cluster/operator.h"

#include <iterator>

namespace semkv::native
{
char const* const kProvider = "CPUExecutionProvider";

namespace
{
std::vector<std::unique_ptr<Operator>> operators()
{
    auto made = nexusAttentionOperators();
    for (auto&& more :
        {compactCacheOperators, semanticClusterOperators, semanticBlockMapOperators, semanticBlockSelectOperators})
    {
        auto some = more();
        std::move(some.begin(), some.end(), std::back_inserter(made));
    }
    return made;
}
} // namespace
} // namespace semkv::native

// Grows whenever graphs may name operators that libraries before do not have, or would mean something else by one.
SEMKV_EXPORT int semkv_onnxruntime_version()
{
    return 2;
}

// The instruction set that kernels run on here.
SEMKV_EXPORT char const* semkv_onnxruntime_simd()
{
    return semkv::native::nexusAttentionTarget();
}

SEMKV_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, OrtApiBase const* base)
{
    using namespace semkv::native;
    return registerOperators({"libsemkv_onnxruntime", kOrtVersion, "1.17", operators}, options, base);
}
