#include "engine/onnxruntime/graph.h"

#include <cstring>

namespace semkv::runtime
{
namespace
{
struct Options
{
    explicit Options(Ort const& ort)
        : api(ort.api())
    {
        ort.check(api.CreateSessionOptions(&options), "ONNX Runtime");
    }

    ~Options()
    {
        api.ReleaseSessionOptions(options);
    }

    OrtApi const& api;
    OrtSessionOptions* options = nullptr;
};

// Sizes of a tensor's type, -1 where they are open.
Shape shapeOf(Ort const& ort, OrtTensorTypeAndShapeInfo const* info)
{
    size_t rank = 0;
    ort.check(ort.api().GetDimensionsCount(info, &rank), "a shape");
    Shape shape(rank);
    ort.check(ort.api().GetDimensions(info, shape.data(), rank), "a shape");
    return shape;
}
} // namespace

OrtGraph::OrtGraph(Ort const& ort, LoadedGraph loaded, Graph const& contract, int64_t threads,
    std::optional<NativeLibrary> const& native)
    : mOrt(ort)
    , mLoaded(std::move(loaded))
    , mContract(contract)
{
    std::string const& name = mLoaded.name;
    OrtApi const& api = ort.api();
    Options const options(ort);
    ort.check(api.SetIntraOpNumThreads(options.options, static_cast<int>(threads)), name);
    ort.check(api.SetSessionLogSeverityLevel(options.options, ORT_LOGGING_LEVEL_ERROR), name);
    // Shapes differ from run to run, so a memory plan of the first run is only ballast.
    ort.check(api.DisableMemPattern(options.options), name);
    // Threads stop waiting for work in a loop when a run ends: groups that run next have the cores to themselves.
    ort.check(api.AddSessionConfigEntry(options.options, "session.force_spinning_stop", "1"), name);
    if (native)
    {
        native->registerWith(ort, options.options);
    }
    if (!mLoaded.data.empty())
    {
        std::vector<char const*> names;
        std::vector<char*> buffers;
        std::vector<size_t> sizes;
        for (auto const& [location, content] : mLoaded.data)
        {
            names.push_back(location.c_str());
            buffers.push_back(content->data());
            sizes.push_back(content->size());
        }
        ort.check(
            api.AddSessionConfigEntry(options.options, "session.use_external_initializer_file_buffers_directly", "1"),
            name);
        ort.check(api.AddExternalInitializersFromFilesInMemory(
                      options.options, names.data(), buffers.data(), sizes.data(), names.size()),
            name);
    }
    OrtSession* session = nullptr;
    ort.check(
        api.CreateSessionFromArray(ort.env(), mLoaded.model.data(), mLoaded.model.size(), options.options, &session),
        name, "load a newer ONNX Runtime, such as the one that the bundle was built with, or build the bundle again");
    mSession.reset(session, api.ReleaseSession);
    checkSide(true);
    checkSide(false);
}

void OrtGraph::checkSide(bool inputs) const
{
    OrtApi const& api = mOrt.api();
    std::string const where = mLoaded.name, side = inputs ? "input" : "output";
    auto const& said = inputs ? mContract.inputs : mContract.outputs;
    auto const reject = [&](std::string const& what, std::string const& expected, std::string const& got) {
        throw Error(SEMKV_BAD_BUNDLE, "the graph has another " + what + " than the manifest says")
            .where(where)
            .expected(expected)
            .got(got)
            .fix("build the bundle again, or copy it again from where it was built");
    };
    size_t count = 0;
    mOrt.check((inputs ? api.SessionGetInputCount : api.SessionGetOutputCount)(mSession.get(), &count), where);
    if (count != said.size())
    {
        reject("number of " + side + "s", std::to_string(said.size()), std::to_string(count));
    }
    OrtAllocator* allocator = nullptr;
    mOrt.check(api.GetAllocatorWithDefaultOptions(&allocator), where);
    for (size_t i = 0; i < count; ++i)
    {
        char* text = nullptr;
        mOrt.check(
            (inputs ? api.SessionGetInputName : api.SessionGetOutputName)(mSession.get(), i, allocator, &text), where);
        std::string const name = text;
        mOrt.check(api.AllocatorFree(allocator, text), where);
        TensorSpec const* spec = inputs ? mContract.input(name) : mContract.output(name);
        if (spec == nullptr)
        {
            reject("list of " + side + "s", "none of that name", name);
        }
        OrtTypeInfo* type = nullptr;
        mOrt.check(
            (inputs ? api.SessionGetInputTypeInfo : api.SessionGetOutputTypeInfo)(mSession.get(), i, &type), where);
        std::shared_ptr<OrtTypeInfo> const held(type, api.ReleaseTypeInfo);
        OrtTensorTypeAndShapeInfo const* info = nullptr;
        mOrt.check(api.CastTypeInfoToTensorInfo(type, &info), where);
        ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        if (info != nullptr)
        {
            mOrt.check(api.GetTensorElementType(info, &element), where);
        }
        if (element != elementType(spec->type))
        {
            reject(side + " " + name, nameOf(spec->type), "type " + std::to_string(element));
        }
        Shape const shape = shapeOf(mOrt, info);
        if (shape != spec->shape)
        {
            reject(side + " " + name, listed(spec->shape), listed(shape));
        }
    }
}

OrtBinding::OrtBinding(OrtGraph const& graph)
    : mGraph(graph)
{
    OrtIoBinding* binding = nullptr;
    graph.ort().check(graph.ort().api().CreateIoBinding(graph.session(), &binding), graph.contract().name);
    mBinding.reset(binding, graph.ort().api().ReleaseIoBinding);
}

void OrtBinding::input(std::string const& name, View const& view)
{
    mHeld.push_back(mGraph.ort().value(view));
    mGraph.ort().check(mGraph.ort().api().BindInput(mBinding.get(), name.c_str(), mHeld.back().get()), name);
}

void OrtBinding::output(std::string const& name, View const& view)
{
    mHeld.push_back(mGraph.ort().value(view));
    mGraph.ort().check(mGraph.ort().api().BindOutput(mBinding.get(), name.c_str(), mHeld.back().get()), name);
    mOutputs.push_back(name);
    mIsMade.push_back(false);
}

void OrtBinding::outputAsMade(std::string const& name)
{
    Ort const& ort = mGraph.ort();
    OrtMemoryInfo* memory = nullptr;
    ort.check(ort.api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory), name);
    std::shared_ptr<OrtMemoryInfo> const held(memory, ort.api().ReleaseMemoryInfo);
    ort.check(ort.api().BindOutputToDevice(mBinding.get(), name.c_str(), memory), name);
    mOutputs.push_back(name);
    mIsMade.push_back(true);
}

void OrtBinding::run()
{
    mGraph.ort().check(
        mGraph.ort().api().RunWithBinding(mGraph.session(), nullptr, mBinding.get()), mGraph.contract().name);
}

std::map<std::string, Array> OrtBinding::made() const
{
    Ort const& ort = mGraph.ort();
    OrtAllocator* allocator = nullptr;
    ort.check(ort.api().GetAllocatorWithDefaultOptions(&allocator), "outputs");
    OrtValue** values = nullptr;
    size_t count = 0;
    ort.check(ort.api().GetBoundOutputValues(mBinding.get(), allocator, &values, &count), "outputs");
    std::vector<std::shared_ptr<OrtValue>> held;
    for (size_t i = 0; i < count; ++i)
    {
        held.emplace_back(values[i], ort.api().ReleaseValue);
    }
    if (values != nullptr)
    {
        ort.check(ort.api().AllocatorFree(allocator, values), "outputs");
    }
    std::map<std::string, Array> found;
    for (size_t i = 0; i < count; ++i)
    {
        if (!mIsMade[i])
        {
            continue;
        }
        OrtTensorTypeAndShapeInfo* info = nullptr;
        ort.check(ort.api().GetTensorTypeAndShape(held[i].get(), &info), mOutputs[i]);
        std::shared_ptr<OrtTensorTypeAndShapeInfo> const released(info, ort.api().ReleaseTensorTypeAndShapeInfo);
        Array array(mGraph.contract().output(mOutputs[i])->type, shapeOf(ort, info));
        void* data = nullptr;
        ort.check(ort.api().GetTensorMutableData(held[i].get(), &data), mOutputs[i]);
        std::memcpy(array.data.data(), data, array.data.size());
        found[mOutputs[i]] = std::move(array);
    }
    return found;
}
} // namespace semkv::runtime
