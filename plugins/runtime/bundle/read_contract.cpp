// Reads a contract, and refuses one whose parts contradict each other: nothing is allocated for it then.
#include "bundle/contract.h"

#include <algorithm>
#include <set>

namespace semkv::runtime
{
namespace
{
Type typeOf(Field const& field)
{
    std::string const name = field.text({"float32", "float16", "bfloat16", "int8", "int64"});
    return name == "float32" ? Type::kFloat32
        : name == "float16"  ? Type::kFloat16
        : name == "bfloat16" ? Type::kBFloat16
        : name == "int8"     ? Type::kInt8
                             : Type::kInt64;
}

std::vector<TensorSpec> readTensors(Field const& field)
{
    std::vector<TensorSpec> tensors;
    for (size_t i = 0; i < field.size(); ++i)
    {
        Field const tensor = field.at(i);
        tensor.only({"name", "dtype", "shape"});
        TensorSpec spec{tensor.at("name").text(), typeOf(tensor.at("dtype")), {}, {}};
        Field const shape = tensor.at("shape");
        for (size_t d = 0; d < shape.size(); ++d)
        {
            spec.shape.push_back(shape.at(d).isText() ? -1 : shape.at(d).integer(0, INT32_MAX));
            spec.symbols.push_back(shape.at(d).isText() ? shape.at(d).text() : "");
        }
        tensors.push_back(std::move(spec));
    }
    return tensors;
}

Graph readGraph(Field const& field, size_t groups)
{
    field.only({"name", "phase", "onnx", "plan", "groups", "inputs", "outputs", "aliases", "profiles"});
    Graph graph;
    graph.name = field.at("name").text();
    graph.phase = field.at("phase").text({"decoder", "prefill", "decode", "compressor"});
    graph.onnx = field.at("onnx").text();
    if (!isInside(graph.onnx))
    {
        field.at("onnx").contradicts("a path inside the bundle", graph.onnx);
    }
    graph.groups = field.at("groups").integers(0, static_cast<int64_t>(groups) - 1);
    graph.inputs = readTensors(field.at("inputs"));
    graph.outputs = readTensors(field.at("outputs"));
    Field const aliases = field.at("aliases");
    for (std::string const& source : aliases.names())
    {
        graph.aliases[source] = aliases.at(source).text();
    }
    readEngine(field, graph);
    return graph;
}

// Whether a tensor has a buffer's shape, or the same bytes with the heads in the batch axis.
bool fits(TensorSpec const& tensor, Buffer const& buffer, CacheGroup const& group, int64_t headDim)
{
    Shape const wanted = buffer.sizes(group, -1, headDim);
    if (tensor.type != buffer.type || tensor.shape.size() != wanted.size() || wanted.size() < 2)
    {
        return false;
    }
    auto const same = [&](size_t first) {
        for (size_t i = first; i < wanted.size(); ++i)
        {
            if (tensor.shape[i] >= 0 && wanted[i] >= 0 && tensor.shape[i] != wanted[i])
            {
                return false;
            }
        }
        return true;
    };
    bool const folded = tensor.shape[1] == 1 && (tensor.shape[0] < 0 || tensor.shape[0] % group.heads == 0);
    return same(0) || (folded && same(2));
}

void checkBindings(Field const& field, Contract const& contract, Program const& program, Graph const& graph)
{
    for (int64_t const number : graph.groups)
    {
        CacheGroup const& group = contract.groups[static_cast<size_t>(number)];
        for (auto const& [name, binding] : program.buffers)
        {
            Buffer const& buffer = *contract.buffer(name);
            auto const check = [&](std::optional<std::string> const& pattern, bool input) {
                if (!pattern)
                {
                    return;
                }
                std::string const tensor
                    = Binding::named(*pattern, static_cast<size_t>(number), contract.groups.size());
                TensorSpec const* found = input ? graph.input(tensor) : graph.output(tensor);
                // What is only read may not be taken; a decoder without slot_bias counts every live slot once.
                bool const needed = (name == "key" || name == "value") && binding.output;
                if (found == nullptr ? needed : !fits(*found, buffer, group, contract.headDim))
                {
                    field.contradicts("a tensor " + tensor + " of the shape and type of buffer " + name,
                        found == nullptr ? "none" : listed(found->shape));
                }
            };
            check(binding.input, true);
            check(binding.output, false);
        }
    }
}

Program readProgram(Field const& field, Contract const& contract)
{
    field.only({"scope", "buffers", "graphs"});
    Program program;
    program.ofGroup = field.at("scope").text({"cache", "group"}) == "group";
    Field const buffers = field.at("buffers");
    for (std::string const& name : buffers.names())
    {
        if (contract.buffer(name) == nullptr)
        {
            buffers.contradicts("buffers of cache.buffers", name);
        }
        Field const binding = buffers.at(name);
        Binding& bound = program.buffers[name];
        for (auto const& [side, pattern] : {std::pair{"input", &bound.input}, std::pair{"output", &bound.output}})
        {
            if (binding.has(side))
            {
                *pattern = binding.at(side).text();
            }
        }
    }
    Field const graphs = field.at("graphs");
    std::set<int64_t> covered;
    for (size_t i = 0; i < graphs.size(); ++i)
    {
        program.graphs.push_back(readGraph(graphs.at(i), contract.groups.size()));
        covered.insert(program.graphs.back().groups.begin(), program.graphs.back().groups.end());
        checkBindings(graphs.at(i), contract, program, program.graphs.back());
    }
    if (covered.size() != contract.groups.size())
    {
        graphs.contradicts("a graph for every group", "graphs for " + std::to_string(covered.size()));
    }
    return program;
}

// A decoder takes what a session gives it, and gives logits.
void checkDecoder(Field const& programs, Contract const& contract, Graph const& graph)
{
    std::set<std::string> const given{"input_ids", "position_ids", "logits_index", "length"};
    for (std::string const& name : given)
    {
        TensorSpec const* tensor = graph.input(name);
        if (tensor == nullptr || tensor->type != Type::kInt64)
        {
            programs.contradicts("an input " + name + " of graph " + graph.name + ", int64",
                tensor == nullptr ? "none of that name" : nameOf(tensor->type));
        }
    }
    for (TensorSpec const& tensor : graph.inputs)
    {
        bool known = given.count(tensor.name) > 0 || contract.stepInput(tensor.name) != nullptr;
        for (auto const& [name, binding] : contract.programs.at(kDecode).buffers)
        {
            for (size_t group = 0; !known && binding.input && group < contract.groups.size(); ++group)
            {
                known = Binding::named(*binding.input, group, contract.groups.size()) == tensor.name;
            }
        }
        if (!known)
        {
            programs.contradicts("inputs of graph " + graph.name + " that a host has", tensor.name);
        }
    }
    TensorSpec const* logits = graph.output("logits");
    if (logits == nullptr || logits->type != Type::kFloat32 || logits->shape.size() != 3
        || (logits->shape[2] >= 0 && logits->shape[2] != contract.vocabSize))
    {
        programs.contradicts("an output logits, float32 [batch, rows, vocabulary]", "another, or none");
    }
}
} // namespace

bool isInside(std::string const& path)
{
    if (path.empty() || path.front() == '/' || path.back() == '/')
    {
        return false;
    }
    for (unsigned char const letter : path)
    {
        if (letter < 0x20 || letter == 0x7f || letter == '\\' || letter == ':')
        {
            return false;
        }
    }
    std::string const whole = "/" + path + "/";
    return whole.find("//") == std::string::npos && whole.find("/./") == std::string::npos
        && whole.find("/../") == std::string::npos;
}

Contract readContract(Field const& field)
{
    field.at("schema_version").integer(kSchemaVersion, kSchemaVersion);
    field.only({"schema_version", "target", "budget", "batch", "max_context", "prefill_chunk", "dtype", "native",
        "engine_layout", "layers", "kv_heads", "query_heads", "head_dim", "vocab_size", "windows", "stop_ids",
        "delimiters", "cache", "programs", "behaviours"});
    Contract contract;
    contract.target = field.at("target").text();
    contract.budget = field.at("budget").number(0, 1);
    if (field.has("batch"))
    {
        contract.batch = field.at("batch").integer(1, 1 << 16);
    }
    contract.maxContext = field.at("max_context").integer(1, INT32_MAX);
    contract.prefillChunk = field.at("prefill_chunk").integer(1, INT32_MAX);
    contract.dtype = typeOf(field.at("dtype"));
    if (field.has("native"))
    {
        contract.native = field.at("native").integer(1, INT32_MAX);
    }
    contract.headDim = field.at("head_dim").integer(1, 1 << 16);
    contract.vocabSize = field.at("vocab_size").integer(1, INT32_MAX);
    for (int64_t const id : field.at("stop_ids").integers(0, INT32_MAX))
    {
        contract.stopIds.push_back(static_cast<int32_t>(id));
    }
    contract.delimiters = field.at("delimiters").text();
    if (!isInside(contract.delimiters))
    {
        field.at("delimiters").contradicts("a path inside the bundle", contract.delimiters);
    }
    readLayout(field.at("cache"), contract);
    Field const programs = field.at("programs");
    for (std::string const& name : programs.names())
    {
        contract.programs[name] = readProgram(programs.at(name), contract);
    }
    if (contract.programs.count(kDecode) == 0)
    {
        programs.contradicts("a program decode", "none");
    }
    for (Graph const& graph : contract.programs[kDecode].graphs)
    {
        checkDecoder(programs, contract, graph);
    }
    Field const behaviours = field.at("behaviours");
    for (size_t i = 0; i < behaviours.size(); ++i)
    {
        contract.behaviours.push_back(readBehaviour(behaviours.at(i), contract));
    }
    return contract;
}
} // namespace semkv::runtime
