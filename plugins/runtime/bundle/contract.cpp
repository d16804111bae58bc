#include "bundle/contract.h"

#include <algorithm>
#include <set>

namespace semkv::runtime
{
bool Buffer::hasSlots() const
{
    return std::find(dims.begin(), dims.end(), "C") != dims.end();
}

Shape Buffer::sizes(CacheGroup const& group, int64_t batch, int64_t headDim) const
{
    Shape shape;
    for (std::string const& dim : dims)
    {
        shape.push_back(dim == "B" ? batch
                : dim == "Hkv"     ? group.heads
                : dim == "C"       ? group.capacity
                : dim == "D"       ? headDim
                                   : std::stoll(dim));
    }
    return shape;
}

std::string Binding::named(std::string const& pattern, size_t group, size_t groups)
{
    std::string number = std::to_string(group);
    size_t const width = std::max<size_t>(2, std::to_string(groups - 1).size());
    number.insert(0, width - std::min(width, number.size()), '0');
    std::string name = pattern;
    std::string const tag = "{group}";
    for (size_t at = name.find(tag); at != std::string::npos; at = name.find(tag, at + number.size()))
    {
        name.replace(at, tag.size(), number);
    }
    return name;
}

namespace
{
TensorSpec const* find(std::vector<TensorSpec> const& tensors, std::string const& name)
{
    for (TensorSpec const& tensor : tensors)
    {
        if (tensor.name == name)
        {
            return &tensor;
        }
    }
    return nullptr;
}
} // namespace

TensorSpec const* Graph::input(std::string const& named) const
{
    return find(inputs, named);
}

TensorSpec const* Graph::output(std::string const& named) const
{
    return find(outputs, named);
}

Graph const& Program::ofPhase(bool prompt) const
{
    for (Graph const& graph : graphs)
    {
        if (graph.phase == (prompt ? "prefill" : "decode"))
        {
            return graph;
        }
    }
    return graphs.front();
}

Graph const& Program::forGroup(size_t group) const
{
    return *std::find_if(graphs.begin(), graphs.end(), [&](Graph const& graph) {
        return std::find(graph.groups.begin(), graph.groups.end(), static_cast<int64_t>(group)) != graph.groups.end();
    });
}

Buffer const* Contract::buffer(std::string const& name) const
{
    auto const found
        = std::find_if(buffers.begin(), buffers.end(), [&](Buffer const& each) { return each.name == name; });
    return found == buffers.end() ? nullptr : &*found;
}

StepInput const* Contract::stepInput(std::string const& name) const
{
    auto const found
        = std::find_if(stepInputs.begin(), stepInputs.end(), [&](StepInput const& each) { return each.name == name; });
    return found == stepInputs.end() ? nullptr : &*found;
}

int64_t Contract::capacity() const
{
    int64_t most = 0;
    for (CacheGroup const& group : groups)
    {
        most = std::max(most, group.capacity);
    }
    return most;
}

std::vector<std::string> Contract::exchanged() const
{
    std::set<std::string> found;
    for (auto const& [name, program] : programs)
    {
        for (auto const& [buffer, binding] : program.buffers)
        {
            if (!program.ofGroup || !binding.input || !binding.output)
            {
                continue;
            }
            std::string const source = Binding::named(*binding.input, 0, groups.size());
            std::string const result = Binding::named(*binding.output, 0, groups.size());
            for (Graph const& graph : program.graphs)
            {
                auto const alias = graph.aliases.find(source);
                if (alias == graph.aliases.end() || alias->second != result)
                {
                    found.insert(buffer);
                }
            }
        }
    }
    return {found.begin(), found.end()};
}

// As semkv_deploy/runtime/open.py.
std::shared_ptr<Contract const> larger(std::shared_ptr<Contract const> const& contract, int64_t capacity)
{
    auto const refuse = [&](char const* what, std::string const& expected, char const* fix) {
        throw Error(SEMKV_BAD_ARGUMENT, what)
            .where("capacity")
            .expected(expected)
            .got(std::to_string(capacity))
            .fix(fix);
    };
    if (contract->batch)
    {
        refuse("graphs of static shapes have the capacity that they were built with", "none for " + contract->target,
            "read in a session of onnxruntime-cpu, or in one of a larger budget");
    }
    for (BehaviourSpec const& behaviour : contract->behaviours)
    {
        auto const* const rule = std::get_if<BlockRule>(&behaviour);
        if (rule != nullptr && !rule->program.empty())
        {
            refuse("a table of blocks has the size that it was built with", "none for a method that chooses blocks",
                "build with a larger budget");
        }
    }
    if (capacity < contract->capacity() || capacity > kMost)
    {
        refuse("not a capacity for this budget", std::to_string(contract->capacity()) + " slots or more", "");
    }
    auto made = std::make_shared<Contract>(*contract);
    for (CacheGroup& group : made->groups)
    {
        group.capacity = capacity;
    }
    return made;
}
} // namespace semkv::runtime
