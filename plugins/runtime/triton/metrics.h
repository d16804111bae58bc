// A scheduler's numbers as Triton's custom metrics, by the names that the Python backend gives them.
#pragma once

#include "scheduler/scheduler.h"
#include "triton/api.h"

#include <map>
#include <memory>
#include <string>

namespace semkv::runtime
{
class Metrics
{
public:
    Metrics(std::string model, std::string version);

    // Gives Triton the numbers as they are now. Throws where Triton takes none.
    void update(Statistics const& now);

private:
    struct Metric
    {
        std::shared_ptr<TRITONSERVER_MetricFamily> family;
        std::shared_ptr<TRITONSERVER_Metric> metric; // before its family
        double value = 0;
    };

    Metric& of(char const* name, int32_t kind);
    void count(char const* name, double value);
    void hold(char const* name, int64_t value);

    std::string mModel, mVersion;
    std::map<std::string, Metric> mMetrics;
};
} // namespace semkv::runtime
