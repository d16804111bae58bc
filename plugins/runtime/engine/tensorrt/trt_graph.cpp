#include "engine/tensorrt/trt_graph.h"

#include "engine/tensorrt/plan.h"

#include <algorithm>
#include <set>

namespace semkv::runtime
{
namespace
{
constexpr char const* kFoldedRows = "cache_rows_"; // and a number: KV heads that lie in the batch axis

int64_t sizeOf(std::string const& symbol, RunSizes const& sizes)
{
    std::string const folded = kFoldedRows;
    bool const known = symbol.compare(0, folded.size(), folded) == 0;
    std::string const heads = known ? symbol.substr(folded.size()) : "";
    if (known && !heads.empty() && heads.size() < 7 && heads.find_first_not_of("0123456789") == std::string::npos)
    {
        return sizes.batch * std::stoll(heads);
    }
    return symbol == "batch" ? sizes.batch
        : symbol == "sequence" ? sizes.sequence
        : symbol == "rows"     ? sizes.rows
                               : -1;
}

// At most three names, as a list.
std::string someOf(std::set<std::string> const& names, std::set<std::string> const& without, char const* otherwise)
{
    std::string text;
    int count = 0;
    for (std::string const& name : names)
    {
        if (without.count(name) == 0 && ++count <= 3)
        {
            text += (text.empty() ? "" : ", ") + name;
        }
    }
    return text.empty() ? otherwise : text;
}
} // namespace

RunSizes RunSizes::of(Feeds const& feeds)
{
    Shape const& ids = feeds.at("input_ids").shape;
    return {ids[0], ids[1], feeds.at("logits_index").shape[1]};
}

TrtGraph::TrtGraph(Bundle const& bundle, Graph const& contract, TrtLibrary const& library,
    std::shared_ptr<void> runtime, std::shared_ptr<Cuda const> cuda)
    : mPath(bundle.path(contract.plan))
    , mContract(contract)
    , mLibrary(library)
    , mCuda(std::move(cuda))
    , mRuntime(std::move(runtime))
{
    for (auto const* tensors : {&contract.inputs, &contract.outputs})
    {
        for (TensorSpec const& tensor : *tensors)
        {
            for (std::string const& symbol : tensor.symbols)
            {
                if (!symbol.empty() && sizeOf(symbol, {}) < 0)
                {
                    throw Error(SEMKV_BAD_BUNDLE, "an open size that no run says")
                        .where(bundle.path(kManifest) + ": " + tensor.name)
                        .expected("batch, sequence, rows or cache_rows_<heads>")
                        .got(symbol);
                }
            }
        }
    }
    std::shared_ptr<PrivateCopy> const plan = bundle.plan(contract.plan);
    checkPlan(*plan, mPath, library);
    mLibrary.log().taken("");
    mEngine.reset(callImplementation<void*, void const*, size_t>(
                      mRuntime.get(), library.places().deserialize, plan->data(), plan->size()),
        deleteObject);
    if (!mEngine)
    {
        throw Error(SEMKV_NO_TARGET, library.title() + " does not open the engine")
            .where(mPath)
            .got(library.log().taken("no reason"))
            .fix("build it for the compute capability of this GPU, with the version that is installed here");
    }
    checkTensors();
    // ExecutionContextAllocationStrategy::kSTATIC: all activation memory now, so that nothing grows.
    mContext.reset(ask<void*, int32_t>(library.places().createContext, 0), deleteObject);
    if (!mContext)
    {
        throw Error(SEMKV_OUT_OF_MEMORY, "the GPU's memory does not suffice for the engine's activations")
            .where(mPath)
            .got(library.log().taken("no reason"));
    }
}

void TrtGraph::checkTensors() const
{
    Places const& places = mLibrary.places();
    std::set<std::string> found, expected;
    int32_t const count = ask<int32_t>(places.tensorCount);
    for (int32_t i = 0; i < count; ++i)
    {
        char const* const name = ask<char const*, int32_t>(places.tensorName, i);
        found.insert(name != nullptr ? name : "");
    }
    for (auto const* tensors : {&mContract.inputs, &mContract.outputs})
    {
        for (TensorSpec const& tensor : *tensors)
        {
            expected.insert(tensor.name);
        }
    }
    if (found != expected)
    {
        throw Error(SEMKV_BAD_BUNDLE, "the engine is not the contract's")
            .where(mPath)
            .expected(someOf(expected, found, "no more tensors"))
            .got(someOf(found, expected, "none of them"));
    }
    // Not there before TensorRT 10.15, where only plugins append in place; of theirs nothing is returned anyway.
    for (auto const& [source, result] : mContract.aliases)
    {
        char const* const aliased
            = places.aliasedInput < 0 ? nullptr : ask<char const*, char const*>(places.aliasedInput, result.c_str());
        if (aliased != nullptr && *aliased != '\0' && source != aliased)
        {
            throw Error(SEMKV_BAD_BUNDLE, "the engine aliases other tensors than the contract")
                .where(mPath + ": " + result)
                .expected(source)
                .got(aliased);
        }
    }
}

Shape TrtGraph::shapeOf(TensorSpec const& tensor, RunSizes const& sizes) const
{
    Shape shape = tensor.shape;
    for (size_t i = 0; i < shape.size(); ++i)
    {
        shape[i] = shape[i] < 0 ? sizeOf(tensor.symbols[i], sizes) : shape[i];
    }
    return shape;
}

bool TrtGraph::fits(size_t profile, RunSizes const& sizes) const
{
    for (TensorSpec const& tensor : mContract.inputs)
    {
        Shape const shape = shapeOf(tensor, sizes);
        if (!mContract.profiles.empty())
        {
            auto const& shapes = mContract.profiles[profile].shapes;
            auto const range = shapes.find(tensor.name);
            for (size_t i = 0; range != shapes.end() && i < shape.size(); ++i)
            {
                if (shape[i] < range->second.least[i] || shape[i] > range->second.most[i])
                {
                    return false;
                }
            }
        }
        // A size that the graph has as a number is not among its symbols.
        if ((tensor.name == "input_ids" && shape != Shape{sizes.batch, sizes.sequence})
            || (tensor.name == "logits_index" && shape != Shape{sizes.batch, sizes.rows}))
        {
            return false;
        }
    }
    return true;
}

Feeds TrtGraph::run(
    size_t profile, RunSizes const& sizes, Feeds const& feeds, std::map<std::string, void*> const& addresses)
{
    Places const& places = mLibrary.places();
    auto const tell = [&](int place, auto... arguments) {
        return callImplementation<bool>(mContext.get(), place, arguments...);
    };
    mLibrary.log().taken("");
    if (profile != mProfile)
    {
        require(tell(places.setProfile, static_cast<int32_t>(profile), mCuda->stream()), "switch its profile");
        mProfile = profile;
    }
    auto const bind = [&](std::string const& name, void* address) {
        require(tell(places.setAddress, name.c_str(), address), "take " + name);
    };
    for (TensorSpec const& tensor : mContract.inputs)
    {
        Shape const shape = shapeOf(tensor, sizes);
        if (!mContract.profiles.empty())
        {
            TrtDims dims;
            dims.count = static_cast<int32_t>(shape.size());
            std::copy(shape.begin(), shape.end(), dims.sizes);
            TrtDims const* const given = &dims;
            require(
                tell(places.setShape, tensor.name.c_str(), given), "take " + tensor.name + " of " + listed(shape));
        }
        auto const buffer = addresses.find(tensor.name);
        if (buffer != addresses.end())
        {
            bind(tensor.name, buffer->second);
            continue;
        }
        Array const& array = feeds.at(tensor.name);
        View const view{tensor.type, shape, nullptr};
        if (array.type != tensor.type || array.data.size() != view.bytes())
        {
            throw Error(SEMKV_BAD_BUNDLE, "the engine takes " + tensor.name + " of another size than the host has")
                .where(mPath)
                .expected(std::string(nameOf(tensor.type)) + " " + listed(shape))
                .got(std::string(nameOf(array.type)) + " " + listed(array.shape));
        }
        void* const device = small(tensor.name, view.bytes());
        mCuda->copyIn(device, array.data.data(), view.bytes());
        bind(tensor.name, device);
    }
    Feeds results;
    for (TensorSpec const& tensor : mContract.outputs)
    {
        auto const buffer = addresses.find(tensor.name);
        if (buffer == addresses.end())
        {
            results[tensor.name] = Array(tensor.type, shapeOf(tensor, sizes));
        }
        bind(tensor.name,
            buffer != addresses.end() ? buffer->second : small(tensor.name, results.at(tensor.name).data.size()));
    }
    require(tell(places.enqueue, mCuda->stream()), "run");
    for (auto& [name, array] : results)
    {
        mCuda->copyOut(array.data.data(), mSmall.at(name).data(), array.data.size());
    }
    mCuda->wait();
    return results;
}

// Memory of at least so many bytes, which stays until more is asked for.
void* TrtGraph::small(std::string const& name, size_t bytes)
{
    DeviceMemory& memory = mSmall[name];
    if (memory.data() == nullptr || memory.bytes() < bytes)
    {
        memory = DeviceMemory(mCuda, bytes);
    }
    return memory.data();
}

void TrtGraph::require(bool done, std::string const& what) const
{
    if (!done)
    {
        throw Error(SEMKV_RUNTIME, "the engine does not " + what)
            .where(mPath)
            .got(mLibrary.log().taken("no reason"));
    }
}
} // namespace semkv::runtime
