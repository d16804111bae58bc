#include "engine/onnxruntime/ort_engine.h"

namespace semkv::runtime
{
void checkTarget(std::string const& target)
{
    if (target != "onnxruntime-cpu")
    {
        throw Error(SEMKV_NO_TARGET, "this library does not run the target")
            .where("target")
            .expected("onnxruntime-cpu")
            .got(target)
            .fix("open the bundle for onnxruntime-cpu, or use the Python package");
    }
}

std::unique_ptr<Engine> openEngine(std::shared_ptr<Bundle const> const& bundle, RuntimeOptions const& options,
    std::shared_ptr<Contract const> contract, int64_t batch, int64_t threads)
{
    checkTarget(contract->target);
    return std::make_unique<OrtEngine>(bundle, options, std::move(contract), batch, threads);
}
} // namespace semkv::runtime
