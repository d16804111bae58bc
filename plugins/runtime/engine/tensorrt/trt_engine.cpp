#include "engine/tensorrt/trt_engine.h"

#include <algorithm>

namespace semkv::runtime
{
namespace
{
std::string joined(std::vector<std::string> const& parts, char const* between)
{
    std::string text;
    for (std::string const& part : parts)
    {
        text += (text.empty() ? "" : between) + part;
    }
    return text;
}

// Before anything of the runtime is loaded.
void checkRecord(Bundle const& bundle, Contract const& contract, RuntimeOptions const& options)
{
    std::string const where = "target " + options.target;
    for (auto const& [name, program] : contract.programs)
    {
        for (Graph const& graph : program.graphs)
        {
            if (graph.plan.empty() || bundle.engines().version.empty())
            {
                throw Error(SEMKV_NO_TARGET, "no engines were built")
                    .where(where)
                    .fix("build the bundle without --no-engines");
            }
        }
    }
    // The manifest's word is no permission: whoever wrote the bundle wrote it. An engine whose manifest is silent about
    // its plugins is refused by TensorRT itself, which is told to run no code that an engine brings.
    std::vector<std::string> const& plugins = bundle.engines().plugins;
    if (!plugins.empty() && !options.allowPlugins)
    {
        throw Error(SEMKV_NO_TARGET, "its engines carry native code, which runs with all your rights")
            .where(where)
            .got("plugins " + joined(plugins, ", "))
            .fix("set allow_plugins if you trust who built the bundle");
    }
}

void checkGpu(Bundle const& bundle, Cuda const& cuda, std::string const& target)
{
    std::vector<int64_t> const& built = bundle.engines().capabilities;
    if (std::find(built.begin(), built.end(), cuda.computeCapability()) == built.end())
    {
        std::vector<std::string> names;
        for (int64_t const capability : built)
        {
            names.push_back("SM" + std::to_string(capability));
        }
        std::string const here = std::to_string(cuda.computeCapability());
        throw Error(SEMKV_NO_TARGET, "the engines are for other GPUs")
            .where("target " + target)
            .expected(joined(names, " or "))
            .got("SM" + here)
            .fix("build the bundle with --compute-capability " + here);
    }
}
} // namespace

TrtEngine::TrtEngine(std::shared_ptr<Bundle const> const& bundle, RuntimeOptions const& options,
    std::shared_ptr<Contract const> contract, int64_t batch)
    : mBundle(bundle)
    , mContract(std::move(contract))
    , mBatch(batch)
    , mLibrary((checkRecord(*bundle, *mContract, options), TrtLibrary::load(options, bundle->engines().version)))
    , mCuda(Cuda::load(options.cudart, options.target))
{
    checkGpu(*bundle, *mCuda, options.target);
    std::shared_ptr<void> const runtime = mLibrary.runtime(options.allowPlugins && !bundle->engines().plugins.empty());
    Contract const& of = *mContract;
    for (auto const& [name, program] : of.programs)
    {
        for (Graph const& graph : program.graphs)
        {
            mGraphs[graph.name] = std::make_unique<TrtGraph>(*bundle, graph, mLibrary, runtime, mCuda);
        }
    }
    for (size_t group = 0; group < of.groups.size(); ++group)
    {
        Set set;
        for (Buffer const& buffer : of.buffers)
        {
            set[buffer.name] = DeviceMemory(mCuda, viewed(buffer.name, group).bytes());
        }
        mBuffers.push_back(std::move(set));
        if (mSpare.count(kind(group)) == 0)
        {
            for (std::string const& name : of.exchanged())
            {
                mSpare[kind(group)][name] = DeviceMemory(mCuda, viewed(name, group).bytes());
            }
        }
    }
    mCuda->wait();
}

View TrtEngine::viewed(std::string const& buffer, size_t group) const
{
    Buffer const& of = *mContract->buffer(buffer);
    return {of.type, of.sizes(mContract->groups[group], mBatch, mContract->headDim), nullptr};
}

TrtEngine::Kind TrtEngine::kind(size_t group) const
{
    return {mContract->groups[group].heads, mContract->groups[group].capacity};
}

// The engine and the profile for a run; of those that fit, the one that is for it. A prompt of one token is a prompt:
// what attends to chosen slots in steps alone does so in no prompt.
std::pair<TrtGraph*, size_t> TrtEngine::choose(std::string const& program, RunSizes const& sizes, bool prompt)
{
    std::string const wanted = prompt || sizes.sequence > 1 ? "prefill" : "decode";
    std::pair<TrtGraph*, size_t> other{nullptr, 0};
    for (Graph const& graph : mContract->programs.at(program).graphs)
    {
        TrtGraph& engine = *mGraphs.at(graph.name);
        for (size_t profile = 0; profile < std::max<size_t>(graph.profiles.size(), 1); ++profile)
        {
            if (!engine.fits(profile, sizes))
            {
                continue;
            }
            if ((graph.profiles.empty() ? graph.phase : graph.profiles[profile].phase) == wanted)
            {
                return {&engine, profile};
            }
            other = other.first == nullptr ? std::pair{&engine, profile} : other;
        }
    }
    if (other.first == nullptr)
    {
        throw Error(SEMKV_BAD_BUNDLE, "no engine takes a run of this shape")
            .where("program " + program)
            .expected("one row of at most " + std::to_string(mContract->prefillChunk)
                + " tokens, or one token for each of " + std::to_string(mBatch) + " rows")
            .got(std::to_string(sizes.batch) + " rows of " + std::to_string(sizes.sequence) + " tokens");
    }
    return other;
}

float const* TrtEngine::run(std::string const& program, Feeds const& feeds, int64_t row)
{
    mCuda->use();
    RunSizes const sizes = RunSizes::of(feeds);
    auto const [engine, profile] = choose(program, sizes, row != kEveryRow);
    std::map<std::string, void*> addresses;
    for (auto const& [name, binding] : mContract->programs.at(program).buffers)
    {
        for (size_t group = 0; group < mBuffers.size(); ++group)
        {
            // Rows of a batch lie one after the other, heads within them.
            DeviceMemory const& buffer = mBuffers[group].at(name);
            size_t const rowBytes = buffer.bytes() / static_cast<size_t>(mBatch);
            void* const address = buffer.data() + (row == kEveryRow ? 0 : static_cast<size_t>(row) * rowBytes);
            for (std::optional<std::string> const* pattern : {&binding.input, &binding.output})
            {
                if (*pattern)
                {
                    addresses[Binding::named(**pattern, group, mBuffers.size())] = address;
                }
            }
        }
    }
    mLogits = std::move(engine->run(profile, sizes, feeds, addresses).at("logits"));
    return mLogits.as<float>();
}

std::map<size_t, Feeds> TrtEngine::runGroups(std::string const& program, std::map<size_t, Feeds> const& feeds)
{
    mCuda->use();
    Program const& of = mContract->programs.at(program);
    std::map<size_t, Feeds> results;
    for (auto const& [group, given] : feeds)
    {
        Graph const& graph = of.forGroup(group);
        Set& own = mBuffers[group];
        Set& spare = mSpare[kind(group)];
        std::map<std::string, void*> addresses;
        std::vector<std::string> exchanged;
        for (auto const& [name, binding] : of.buffers)
        {
            auto const source = binding.input ? Binding::named(*binding.input, group, mBuffers.size()) : "";
            if (binding.input)
            {
                addresses[source] = own.at(name).data();
            }
            if (binding.output)
            {
                auto const result = Binding::named(*binding.output, group, mBuffers.size());
                auto const alias = graph.aliases.find(source);
                bool const inPlace = !binding.input || (alias != graph.aliases.end() && alias->second == result);
                addresses[result] = (inPlace ? own : spare).at(name).data();
                if (!inPlace)
                {
                    exchanged.push_back(name);
                }
            }
        }
        results[group] = mGraphs.at(graph.name)->run(0, {}, given, addresses);
        for (std::string const& name : exchanged)
        {
            std::swap(own.at(name), spare.at(name));
        }
    }
    return results;
}

Array TrtEngine::read(std::string const& buffer, size_t group) const
{
    mCuda->use();
    View const view = viewed(buffer, group);
    Array array(view.type, view.shape);
    mCuda->copyOut(array.data.data(), mBuffers[group].at(buffer).data(), view.bytes());
    mCuda->wait();
    return array;
}

void TrtEngine::write(std::string const& buffer, size_t group, Array const& array)
{
    mCuda->use();
    mCuda->copyIn(mBuffers[group].at(buffer).data(), array.data.data(), viewed(buffer, group).bytes());
    mCuda->wait();
}

void TrtEngine::reset(int64_t row)
{
    mCuda->use();
    // What dead slots hold changes nothing, but what is said of slots is said of the next that lie there.
    for (Buffer const& buffer : mContract->buffers)
    {
        for (Set& set : mBuffers)
        {
            DeviceMemory const& memory = set.at(buffer.name);
            size_t const bytes = memory.bytes() / static_cast<size_t>(row == kEveryRow ? 1 : mBatch);
            if (buffer.isFloat32)
            {
                mCuda->clear(memory.data() + (row == kEveryRow ? 0 : static_cast<size_t>(row) * bytes), bytes);
            }
        }
    }
    mCuda->wait();
}

int64_t TrtEngine::cacheBytes() const
{
    size_t total = 0;
    auto const add = [&](Set const& set) {
        for (auto const& [name, memory] : set)
        {
            total += memory.bytes();
        }
    };
    std::for_each(mBuffers.begin(), mBuffers.end(), add);
    for (auto const& [of, set] : mSpare)
    {
        add(set);
    }
    return static_cast<int64_t>(total);
}
} // namespace semkv::runtime
