#include "triton/metrics.h"

#include "triton/request.h"

namespace semkv::runtime
{
Metrics::Metrics(std::string model, std::string version)
    : mModel(std::move(model))
    , mVersion(std::move(version))
{
}

void Metrics::update(Statistics const& now)
{
    count("semkv_prompt_tokens_total", static_cast<double>(now.promptTokens));
    count("semkv_new_tokens_total", static_cast<double>(now.newTokens));
    count("semkv_turns_total", static_cast<double>(now.turns));
    count("semkv_cancelled_total", static_cast<double>(now.cancelled));
    count("semkv_failed_total", static_cast<double>(now.failed));
    count("semkv_refused_total", static_cast<double>(now.refused));
    count("semkv_evicted_total", static_cast<double>(now.evicted));
    count("semkv_not_saved_total", static_cast<double>(now.notSaved));
    count("semkv_compressions_total", static_cast<double>(now.compressions));
    count("semkv_compress_seconds_total", now.compressSeconds);
    count("semkv_time_to_first_token_seconds_sum", now.firstTokenSeconds);
    count("semkv_time_to_first_token_seconds_count", static_cast<double>(now.firstTokens));
    count("semkv_time_per_output_token_seconds_sum", now.betweenTokensSeconds);
    count("semkv_time_per_output_token_seconds_count", static_cast<double>(now.betweenTokens));
    hold("semkv_sessions", now.sessions);
    hold("semkv_rows_used", now.rowsUsed);
    hold("semkv_rows", now.rows);
    hold("semkv_running", now.running);
    hold("semkv_waiting", now.waiting);
    hold("semkv_cache_bytes", now.cacheBytes);
}

Metrics::Metric& Metrics::of(char const* name, int32_t kind)
{
    Metric& made = mMetrics[name];
    if (made.metric == nullptr)
    {
        TRITONSERVER_MetricFamily* family = nullptr;
        checkTriton(TRITONSERVER_MetricFamilyNew(&family, kind, name, name), name);
        made.family.reset(family, [](auto* each) { TRITONSERVER_ErrorDelete(TRITONSERVER_MetricFamilyDelete(each)); });
        TRITONSERVER_Parameter const* labels[]{
            TRITONSERVER_ParameterNew("model", kTritonString, mModel.c_str()),
            TRITONSERVER_ParameterNew("version", kTritonString, mVersion.c_str())};
        TRITONSERVER_Metric* metric = nullptr;
        TRITONSERVER_Error* const error = TRITONSERVER_MetricNew(&metric, family, labels, 2);
        for (TRITONSERVER_Parameter const* label : labels)
        {
            TRITONSERVER_ParameterDelete(const_cast<TRITONSERVER_Parameter*>(label));
        }
        checkTriton(error, name);
        made.metric.reset(metric, [](auto* each) { TRITONSERVER_ErrorDelete(TRITONSERVER_MetricDelete(each)); });
    }
    return made;
}

void Metrics::count(char const* name, double value)
{
    Metric& metric = of(name, kTritonCounter);
    if (value > metric.value)
    {
        checkTriton(TRITONSERVER_MetricIncrement(metric.metric.get(), value - metric.value), name);
        metric.value = value;
    }
}

void Metrics::hold(char const* name, int64_t value)
{
    checkTriton(TRITONSERVER_MetricSet(of(name, kTritonGauge).metric.get(), static_cast<double>(value)), name);
}
} // namespace semkv::runtime
