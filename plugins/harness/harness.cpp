#include "harness.h"

#include "memory.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

namespace harness
{
namespace
{
class Recorder final : public ILogger, public ILoggerFinder
{
public:
    void log(Severity, AsciiChar const* text) noexcept override
    {
        lines.emplace_back(text);
    }
    ILogger* findLogger() override
    {
        return this;
    }
    std::vector<std::string> lines;
};

Recorder& recorder()
{
    static Recorder instance;
    return instance;
}

struct Test
{
    char const* name;
    std::function<void()> body;
};

std::vector<Test>& tests()
{
    static std::vector<Test> instance;
    return instance;
}

size_t elementSize(DataType type)
{
    switch (type)
    {
    case DataType::kINT64: return 8;
    case DataType::kFLOAT:
    case DataType::kINT32: return 4;
    case DataType::kINT8:
    case DataType::kFP8: return 1;
    default: return 2;
    }
}

// __half and __nv_bfloat16 show their bits differently in the emulation and in the toolkit.
template <typename T>
T fromBits(uint16_t bits)
{
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, 2);
    return value;
}

float fp8ToFloat(unsigned char code)
{
    int const exponent = code >> 3 & 15;
    float const mantissa = static_cast<float>(code & 7) / 8.0F;
    float const size = exponent == 0 ? std::ldexp(mantissa, -6) : std::ldexp(1.0F + mantissa, exponent - 7);
    return (code & 0x80) != 0 ? -size : size;
}
} // namespace

void check(bool condition, char const* text, char const* file, int line)
{
    if (!condition)
    {
        std::printf("FAILED %s:%d: %s\n", file, line, text);
        for (std::string const& entry : recorder().lines)
        {
            std::printf("  logged: %s\n", entry.c_str());
        }
        std::exit(1);
    }
}

Registered::Registered(char const* name, std::function<void()> body)
{
    tests().push_back({name, std::move(body)});
}

std::vector<std::string> takeLog()
{
    std::vector<std::string> lines;
    lines.swap(recorder().lines);
    return lines;
}

bool logged(std::vector<std::string> const& pieces)
{
    bool found = false;
    for (std::string const& line : takeLog())
    {
        bool all = true;
        for (std::string const& piece : pieces)
        {
            all = all && line.find(piece) != std::string::npos;
        }
        found = found || all;
    }
    return found;
}

std::vector<IPluginCreatorV3One*> creators()
{
    int32_t count = 0;
    IPluginCreatorInterface* const* const all = getCreators(count);
    std::vector<IPluginCreatorV3One*> found;
    for (int32_t i = 0; i < count; ++i)
    {
        found.push_back(static_cast<IPluginCreatorV3One*>(all[i]));
    }
    return found;
}

IPluginCreatorV3One& creator(std::string const& name)
{
    IPluginCreatorV3One* found = nullptr;
    for (IPluginCreatorV3One* const one : creators())
    {
        found = name == one->getPluginName() ? one : found;
    }
    CHECK(found != nullptr);
    return *found;
}

std::unique_ptr<IPluginV3> create(std::string const& name, Fields const& fields)
{
    std::vector<PluginField> list;
    for (auto const& [field, value] : fields.floats)
    {
        list.emplace_back(field.c_str(), &value, PluginFieldType::kFLOAT32, 1);
    }
    for (auto const& [field, value] : fields.ints)
    {
        list.emplace_back(field.c_str(), &value, PluginFieldType::kINT32, 1);
    }
    PluginFieldCollection const collection{static_cast<int32_t>(list.size()), list.data()};
    return std::unique_ptr<IPluginV3>(creator(name).createPlugin("node", &collection, TensorRTPhase::kBUILD));
}

Tensor::Tensor(Shape shape_, DataType type_)
    : shape(std::move(shape_))
    , type(type_)
    , bytes(static_cast<size_t>(elements()) * elementSize(type_), 0)
{
}

int64_t Tensor::elements() const
{
    int64_t count = 1;
    for (int64_t const size : shape)
    {
        count *= size;
    }
    return count;
}

float Tensor::get(int64_t index) const
{
    unsigned char const* const at = bytes.data() + static_cast<size_t>(index) * elementSize(type);
    if (type == DataType::kFLOAT)
    {
        float value;
        std::memcpy(&value, at, 4);
        return value;
    }
    if (type == DataType::kINT8)
    {
        return static_cast<float>(static_cast<signed char>(*at));
    }
    if (type == DataType::kFP8)
    {
        return fp8ToFloat(*at);
    }
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    return type == DataType::kHALF ? __half2float(fromBits<__half>(bits))
                                   : __bfloat162float(fromBits<__nv_bfloat16>(bits));
}

void Tensor::set(int64_t index, float value)
{
    unsigned char* const at = bytes.data() + static_cast<size_t>(index) * elementSize(type);
    if (type == DataType::kFLOAT)
    {
        std::memcpy(at, &value, 4);
        return;
    }
    if (elementSize(type) == 1)
    {
        // Any code will do for a test's input, as long as it is finite.
        *at = static_cast<unsigned char>(static_cast<int>(value * 100.0F) & (type == DataType::kFP8 ? 0xBF : 0xFF));
        return;
    }
    __half const half = __float2half_rn(value);
    __nv_bfloat16 const brain = __float2bfloat16_rn(value);
    std::memcpy(at, type == DataType::kHALF ? static_cast<void const*>(&half) : &brain, 2);
}

int64_t& Tensor::integer(int64_t index)
{
    return reinterpret_cast<int64_t*>(bytes.data())[index];
}

Tensor& Tensor::randomise(uint32_t seed)
{
    std::mt19937 random(seed);
    for (int64_t i = 0; i < elements(); ++i)
    {
        set(i, static_cast<float>(random() % 2001) / 1000.0F - 1.0F);
    }
    return *this;
}

Dims dims(Shape const& shape)
{
    Dims out{};
    out.nbDims = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i)
    {
        out.d[i] = shape[i];
    }
    return out;
}

std::string describe(IPluginV3& plugin)
{
    auto& runtime
        = *static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginFieldCollection const* const fields = runtime.getFieldsToSerialize();
    std::string out;
    for (int32_t i = 0; i < fields->nbFields; ++i)
    {
        PluginField const& field = fields->fields[i];
        double const value = field.type == PluginFieldType::kFLOAT32 ? *static_cast<float const*>(field.data)
                                                                     : *static_cast<int32_t const*>(field.data);
        out += std::string(field.name) + "=" + std::to_string(value) + ";";
    }
    return out;
}
} // namespace harness

int main(int argc, char** argv)
{
    std::string const missing = harness::noDevice();
    if (!missing.empty())
    {
        std::printf("no GPU: %s\n", missing.c_str());
        return 77;
    }
    setLoggerFinder(&harness::recorder());
    int ran = 0;
    for (harness::Test const& test : harness::tests())
    {
        if (argc > 1 && std::strcmp(argv[1], test.name) != 0)
        {
            continue;
        }
        std::printf("%s\n", test.name);
        std::fflush(stdout);
        harness::takeLog();
        test.body();
        ++ran;
    }
    std::printf("%d tests passed\n", ran);
    return ran > 0 ? 0 : 1;
}
