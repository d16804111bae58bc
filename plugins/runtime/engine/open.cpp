#include "engine/onnxruntime/ort_engine.h"
#include "engine/tensorrt/trt_engine.h"

namespace semkv::runtime
{
void checkTarget(std::string const& target)
{
    if (target != "onnxruntime-cpu" && target != "tensorrt" && target != "tensorrt-rtx")
    {
        throw Error(SEMKV_NO_TARGET, "this library does not run the target")
            .where("target")
            .expected("onnxruntime-cpu, tensorrt or tensorrt-rtx")
            .got(target)
            .fix("open the bundle for one of these, or use the Python package");
    }
}

std::unique_ptr<Engine> openEngine(std::shared_ptr<Bundle const> const& bundle, RuntimeOptions const& options,
    std::shared_ptr<Contract const> contract, int64_t batch, int64_t threads)
{
    checkTarget(contract->target);
    if (contract->target != "onnxruntime-cpu")
    {
        return std::make_unique<TrtEngine>(bundle, options, std::move(contract), batch);
    }
    return std::make_unique<OrtEngine>(bundle, options, std::move(contract), batch, threads);
}
} // namespace semkv::runtime
