#include "engine/onnxruntime/ort_engine.h"

#include "engine/onnxruntime/threads.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>

namespace semkv::runtime
{
namespace
{
// Groups that a program runs for at the same time at most; each takes one set of spare buffers. A group's program is
// many small operators: groups side by side on one thread each are faster than one after the other on all threads.
constexpr int64_t kGroupWorkers = 2;

// Bindings of steps that are held: the rows that are run change when a turn begins or ends.
constexpr size_t kMostSteps = 4;

View slice(View view, int64_t first, int64_t rows)
{
    size_t const bytes = view.bytes() / static_cast<size_t>(view.shape[0]);
    view.shape[0] = rows;
    view.data = static_cast<char*>(view.data) + static_cast<size_t>(first) * bytes;
    return view;
}

constexpr size_t kCacheLine = 64;

// A buffer's bytes in the shape that a graph has for them: heads may lie in the batch axis.
View viewed(View view, Shape const& shape)
{
    if (shape.size() == view.shape.size() && shape[1] != view.shape[1] && shape[1] == 1)
    {
        view.shape[0] *= view.shape[1];
        view.shape[1] = 1;
    }
    return view;
}
} // namespace

Memory::Memory(Type type, Shape shape)
    : mView{type, std::move(shape), nullptr}
{
    // Zeros that begin with a cache line: a row that is read by itself then lies in as few of them as it can.
    mHeld.reset(std::calloc(mView.bytes() + kCacheLine, 1), std::free);
    if (mHeld == nullptr)
    {
        throw std::bad_alloc();
    }
    size_t space = mView.bytes() + kCacheLine;
    mView.data = mHeld.get();
    std::align(kCacheLine, mView.bytes(), mView.data, space);
}

OrtEngine::OrtEngine(std::shared_ptr<Bundle const> const& bundle, RuntimeOptions const& options,
    std::shared_ptr<Contract const> contract, int64_t batch, int64_t threads)
    : mBundle(bundle)
    , mContract(std::move(contract))
    , mBatch(batch)
{
    Contract const& of = *mContract;
    if (of.dtype != Type::kFloat32 && of.dtype != Type::kFloat16 && !of.native)
    {
        throw Error(SEMKV_NO_TARGET, "ONNX Runtime's own CPU kernels do not take this cache type")
            .where(bundle->root())
            .expected("float32, float16, or native operators")
            .got(nameOf(of.dtype));
    }
    int64_t const wanted = threads > 0 ? threads : usableCpus();
    mWorkers = static_cast<size_t>(std::max<int64_t>(1, std::min(kGroupWorkers, wanted)));
    std::optional<NativeLibrary> native;
    if (of.native)
    {
        native = NativeLibrary::load(options, *of.native, bundle->root());
    }
    Ort const& ort = Ort::load(options.onnxruntime);
    for (auto const& [name, program] : of.programs)
    {
        for (Graph const& graph : program.graphs)
        {
            mGraphs[graph.name] = std::make_unique<OrtGraph>(
                ort, bundle->graph(graph.onnx), graph, program.ofGroup ? 1 : wanted, native);
        }
    }
    std::vector<std::string> const exchanged = of.exchanged();
    std::map<Kind, size_t> counts;
    for (size_t group = 0; group < of.groups.size(); ++group)
    {
        Set set;
        for (Buffer const& buffer : of.buffers)
        {
            set[buffer.name] = make(buffer, group);
        }
        mBuffers.push_back(std::move(set));
        // As many sets of spare buffers as workers, or as groups of the kind: there is always one.
        if (!exchanged.empty() && ++counts[kind(group)] <= mWorkers)
        {
            Set spare;
            for (std::string const& name : exchanged)
            {
                spare[name] = make(*of.buffer(name), group);
            }
            mSpare[kind(group)].push_back(std::move(spare));
        }
    }
}

Memory OrtEngine::make(Buffer const& buffer, size_t group) const
{
    return Memory(buffer.type, buffer.sizes(mContract->groups[group], mBatch, mContract->headDim));
}

OrtEngine::Kind OrtEngine::kind(size_t group) const
{
    return {mContract->groups[group].heads, mContract->groups[group].capacity};
}

bool OrtEngine::Bound::fits(Feeds const& feeds) const
{
    return std::all_of(
        small.begin(), small.end(), [&](auto const& held) { return feeds.at(held.first).shape == held.second.shape; });
}

std::unique_ptr<OrtEngine::Bound> OrtEngine::bind(
    std::string const& program, Graph const& graph, Feeds const& feeds, int64_t first, int64_t count)
{
    auto bound = std::make_unique<Bound>(Bound{OrtBinding(*mGraphs.at(graph.name)), {}, {}});
    std::map<std::string, bool> named; // names that buffers have taken
    for (auto const& [name, binding] : mContract->programs.at(program).buffers)
    {
        for (size_t group = 0; group < mBuffers.size(); ++group)
        {
            View const rows = slice(mBuffers[group].at(name).view(), first, count);
            auto const source = binding.input ? Binding::named(*binding.input, group, mBuffers.size()) : "";
            auto const result = binding.output ? Binding::named(*binding.output, group, mBuffers.size()) : "";
            if (TensorSpec const* tensor = graph.input(source))
            {
                bound->binding.input(source, viewed(rows, tensor->shape));
                named[source] = true;
            }
            if (TensorSpec const* tensor = graph.output(result))
            {
                bound->binding.output(result, viewed(rows, tensor->shape));
                named[result] = true;
            }
        }
    }
    for (TensorSpec const& tensor : graph.inputs)
    {
        if (!named[tensor.name])
        {
            Array& held = bound->small[tensor.name] = Array(tensor.type, feeds.at(tensor.name).shape);
            bound->binding.input(tensor.name, held.view());
        }
    }
    for (TensorSpec const& tensor : graph.outputs)
    {
        if (tensor.name == "logits")
        {
            Shape const& index = feeds.at("logits_index").shape;
            bound->logits = Array(Type::kFloat32, {index[0], index[1], mContract->vocabSize});
            bound->binding.output(tensor.name, bound->logits.view());
        }
        else if (!named[tensor.name])
        {
            bound->binding.outputAsMade(tensor.name);
        }
    }
    return bound;
}

float const* OrtEngine::run(std::string const& program, Feeds const& feeds, int64_t row)
{
    if (row == kEveryRow && program == kDecode && feeds.at("input_ids").shape[1] == 1)
    {
        return runRows(program, feeds, 0);
    }
    int64_t const first = row == kEveryRow ? 0 : row, rows = row == kEveryRow ? mBatch : 1;
    mPiece = nullptr;
    mPiece = bind(program, mContract->programs.at(program).ofPhase(row != kEveryRow), feeds, first, rows);
    return mPiece->run(feeds);
}

float const* OrtEngine::runRows(std::string const& program, Feeds const& feeds, int64_t first)
{
    std::pair<int64_t, int64_t> const key{first, feeds.at("input_ids").shape[0]};
    auto found = std::find_if(mSteps.begin(), mSteps.end(), [&](auto const& each) { return each.first == key; });
    if (found != mSteps.end() && !found->second->fits(feeds))
    {
        mSteps.erase(found);
        found = mSteps.end();
    }
    if (found == mSteps.end())
    {
        if (mSteps.size() == kMostSteps)
        {
            mSteps.erase(mSteps.begin());
        }
        mSteps.emplace_back(
            key, bind(program, mContract->programs.at(program).ofPhase(false), feeds, first, key.second));
        found = std::prev(mSteps.end());
    }
    return found->second->run(feeds);
}

float const* OrtEngine::Bound::run(Feeds const& feeds)
{
    for (auto& [name, array] : small)
    {
        std::memcpy(array.data.data(), feeds.at(name).data.data(), array.data.size());
    }
    binding.run();
    return logits.as<float>();
}

Array OrtEngine::read(std::string const& buffer, size_t group) const
{
    View const view = mBuffers[group].at(buffer).view();
    Array array(view.type, view.shape);
    std::memcpy(array.data.data(), view.data, view.bytes());
    return array;
}

void OrtEngine::write(std::string const& buffer, size_t group, Array const& array)
{
    View const view = mBuffers[group].at(buffer).view();
    std::memcpy(view.data, array.data.data(), view.bytes());
}

void OrtEngine::reset(int64_t row)
{
    // What dead slots hold changes nothing, but what is said of slots is said of the next that lie there.
    for (Buffer const& buffer : mContract->buffers)
    {
        for (Set& set : mBuffers)
        {
            if (buffer.isFloat32)
            {
                View const whole = set.at(buffer.name).view();
                View const view = row == kEveryRow ? whole : slice(whole, row, 1);
                std::memset(view.data, 0, view.bytes());
            }
        }
    }
}

int64_t OrtEngine::cacheBytes() const
{
    size_t total = 0;
    auto const add = [&](Set const& set) {
        for (auto const& [name, memory] : set)
        {
            total += memory.view().bytes();
        }
    };
    std::for_each(mBuffers.begin(), mBuffers.end(), add);
    for (auto const& [of, sets] : mSpare)
    {
        std::for_each(sets.begin(), sets.end(), add);
    }
    return static_cast<int64_t>(total);
}
} // namespace semkv::runtime
