#include "bundle/onnx_data.h"

#include "common/error.h"

#include <charconv>

namespace semkv::runtime
{
namespace
{
// A message in protobuf's wire format, read field by field.
class Message
{
public:
    Message(char const* data, size_t bytes, std::string const& where)
        : mAt(data)
        , mEnd(data + bytes)
        , mWhere(where)
    {
    }

    // The next field: its number, and its value or its bytes. False at the end.
    bool next()
    {
        if (mAt == mEnd)
        {
            return false;
        }
        uint64_t const tag = varint();
        number = tag >> 3;
        value = 0;
        bytes = 0;
        switch (tag & 7)
        {
        case 0: value = varint(); break;
        case 1: skip(8); break;
        case 2: skip(varint()); break;
        case 5: skip(4); break;
        default: reject();
        }
        return true;
    }

    Message inside() const
    {
        return Message(data, bytes, mWhere);
    }

    std::string text() const
    {
        return std::string(data, bytes);
    }

    [[noreturn]] void reject() const
    {
        throw Error(SEMKV_BAD_BUNDLE, "not an ONNX model")
            .where(mWhere)
            .fix("build the bundle again, or copy it again from where it was built");
    }

    std::string const& where() const
    {
        return mWhere;
    }

    uint64_t number = 0, value = 0;
    char const* data = nullptr;
    size_t bytes = 0;

private:
    uint64_t varint()
    {
        uint64_t result = 0;
        for (int shift = 0; shift < 64 && mAt != mEnd; shift += 7)
        {
            uint64_t const byte = static_cast<unsigned char>(*mAt++);
            result |= (byte & 0x7f) << shift;
            if (byte < 0x80)
            {
                return result;
            }
        }
        reject();
    }

    void skip(uint64_t count)
    {
        if (count > static_cast<uint64_t>(mEnd - mAt))
        {
            reject();
        }
        data = mAt;
        bytes = static_cast<size_t>(count);
        mAt += count;
    }

    char const* mAt;
    char const* mEnd;
    std::string const& mWhere;
};

using Found = std::vector<ExternalTensor>;
constexpr int kDeepest = 64;

void readTensor(Message tensor, Found& found)
{
    ExternalTensor external{"", "", 0, 0};
    bool isExternal = false;
    while (tensor.next())
    {
        if (tensor.number == 8)
        {
            external.name = tensor.text();
        }
        else if (tensor.number == 14)
        {
            isExternal = tensor.value == 1;
        }
        else if (tensor.number == 13)
        {
            std::string key, value;
            for (Message entry = tensor.inside(); entry.next();)
            {
                (entry.number == 1 ? key : value) = entry.text();
            }
            if (key == "location")
            {
                external.location = value;
            }
            else if (key == "offset" || key == "length")
            {
                int64_t& number = key == "offset" ? external.offset : external.length;
                char const* const end = value.data() + value.size();
                auto const [stop, error] = std::from_chars(value.data(), end, number);
                if (!value.empty() && (error != std::errc() || stop != end || number < 0))
                {
                    tensor.reject();
                }
            }
        }
    }
    if (isExternal)
    {
        found.push_back(external);
    }
}

void readGraph(Message graph, Found& found, int depth);

void readSparse(Message sparse, Found& found)
{
    while (sparse.next())
    {
        if (sparse.number == 1 || sparse.number == 2)
        {
            readTensor(sparse.inside(), found);
        }
    }
}

void readNode(Message node, Found& found, int depth)
{
    while (node.next())
    {
        if (node.number != 5)
        {
            continue;
        }
        for (Message attribute = node.inside(); attribute.next();)
        {
            switch (attribute.number)
            {
            case 5:
            case 10: readTensor(attribute.inside(), found); break;
            case 6:
            case 11: readGraph(attribute.inside(), found, depth + 1); break;
            case 22:
            case 23: readSparse(attribute.inside(), found); break;
            default: break;
            }
        }
    }
}

void readGraph(Message graph, Found& found, int depth)
{
    if (depth > kDeepest)
    {
        graph.reject();
    }
    while (graph.next())
    {
        switch (graph.number)
        {
        case 1: readNode(graph.inside(), found, depth); break;
        case 5: readTensor(graph.inside(), found); break;
        case 15: readSparse(graph.inside(), found); break;
        default: break;
        }
    }
}
} // namespace

std::vector<ExternalTensor> externalTensors(std::string const& model, std::string const& where)
{
    Found found;
    bool hasGraph = false;
    for (Message field(model.data(), model.size(), where); field.next();)
    {
        if (field.number == 7)
        {
            hasGraph = true;
            readGraph(field.inside(), found, 0);
        }
        else if (field.number == 20) // training_info: graphs
        {
            for (Message info = field.inside(); info.next();)
            {
                if (info.number == 1 || info.number == 2)
                {
                    readGraph(info.inside(), found, 0);
                }
            }
        }
        else if (field.number == 25) // functions: nodes
        {
            for (Message function = field.inside(); function.next();)
            {
                if (function.number == 7)
                {
                    readNode(function.inside(), found, 0);
                }
            }
        }
    }
    if (!hasGraph)
    {
        Message(model.data(), model.size(), where).reject();
    }
    return found;
}
} // namespace semkv::runtime
