#include "engine/tensorrt/plan.h"

#include <cstring>

namespace semkv::runtime
{
namespace
{
constexpr size_t kHeaderBytes = 28; // a tag, at 16 the number of bytes (TensorRT-RTX), at 24 the version
} // namespace

void checkPlan(PrivateCopy const& plan, std::string const& path, TrtLibrary const& library)
{
    char const* const rebuild = "build the bundle again, or copy it again from where it was built";
    std::string const tag(plan.data(), plan.size() < kHeaderBytes ? 0 : 4);
    if (tag != "ftrt" && tag != "vtrt")
    {
        throw Error(SEMKV_ALTERED_FILE, "not a TensorRT plan").where(path).fix(rebuild);
    }
    std::string version;
    for (size_t i = 24; i < kHeaderBytes; ++i)
    {
        version += (i > 24 ? "." : "") + std::to_string(static_cast<unsigned char>(plan.data()[i]));
    }
    std::string const target = tag == "vtrt" ? "tensorrt-rtx" : "tensorrt";
    if (titleOf(target) != library.title())
    {
        throw Error(SEMKV_NO_TARGET, "the engine was built by another runtime")
            .where(path)
            .expected(library.title())
            .got(titleOf(target) + " " + version)
            .fix("open the bundle for " + target);
    }
    uint64_t size = 0;
    std::memcpy(&size, plan.data() + 16, sizeof(size));
    if (tag == "vtrt" && size != plan.size())
    {
        throw Error(SEMKV_ALTERED_FILE, "the engine is truncated or altered")
            .where(path)
            .expected(std::to_string(size) + " bytes")
            .got(std::to_string(plan.size()) + " bytes")
            .fix(rebuild);
    }
    if (version != library.version())
    {
        throw Error(SEMKV_NO_TARGET, "the engine needs the version of " + library.title() + " that built it")
            .where(path)
            .expected(version)
            .got(library.version())
            .fix("give that version's library, or build the engine again with this one");
    }
}
} // namespace semkv::runtime
