// Drives plugin objects as TensorRT does, without TensorRT: creators from getCreators, fields, types, shapes, formats,
// configuration, serialisation, runtime phase, enqueue. In the emulated build on host memory, in nvcc's on the GPU.
#pragma once

#include <NvInferRuntime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace harness
{
// Ends the test at once: what follows a failed check would only confuse.
#define CHECK(condition) ::harness::check((condition), #condition, __FILE__, __LINE__)
void check(bool condition, char const* text, char const* file, int line);

struct Registered
{
    Registered(char const* name, std::function<void()> body);
};
#define PLUGIN_TEST(name)                                                                                              \
    static void name();                                                                                               \
    static ::harness::Registered const registered_##name(#name, name);                                                \
    static void name()

// Lines the plugins logged since the last call.
std::vector<std::string> takeLog();
// True when one logged line has all the pieces; empties the log.
bool logged(std::vector<std::string> const& pieces);

nvinfer1::IPluginCreatorV3One& creator(std::string const& name);
std::vector<nvinfer1::IPluginCreatorV3One*> creators();

struct Fields
{
    std::vector<std::pair<std::string, float>> floats;
    std::vector<std::pair<std::string, int32_t>> ints;
};
// Null when the creator refuses.
std::unique_ptr<nvinfer1::IPluginV3> create(std::string const& name, Fields const& fields);

using Shape = std::vector<int64_t>;

struct Tensor
{
    Shape shape;
    nvinfer1::DataType type;
    std::vector<unsigned char> bytes;

    Tensor(Shape shape_, nvinfer1::DataType type_);
    int64_t elements() const;
    float get(int64_t index) const;
    void set(int64_t index, float value);
    int64_t& integer(int64_t index);
    // Reproducible values in -1 .. 1.
    Tensor& randomise(uint32_t seed);
};

// A plugin taken through its whole life for given inputs.
class Driver
{
public:
    Driver(nvinfer1::IPluginV3& plugin, std::vector<Tensor> inputs);

    // Each step checks that the plugin agreed; `refused` variants that it did not.
    void checkTypesAndShapes(std::vector<Shape> const& expected);
    int32_t typesStatus();
    int32_t shapesStatus();
    // Number of combinations of float32, float16, bfloat16, int8, fp8, int32, int64 over all positions that are accepted.
    int countFormatCombinations();
    int32_t configureStatus();
    enum class TacticSet
    {
        kAttached, // after attachToContext, as TensorRT does
        kRestored, // before it
        kBeforeClone,
    };
    // Serialises, re-creates in the runtime phase, attaches, announces shapes and runs, on copies of the inputs. With
    // `alias`, aliased outputs are written over them; otherwise outputs are poisoned buffers and no input may change.
    std::vector<Tensor> run(bool alias, int32_t tactic = 0, TacticSet when = TacticSet::kAttached);

    std::vector<Tensor> inputs;

private:
    std::unique_ptr<nvinfer1::IPluginV3> attached(int32_t tactic, TacticSet when);


    nvinfer1::IPluginV3& mPlugin;
    nvinfer1::IPluginV3OneBuildV2& mBuild;
    std::vector<nvinfer1::DataType> mOutputTypes;
    std::vector<Shape> mOutputShapes;
};

nvinfer1::Dims dims(Shape const& shape);
// Attributes as the plugin serialises them: "name=value;...".
std::string describe(nvinfer1::IPluginV3& plugin);
} // namespace harness
