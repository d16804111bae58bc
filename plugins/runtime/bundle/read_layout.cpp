// Reads everything that a host keeps of a conversation: groups, buffers, slot columns and step inputs.
#include "bundle/contract.h"

#include <algorithm>

namespace semkv::runtime
{
namespace
{
// "B,Hkv,C,D" cut at its commas.
std::vector<std::string> dimensions(Field const& field)
{
    std::string const text = field.text();
    std::vector<std::string> dims(1);
    for (char const letter : text)
    {
        if (letter == ',')
        {
            dims.emplace_back();
        }
        else
        {
            dims.back() += letter;
        }
    }
    for (std::string const& dim : dims)
    {
        bool const number = !dim.empty() && dim.size() < 9
            && std::all_of(dim.begin(), dim.end(), [](char digit) { return digit >= '0' && digit <= '9'; });
        bool const named = dim == "B" || dim == "Hkv" || dim == "C" || dim == "D";
        if (!named && !(number && std::stoll(dim) > 0 && std::stoll(dim) <= kMost))
        {
            field.contradicts("sizes B, Hkv, C, D or numbers", text);
        }
    }
    return dims;
}

Buffer readBuffer(Field const& field, Type cache)
{
    field.only({"name", "shape", "dtype"});
    std::string const dtype = field.at("dtype").text({"T", "float32", "int64"});
    Type const type = dtype == "T" ? cache : dtype == "float32" ? Type::kFloat32 : Type::kInt64;
    return {field.at("name").text(), dimensions(field.at("shape")), type, dtype == "float32"};
}

StepInput readStepInput(Field const& field)
{
    field.only({"name", "shape", "dtype"});
    std::vector<std::string> const dims = dimensions(field.at("shape"));
    bool const byRow = dims.size() > 1 && dims.size() < 4 && dims.front() == "B";
    auto const isNumber
        = [](std::string const& dim) { return dim.find_first_not_of("0123456789") == std::string::npos; };
    if ((dims.size() != 1 && !byRow) || !std::all_of(dims.begin() + (byRow ? 1 : 0), dims.end(), isNumber))
    {
        field.contradicts("int64 of one dimension, or of B rows of one or two", field.at("shape").text());
    }
    field.at("dtype").text({"int64"});
    return {field.at("name").text(), byRow, dims.size() == 3 ? std::stoll(dims[1]) : 0, std::stoll(dims.back())};
}

} // namespace

void readLayout(Field const& field, Contract& contract)
{
    field.only({"groups", "buffers", "slot_columns", "step_inputs"});
    Field const groups = field.at("groups");
    int64_t const slots = (contract.maxContext + 63) / 64 * 64;
    for (size_t i = 0; i < groups.size(); ++i)
    {
        Field const group = groups.at(i);
        int64_t const heads = static_cast<int64_t>(group.at("heads").integers(0, 1 << 16).size());
        contract.groups.push_back(
            {group.at("layer").integer(0, 1 << 16), heads, group.at("capacity").integer(1, slots)});
        if (heads < 1)
        {
            group.contradicts("a KV head or more", "none");
        }
    }
    if (contract.groups.empty())
    {
        groups.contradicts("a group or more", "none");
    }
    auto const read = [&](char const* name, std::vector<Buffer>& into) {
        Field const list = field.at(name);
        for (size_t i = 0; i < list.size(); ++i)
        {
            into.push_back(readBuffer(list.at(i), contract.dtype));
        }
    };
    read("buffers", contract.buffers);
    read("slot_columns", contract.columns);
    for (Buffer const& column : contract.columns)
    {
        if (column.type != Type::kInt64 || column.dims.size() != 3 || column.dims[0] != "B" || column.dims[2] != "C")
        {
            field.at("slot_columns").contradicts("int64 B,1,C or B,Hkv,C", column.name);
        }
    }
    for (Buffer const& buffer : contract.buffers)
    {
        if (buffer.dims.front() != "B" || buffer.dims.size() < 3 || (buffer.hasSlots() && buffer.dims[2] != "C"))
        {
            field.at("buffers").contradicts("rows first and slots third of three dimensions or more", buffer.name);
        }
    }
    if (contract.buffer("key") == nullptr || contract.buffer("value") == nullptr)
    {
        field.at("buffers").contradicts("key and value", "others");
    }
    Field const inputs = field.at("step_inputs");
    for (size_t i = 0; i < inputs.size(); ++i)
    {
        contract.stepInputs.push_back(readStepInput(inputs.at(i)));
    }
}
} // namespace semkv::runtime
