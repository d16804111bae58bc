#include "harness.h"
#include "memory.h"

#include <algorithm>
#include <deque>

using namespace nvinfer1;

namespace harness
{
namespace
{
// A dimension as the builder gives it: a constant, or unknown until the engine runs.
class Expression final : public IDimensionExpr, public apiv::VDimensionExpr
{
public:
    explicit Expression(int64_t value)
        : mValue(value)
    {
        mImpl = this;
    }
    bool isConstant() const override
    {
        return mValue >= 0;
    }
    int64_t getConstantValue() const override
    {
        return mValue;
    }
    bool isSizeTensor() const override
    {
        return false;
    }

private:
    int64_t mValue;
};

class Builder final : public IExprBuilder, public apiv::VExprBuilder
{
public:
    Builder()
    {
        mImpl = this;
    }
    IDimensionExpr const* constant(int64_t value) override
    {
        mMade.emplace_back(value);
        return &mMade.back();
    }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return constant(-1);
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return constant(-1);
    }

private:
    std::deque<Expression> mMade;
};

DynamicPluginTensorDesc describeTensor(Shape const& shape, DataType type)
{
    DynamicPluginTensorDesc desc{};
    desc.desc.dims = desc.min = desc.opt = desc.max = dims(shape);
    desc.desc.type = type;
    desc.desc.format = TensorFormat::kLINEAR;
    return desc;
}

template <typename Interface>
Interface& capability(IPluginV3& plugin, PluginCapabilityType type)
{
    return *static_cast<Interface*>(plugin.getCapabilityInterface(type));
}
} // namespace

Driver::Driver(IPluginV3& plugin, std::vector<Tensor> inputs_)
    : inputs(std::move(inputs_))
    , mPlugin(plugin)
    , mBuild(capability<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD))
{
    auto const outputs = static_cast<size_t>(mBuild.getNbOutputs());
    mOutputTypes.resize(outputs);
    mOutputShapes.resize(outputs);
}

int32_t Driver::typesStatus()
{
    std::vector<DataType> types;
    for (Tensor const& tensor : inputs)
    {
        types.push_back(tensor.type);
    }
    return mBuild.getOutputDataTypes(mOutputTypes.data(), static_cast<int32_t>(mOutputTypes.size()), types.data(),
        static_cast<int32_t>(types.size()));
}

int32_t Driver::shapesStatus()
{
    Builder builder;
    std::vector<DimsExprs> in(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i)
    {
        in[i].nbDims = static_cast<int32_t>(inputs[i].shape.size());
        for (size_t d = 0; d < inputs[i].shape.size(); ++d)
        {
            in[i].d[d] = builder.constant(inputs[i].shape[d]);
        }
    }
    std::vector<DimsExprs> out(mOutputShapes.size());
    int32_t const status = mBuild.getOutputShapes(in.data(), static_cast<int32_t>(in.size()), nullptr, 0, out.data(),
        static_cast<int32_t>(out.size()), builder);
    for (size_t i = 0; status == 0 && i < out.size(); ++i)
    {
        mOutputShapes[i].clear();
        for (int32_t d = 0; d < out[i].nbDims; ++d)
        {
            mOutputShapes[i].push_back(out[i].d[d]->getConstantValue());
        }
    }
    return status;
}

void Driver::checkTypesAndShapes(std::vector<Shape> const& expected)
{
    CHECK(typesStatus() == 0);
    CHECK(shapesStatus() == 0);
    CHECK(mOutputShapes == expected);
    CHECK(configureStatus() == 0);
}

int Driver::countFormatCombinations()
{
    static constexpr DataType kTypes[]{
        DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8, DataType::kFP8, DataType::kINT32,
        DataType::kINT64};
    size_t const positions = inputs.size() + mOutputTypes.size();
    std::vector<DynamicPluginTensorDesc> descs(positions);
    int accepted = 0;
    // As TensorRT does it: a position is asked with all positions before it settled.
    std::function<void(size_t)> const walk = [&](size_t position) {
        if (position == positions)
        {
            ++accepted;
            return;
        }
        for (DataType const type : kTypes)
        {
            for (TensorFormat const format : {TensorFormat::kLINEAR, TensorFormat::kCHW32})
            {
                descs[position] = describeTensor({1}, type);
                descs[position].desc.format = format;
                if (mBuild.supportsFormatCombination(static_cast<int32_t>(position), descs.data(),
                        static_cast<int32_t>(inputs.size()), static_cast<int32_t>(mOutputTypes.size())))
                {
                    walk(position + 1);
                }
            }
        }
    };
    walk(0);
    return accepted;
}

int32_t Driver::configureStatus()
{
    std::vector<DynamicPluginTensorDesc> in;
    for (Tensor const& tensor : inputs)
    {
        in.push_back(describeTensor(tensor.shape, tensor.type));
    }
    return mBuild.configurePlugin(in.data(), static_cast<int32_t>(in.size()), nullptr, 0);
}

// A plugin as an engine has it, through every copy that TensorRT makes on the way.
std::unique_ptr<IPluginV3> Driver::attached(int32_t tactic, TacticSet when)
{
    auto const setTactic = [&](IPluginV3& plugin, TacticSet now) {
        CHECK(now != when || capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME).setTactic(tactic) == 0);
    };
    auto& core = capability<IPluginV3OneCore>(mPlugin, PluginCapabilityType::kCORE);
    auto& built = capability<IPluginV3OneRuntime>(mPlugin, PluginCapabilityType::kRUNTIME);
    std::unique_ptr<IPluginV3> restored(creator(core.getPluginName())
                                            .createPlugin("node", built.getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    CHECK(restored != nullptr && describe(*restored) == describe(mPlugin));
    setTactic(*restored, TacticSet::kBeforeClone);
    std::unique_ptr<IPluginV3> const copy(restored->clone());
    CHECK(copy != nullptr && describe(*copy) == describe(mPlugin));
    restored.reset();
    setTactic(*copy, TacticSet::kRestored);
    auto& runtime = capability<IPluginV3OneRuntime>(*copy, PluginCapabilityType::kRUNTIME);
    std::unique_ptr<IPluginV3> result(runtime.attachToContext(nullptr));
    CHECK(result != nullptr && describe(*result) == describe(mPlugin));
    setTactic(*result, TacticSet::kAttached);
    return result;
}

std::vector<Tensor> Driver::run(bool alias, int32_t tactic, TacticSet when)
{
    std::unique_ptr<IPluginV3> const plugin = attached(tactic, when);
    auto& runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
    std::vector<DynamicPluginTensorDesc> dynamic;
    std::vector<PluginTensorDesc> in;
    std::vector<Memory> memory;
    std::vector<void const*> inputPointers;
    for (Tensor const& tensor : inputs)
    {
        dynamic.push_back(describeTensor(tensor.shape, tensor.type));
        in.push_back(dynamic.back().desc);
        memory.emplace_back(tensor.bytes);
        inputPointers.push_back(memory.back().data());
    }
    std::vector<Tensor> outputs;
    std::vector<PluginTensorDesc> out;
    std::vector<size_t> places; // in memory
    std::vector<void*> outputPointers;
    for (size_t i = 0; i < mOutputShapes.size(); ++i)
    {
        int32_t const source = mBuild.getAliasedInput(static_cast<int32_t>(i));
        CHECK(source < static_cast<int32_t>(inputs.size()));
        outputs.emplace_back(mOutputShapes[i], mOutputTypes[i]);
        out.push_back(describeTensor(mOutputShapes[i], mOutputTypes[i]).desc);
        places.push_back(alias && source >= 0 ? static_cast<size_t>(source) : memory.size());
        if (source >= 0)
        {
            CHECK(inputs[static_cast<size_t>(source)].shape == mOutputShapes[i]);
            CHECK(inputs[static_cast<size_t>(source)].type == mOutputTypes[i]);
        }
        if (places.back() == memory.size())
        {
            memory.emplace_back(outputs.back().bytes.size());
        }
        outputPointers.push_back(memory[places.back()].data());
    }
    Memory const workspace(mBuild.getWorkspaceSize(dynamic.data(), static_cast<int32_t>(dynamic.size()), nullptr, 0));
    CHECK(runtime.onShapeChange(in.data(), static_cast<int32_t>(in.size()), out.data(),
              static_cast<int32_t>(out.size()))
        == 0);
    Stream const stream;
    CHECK(runtime.enqueue(
              in.data(), out.data(), inputPointers.data(), outputPointers.data(), workspace.data(), stream.get())
        == 0);
    stream.synchronise();
    for (size_t i = 0; i < outputs.size(); ++i)
    {
        outputs[i].bytes = memory[places[i]].content();
    }
    for (size_t i = 0; i < inputs.size(); ++i)
    {
        bool const overwritten = std::find(places.begin(), places.end(), i) != places.end();
        CHECK(overwritten || memory[i].content() == inputs[i].bytes);
    }
    return outputs;
}
} // namespace harness
