// libtriton_semkv.so: Triton's C++ backend `semkv`. One model is one bundle, one session of some rows, and one
// scheduler; requests become turns, and tokens become responses (decoupled).
#include "scheduler/scheduler.h"
#include "text/texts.h"
#include "triton/api.h"
#include "triton/metrics.h"
#include "triton/parameters.h"
#include "triton/request.h"
#include "triton/responses.h"

#include <nlohmann/json.hpp>

#include <condition_variable>
#include <mutex>
#include <thread>

using namespace semkv::runtime;

namespace
{
constexpr std::chrono::milliseconds kUpdate{50}; // between updates of metrics

void warn(std::string const& text)
{
    TRITONSERVER_ErrorDelete(TRITONSERVER_LogMessage(kTritonLogWarn, __FILE__, __LINE__, text.c_str()));
}

// The bundle's texts. Where none can be had, sessions are in tokens alone, and a turn in texts is told why: but not where
// the library was named, which is to load then.
std::shared_ptr<semkv::text::Texts const> openTexts(
    Bundle const& bundle, std::string const& genai, std::string const& onnxruntime)
{
    auto const without = [&](Error const& error) {
        if (error.code() != SEMKV_NO_TARGET || !genai.empty())
        {
            throw error;
        }
        warn(std::string("texts are refused: ") + error.what());
    };
    std::shared_ptr<semkv::text::Texts> texts;
    try
    {
        texts = std::make_shared<semkv::text::Texts>(semkv::text::tokenizerFiles(
            bundle.text(), [&](std::string const& name) { return bundle.read(name); }));
    }
    catch (Error const& error)
    {
        without(error);
        return std::make_shared<semkv::text::Texts>(error);
    }
    try
    {
        texts->load(genai, onnxruntime);
    }
    catch (Error const& error)
    {
        without(error);
    }
    return texts;
}

class Model
{
public:
    explicit Model(TRITONBACKEND_Model* model)
    {
        TRITONSERVER_Message* message = nullptr;
        checkTriton(TRITONBACKEND_ModelConfig(model, 1, &message), "config.pbtxt");
        char const* text = nullptr;
        size_t bytes = 0;
        checkTriton(TRITONSERVER_MessageSerializeToJson(message, &text, &bytes), "config.pbtxt");
        nlohmann::json const config = nlohmann::json::parse(text, text + bytes);
        TRITONSERVER_ErrorDelete(TRITONSERVER_MessageDelete(message));
        int32_t kind = 0;
        char const* location = nullptr;
        checkTriton(TRITONBACKEND_ModelRepository(model, &kind, &location), "repository");
        uint64_t version = 0;
        checkTriton(TRITONBACKEND_ModelVersion(model, &version), "repository");
        if (!config.value("model_transaction_policy", nlohmann::json::object()).value("decoupled", false))
        {
            throw Error(SEMKV_BAD_ARGUMENT, "responses are streamed")
                .where("config.pbtxt")
                .expected("model_transaction_policy { decoupled: true }")
                .fix("write the model with `semkv-deploy triton --backend cpp`");
        }
        open(config, std::string(location) + "/" + std::to_string(version) + "/bundle");
        mMetrics = std::make_unique<Metrics>(config.value("name", ""), std::to_string(version));
        mUpdates = std::thread([this] { update(); });
    }

    ~Model()
    {
        {
            std::lock_guard<std::mutex> const guard(mLock);
            mEnding = true;
            mChanged.notify_all();
        }
        mUpdates.join();
    }

    void begin(TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request* request)
    {
        auto responses = std::make_unique<Responses>(instance, request);
        Asked asked;
        try
        {
            asked = readRequest(request, mScheduler->texts(), mScheduler->maxNewTokens());
        }
        catch (Error const& error)
        {
            bool const invalid = error.code() == SEMKV_BAD_ARGUMENT || error.code() == SEMKV_NO_TARGET;
            Failure const failure{invalid ? Fault::kInvalid : Fault::kFailed, error.what()};
            responses->finished({Reason::kError, 0, 0, failure});
            return;
        }
        if (!asked.request)
        {
            mScheduler->endSession(asked.session);
            responses->ended();
            return;
        }
        responses->stream(asked.stream);
        mScheduler->submit(asked.session, std::move(*asked.request), std::move(responses));
    }

private:
    void open(nlohmann::json const& config, std::string const& path)
    {
        Parameters given(config);
        RuntimeOptions runtime;
        runtime.target = given.text("target", "onnxruntime-cpu");
        runtime.onnxruntime = given.text("onnxruntime");
        runtime.nativeLibrary = given.text("native_library");
        runtime.nativeSha256 = given.text("native_sha256");
        runtime.tensorrt = given.text("tensorrt");
        runtime.cudart = given.text("cudart");
        std::string const genai = given.text("genai");
        runtime.allowPlugins = given.flag("allow_plugins");
        double const budget = given.number("budget", 0, 0);
        int64_t const rows = given.integer("rows", 4, 1), threads = given.integer("threads", 0, 0);
        SchedulerOptions options;
        options.idleSeconds = given.number("idle_seconds", options.idleSeconds, 0);
        options.waitSeconds = given.number("wait_seconds", options.waitSeconds, 0);
        options.maxWaiting = given.integer("max_waiting", options.maxWaiting, 1);
        options.maxSessions = given.integer("max_sessions", options.maxSessions, 1);
        options.maxTokens = given.integer("max_tokens", 0, 1);
        options.saveSessions = given.text("save_sessions");
        options.shareSessions = given.flag("share_sessions");
        if (options.shareSessions && options.saveSessions.empty())
        {
            throw Error(SEMKV_BAD_ARGUMENT, "sessions are shared in a folder")
                .where("config.pbtxt, parameter share_sessions")
                .fix("give save_sessions as well");
        }
        options.warn = warn;
        given.checkEmpty();
        checkTarget(runtime.target);
        auto const bundle = std::make_shared<Bundle const>(path, runtime.target, false);
        auto const contract = bundle->contract(budget);
        if (rows != contract->batch.value_or(rows))
        {
            throw Error(SEMKV_BAD_ARGUMENT, "the graphs take another batch")
                .where("config.pbtxt, parameter rows")
                .expected(std::to_string(*contract->batch))
                .got(std::to_string(rows));
        }
        auto engine = openEngine(bundle, runtime, contract, rows, threads);
        auto texts = openTexts(*bundle, genai, runtime.onnxruntime);
        mScheduler = std::make_unique<Scheduler>(
            std::make_unique<Session>(bundle, std::move(engine)), std::move(texts), options);
    }

    void update()
    {
        std::unique_lock<std::mutex> lock(mLock);
        while (!mEnding)
        {
            mChanged.wait_for(lock, kUpdate);
            try
            {
                mMetrics->update(mScheduler->statistics());
            }
            catch (std::exception const& error)
            {
                // A server without metrics takes none, which costs nobody a reply: said once.
                TRITONSERVER_ErrorDelete(TRITONSERVER_LogMessage(kTritonLogError, __FILE__, __LINE__, error.what()));
                return;
            }
        }
    }

    std::unique_ptr<Scheduler> mScheduler;
    std::unique_ptr<Metrics> mMetrics;
    std::mutex mLock;
    std::condition_variable mChanged;
    bool mEnding = false;
    std::thread mUpdates; // last: it begins when all else is there
};

// Nothing is thrown across Triton's interface.
template <class Code>
TRITONSERVER_Error* guarded(Code const& code)
{
    try
    {
        code();
        return nullptr;
    }
    catch (Error const& error)
    {
        return TRITONSERVER_ErrorNew(
            error.code() == SEMKV_BAD_ARGUMENT ? kTritonInvalid : kTritonInternal, error.what());
    }
    catch (std::exception const& error)
    {
        return TRITONSERVER_ErrorNew(kTritonInternal, error.what());
    }
}

Model* modelOf(TRITONBACKEND_ModelInstance* instance)
{
    TRITONBACKEND_Model* model = nullptr;
    checkTriton(TRITONBACKEND_ModelInstanceModel(instance, &model), "instance");
    void* state = nullptr;
    checkTriton(TRITONBACKEND_ModelState(model, &state), "instance");
    return static_cast<Model*>(state);
}
} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT TRITONSERVER_Error* TRITONBACKEND_Initialize(TRITONBACKEND_Backend*)
{
    return guarded([] {
        uint32_t major = 0, minor = 0;
        checkTriton(TRITONBACKEND_ApiVersion(&major, &minor), "backend semkv");
        if (major != kTritonMajor || minor < kTritonMinor)
        {
            throw Error(SEMKV_NO_TARGET, "another version of Triton's backend interface")
                .where("backend semkv")
                .expected(std::to_string(kTritonMajor) + "." + std::to_string(kTritonMinor) + " or a later minor one")
                .got(std::to_string(major) + "." + std::to_string(minor))
                .fix("use Triton 2.51 or newer");
        }
    });
}

EXPORT TRITONSERVER_Error* TRITONBACKEND_ModelInitialize(TRITONBACKEND_Model* model)
{
    return guarded([&] {
        auto made = std::make_unique<Model>(model);
        checkTriton(TRITONBACKEND_ModelSetState(model, made.get()), "model");
        made.release();
    });
}

EXPORT TRITONSERVER_Error* TRITONBACKEND_ModelFinalize(TRITONBACKEND_Model* model)
{
    return guarded([&] {
        void* state = nullptr;
        checkTriton(TRITONBACKEND_ModelState(model, &state), "model");
        delete static_cast<Model*>(state);
    });
}

EXPORT TRITONSERVER_Error* TRITONBACKEND_ModelInstanceExecute(
    TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request** requests, uint32_t count)
{
    return guarded([&] {
        Model* const model = modelOf(instance);
        // From here on each request is answered and released by its responses, whatever becomes of it.
        for (uint32_t i = 0; i < count; ++i)
        {
            model->begin(instance, requests[i]);
        }
    });
}
