// What ONNX Runtime calls when it loads the library.
#include "operators.h"

#include "../onnxruntime/ort/library.h"

#include <cuda_runtime_api.h>

#include <iterator>

namespace semkv::native
{
// Emulated, the same operators run on a CPU's memory: for tests, where there is no GPU.
#if defined(SEMKV_EMULATED)
char const* const kProvider = "CPUExecutionProvider";
#else
char const* const kProvider = "CUDAExecutionProvider";
#endif
} // namespace semkv::native

namespace
{
// KernelContext_GetScratchBuffer came with it.
constexpr uint32_t kCudaOrtVersion = 18;

semkv::ort_cuda::Operators operators()
{
    using namespace semkv::ort_cuda;
    Operators made = nexusAttentionOperators();
    for (auto&& more : {compactCacheOperators, semanticClusterOperators, semanticBlockMapOperators,
             semanticBlockSelectOperators, refusedOperators})
    {
        Operators some = more();
        std::move(some.begin(), some.end(), std::back_inserter(made));
    }
    return made;
}
} // namespace

// Grows whenever graphs may name operators that libraries before do not have, or would mean something else by one.
SEMKV_EXPORT int semkv_onnxruntime_cuda_version()
{
    return 1;
}

// The execution provider that the operators are for.
SEMKV_EXPORT char const* semkv_onnxruntime_cuda_provider()
{
    return semkv::native::kProvider;
}

SEMKV_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, OrtApiBase const* base)
{
    return semkv::native::registerOperators(
        {"libsemkv_onnxruntime_cuda", kCudaOrtVersion, "1.18", operators}, options, base);
}
