// libnvinfer or libtensorrt_rtx for tests on machines without a GPU: an engine runs the graph that it was built from,
// in ONNX Runtime. As strict as the real ones: every tensor needs an address in memory that was allocated, shapes must
// lie in the active profile, both names of an alias pair need one address. What it refuses it says to the logger.
//
// $SEMKV_FAKE_VERSION: four numbers, by which its virtual tables are those of TensorRT 10 or 11, or of TensorRT-RTX 1.
// $SEMKV_FAKE_BUNDLE: the bundle whose plans it opens, $SEMKV_FAKE_TARGET: as built for that target.
// $SEMKV_FAKE_RUNS: a file to which each run adds a line: phase and profile. $SEMKV_FAKE_FAIL: what is refused:
// runtime, context, run (as text), or aliases and tensors, which an engine then has otherwise.
// $SEMKV_FAKE_PLUGINS: engines bring native code, which only a runtime that was told so opens.
#include "fake.h"

#include "bundle/bundle.h"
#include "engine/onnxruntime/graph.h"
#include "engine/tensorrt/places.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

using namespace semkv::runtime;

namespace
{
using Function = void (*)();

std::string variable(char const* name)
{
    char const* const text = std::getenv(name);
    return text != nullptr ? text : "";
}

bool fails(char const* what)
{
    return variable("SEMKV_FAKE_FAIL") == what;
}

int32_t version(int part)
{
    int32_t parts[4]{10, 14, 1, 48};
    std::sscanf(variable("SEMKV_FAKE_VERSION").c_str(), "%d.%d.%d.%d", parts, parts + 1, parts + 2, parts + 3);
    return parts[part];
}

void* gLogger = nullptr;

void say(std::string const& text)
{
    semkv::callVirtual<void, int32_t, char const*>(gLogger, semkv::functionPlaces(version(0)).log, 1, text.c_str());
}

void unexpected()
{
    std::fprintf(stderr, "a function of TensorRT's that nobody should call\n");
    std::abort();
}

// An object as the runtime gives it out, whose own table has its destructor, and its implementation's table.
template <class Implementation>
class Object
{
public:
    template <class... Arguments>
    explicit Object(Arguments&&... arguments)
        : mImplementation{sFunctions, Implementation(std::forward<Arguments>(arguments)...)}
    {
        std::fill(std::begin(sFunctions), std::end(sFunctions), unexpected);
        Implementation::fill(sFunctions, placesOf(version(0), version(1)));
    }

    // What a function of the table is called with.
    static Implementation& of(void* implementation)
    {
        return static_cast<Held*>(implementation)->implementation;
    }

private:
    struct Held
    {
        Function const* table;
        Implementation implementation;
    };

    static void destroy(Object* object)
    {
        delete object;
    }

    static inline Function const sOwn[2]{unexpected, reinterpret_cast<Function>(destroy)};
    static inline Function sFunctions[100];

    Function const* mOwn = sOwn;
    void* mGiven = &mImplementation;
    Held mImplementation;
};

struct Plan
{
    std::shared_ptr<Contract const> contract;
    Graph const* graph;
    std::shared_ptr<semkv::runtime::OrtGraph> session;
};

class Context
{
public:
    explicit Context(Plan plan)
        : mPlan(std::move(plan))
    {
    }

    static void fill(Function* table, Places const& places)
    {
        table[places.setProfile] = reinterpret_cast<Function>(setProfile);
        table[places.setShape] = reinterpret_cast<Function>(setShape);
        table[places.setAddress] = reinterpret_cast<Function>(setAddress);
        table[places.enqueue] = reinterpret_cast<Function>(enqueue);
    }

private:
    static bool setProfile(void* self, int32_t profile, void* stream)
    {
        Context& context = Object<Context>::of(self);
        context.mProfile = static_cast<size_t>(profile);
        context.mShapes.clear();
        return stream != nullptr && context.mProfile < context.mPlan.graph->profiles.size();
    }

    static bool setShape(void* self, char const* name, TrtDims const* dims)
    {
        Context& context = Object<Context>::of(self);
        TensorSpec const* const tensor = context.mPlan.graph->input(name);
        Shape const shape(dims->sizes, dims->sizes + dims->count);
        bool fits = tensor != nullptr && shape.size() == tensor->shape.size();
        for (size_t i = 0; fits && i < shape.size(); ++i)
        {
            fits = tensor->shape[i] < 0 || tensor->shape[i] == shape[i];
        }
        auto const& ranges = context.mPlan.graph->profiles.at(context.mProfile).shapes;
        auto const range = ranges.find(name);
        for (size_t i = 0; fits && range != ranges.end() && i < shape.size(); ++i)
        {
            fits = range->second.least[i] <= shape[i] && shape[i] <= range->second.most[i];
        }
        if (!fits)
        {
            say("setInputShape: " + listed(shape) + " of " + name + " is not in the profile");
        }
        context.mShapes[name] = shape;
        return fits;
    }

    static bool setAddress(void* self, char const* name, void* address)
    {
        Object<Context>::of(self).mAddresses[name] = static_cast<char*>(address);
        return true;
    }

    static bool enqueue(void* self, void* stream)
    {
        try
        {
            return stream != nullptr && Object<Context>::of(self).run();
        }
        catch (std::exception const& error)
        {
            say(error.what());
            return false;
        }
    }

    bool run()
    {
        Graph const& graph = *mPlan.graph;
        std::ofstream(variable("SEMKV_FAKE_RUNS"), std::ios::app) << graph.phase << " " << mProfile << "\n";
        if (fails("run"))
        {
            say("enqueueV3: an illegal memory access was encountered");
            return false;
        }
        for (auto const& [source, result] : graph.aliases)
        {
            if (mAddresses.at(source) != mAddresses.at(result))
            {
                throw std::runtime_error(source + " and " + result + " lie apart");
            }
        }
        OrtBinding binding(*mPlan.session);
        std::vector<Array> inputs;
        inputs.reserve(graph.inputs.size()); // views of them stay
        for (TensorSpec const& tensor : graph.inputs)
        {
            bool const open = std::find(tensor.shape.begin(), tensor.shape.end(), -1) != tensor.shape.end();
            Array& input = inputs.emplace_back(tensor.type, open ? mShapes.at(tensor.name) : tensor.shape);
            std::memcpy(input.data.data(), at(tensor.name, input.data.size()), input.data.size());
            binding.input(tensor.name, input.view());
        }
        for (TensorSpec const& tensor : graph.outputs)
        {
            binding.outputAsMade(tensor.name);
        }
        binding.run();
        for (auto const& [name, array] : binding.made())
        {
            std::memcpy(at(name, array.data.size()), array.data.data(), array.data.size());
        }
        return true;
    }

    char* at(std::string const& name, size_t bytes) const
    {
        char* const address = mAddresses.at(name);
        if (!fake_cuda_holds(address, bytes))
        {
            throw std::runtime_error(name + ": " + std::to_string(bytes) + " bytes are not all in allocated memory");
        }
        return address;
    }

    Plan mPlan;
    size_t mProfile = 0;
    std::map<std::string, Shape> mShapes;
    std::map<std::string, char*> mAddresses;
};

class Engine
{
public:
    explicit Engine(Plan plan)
        : mPlan(std::move(plan))
    {
        for (auto const* tensors : {&mPlan.graph->inputs, &mPlan.graph->outputs})
        {
            for (TensorSpec const& tensor : *tensors)
            {
                mNames.push_back(tensor.name);
            }
        }
        for (auto const& [source, result] : mPlan.graph->aliases)
        {
            mAliased[result] = source;
        }
        if (fails("tensors"))
        {
            mNames.erase(mNames.begin());
        }
        if (fails("aliases") && mAliased.size() > 1)
        {
            std::swap(mAliased.begin()->second, std::next(mAliased.begin())->second);
        }
    }

    static void fill(Function* table, Places const& places)
    {
        table[places.createContext] = reinterpret_cast<Function>(createContext);
        table[places.tensorCount] = reinterpret_cast<Function>(tensorCount);
        table[places.tensorName] = reinterpret_cast<Function>(tensorName);
        if (places.aliasedInput >= 0)
        {
            table[places.aliasedInput] = reinterpret_cast<Function>(aliasedInput);
        }
    }

private:
    static void* createContext(void* self, int32_t strategy)
    {
        bool const made = strategy == 0 && !fails("context");
        return made ? new Object<Context>(Object<Engine>::of(self).mPlan) : nullptr;
    }

    static int32_t tensorCount(void* self)
    {
        return static_cast<int32_t>(Object<Engine>::of(self).mNames.size());
    }

    static char const* tensorName(void* self, int32_t index)
    {
        return Object<Engine>::of(self).mNames.at(static_cast<size_t>(index)).c_str();
    }

    static char const* aliasedInput(void* self, char const* name)
    {
        auto const& aliased = Object<Engine>::of(self).mAliased;
        auto const found = aliased.find(name);
        return found != aliased.end() ? found->second.c_str() : nullptr;
    }

    Plan mPlan;
    std::vector<std::string> mNames;
    std::map<std::string, std::string> mAliased;
};

class Runtime
{
public:
    static void fill(Function* table, Places const& places)
    {
        table[places.hostCode] = reinterpret_cast<Function>(hostCode);
        table[places.deserialize] = reinterpret_cast<Function>(deserialize);
    }

private:
    static void hostCode(void* self, bool allowed)
    {
        Object<Runtime>::of(self).mHostCode = allowed;
    }

    static void* deserialize(void* self, void const* data, size_t bytes)
    {
        if (!variable("SEMKV_FAKE_PLUGINS").empty() && !Object<Runtime>::of(self).mHostCode)
        {
            say("the engine brings host code, which is not allowed");
            return nullptr;
        }
        static auto const* const bundle
            = new Bundle(variable("SEMKV_FAKE_BUNDLE"), variable("SEMKV_FAKE_TARGET"), false);
        auto const contract = bundle->contract(0);
        for (auto const& [name, program] : contract->programs)
        {
            for (Graph const& graph : program.graphs)
            {
                auto const plan = bundle->plan(graph.plan);
                if (plan->size() == bytes && std::memcmp(plan->data(), data, bytes) == 0)
                {
                    auto session = std::make_shared<semkv::runtime::OrtGraph>(
                        Ort::load(""), bundle->graph(graph.onnx), graph, 1, std::optional<NativeLibrary>{});
                    return new Object<Engine>(Plan{contract, &graph, session});
                }
            }
        }
        return nullptr;
    }

    bool mHostCode = false;
};
} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t getInferLibMajorVersion()
{
    return version(0);
}

EXPORT int32_t getInferLibMinorVersion()
{
    return version(1);
}

EXPORT int32_t getInferLibPatchVersion()
{
    return version(2);
}

EXPORT int32_t getInferLibBuildVersion()
{
    return version(3);
}

EXPORT int32_t getInferLibVersion()
{
    return 10000 * version(0) + 100 * version(1) + version(2);
}

EXPORT void* createInferRuntime_INTERNAL(void* logger, int32_t number)
{
    // As the real one, which goes on with the first.
    gLogger = gLogger != nullptr ? gLogger : logger;
    if (number != getInferLibVersion() || fails("runtime"))
    {
        say("CUDA initialization failure with error: 35");
        return nullptr;
    }
    return new Object<Runtime>();
}
