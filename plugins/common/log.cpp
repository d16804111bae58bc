#include "operator_plugin.h"
#include "runtime_abi.h"

#include <atomic>
#include <cstdio>

using namespace nvinfer1;

namespace semkv
{
namespace
{
std::atomic<ILoggerFinder*>& loggerFinder()
{
    static std::atomic<ILoggerFinder*> finder{nullptr};
    return finder;
}
} // namespace

void setLoggerFinder(ILoggerFinder* finder)
{
    loggerFinder().store(finder);
}

void logLine(ILogger::Severity severity, std::string const& line)
{
    ILoggerFinder* const finder = loggerFinder().load();
    FunctionPlaces const places = functionPlaces(finder != nullptr ? majorOf(finder, NV_TENSORRT_MAJOR) : 0);
    void* const logger = finder != nullptr ? callVirtual<void*>(finder, places.findLogger) : nullptr;
    if (logger != nullptr)
    {
        callVirtual<void, int32_t, char const*>(logger, places.log, static_cast<int32_t>(severity), line.c_str());
    }
    else
    {
        std::fprintf(stderr, "%s\n", line.c_str());
    }
}
} // namespace semkv
