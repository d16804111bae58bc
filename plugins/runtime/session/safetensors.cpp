#include "session/safetensors.h"

#include "common/sha256.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>

#include <sys/stat.h>
#include <unistd.h>

namespace semkv::runtime
{
using nlohmann::json;

namespace
{
constexpr uint64_t kHeaderLimit = 100'000'000; // bytes, as the safetensors library has it

char const* formatName(Type type)
{
    switch (type)
    {
    case Type::kFloat32: return "F32";
    case Type::kFloat16: return "F16";
    case Type::kBFloat16: return "BF16";
    case Type::kInt8: return "I8";
    default: return "I64";
    }
}

Error damaged(std::string const& path, std::string const& what)
{
    return Error(SEMKV_ALTERED_FILE, "not a saved session, or a damaged one").where(path).got(what);
}

Type typeOf(std::string const& name, std::string const& path)
{
    for (Type const type : {Type::kFloat32, Type::kFloat16, Type::kBFloat16, Type::kInt8, Type::kInt64})
    {
        if (name == formatName(type))
        {
            return type;
        }
    }
    throw damaged(path, "a tensor of type " + name);
}

Array readTensor(json const& entry, char const* data, size_t bytes, std::string const& path)
{
    json const& offsets = entry.at("data_offsets");
    uint64_t const first = offsets.at(0).get<uint64_t>(), last = offsets.at(1).get<uint64_t>();
    Type const type = typeOf(entry.at("dtype").get<std::string>(), path);
    Shape shape;
    uint64_t count = 1;
    for (json const& size : entry.at("shape"))
    {
        uint64_t const each = size.get<uint64_t>();
        if (!size.is_number_unsigned() || each > bytes || (each > 0 && count > bytes / each))
        {
            throw damaged(path, "a tensor of impossible shape");
        }
        count *= each;
        shape.push_back(static_cast<int64_t>(each));
    }
    if (first > last || last > bytes || last - first != count * bytesOf(type))
    {
        throw damaged(path, "a tensor outside the file");
    }
    Array array(type, shape);
    std::memcpy(array.data.data(), data + first, array.data.size());
    return array;
}
} // namespace

std::string digestOf(Feeds const& tensors)
{
    Sha256 digest;
    for (auto const& [name, array] : tensors) // by name
    {
        digest.update(name + " " + nameOf(array.type) + " " + listed(array.shape));
        digest.update(array.data.data(), array.data.size());
    }
    return digest.digest();
}

void writeTensors(std::string const& path, SavedTensors const& saved)
{
    json header = json::object();
    header["__metadata__"] = saved.metadata;
    uint64_t end = 0;
    for (auto const& [name, array] : saved.tensors)
    {
        header[name] = {{"dtype", formatName(array.type)}, {"shape", array.shape},
            {"data_offsets", {end, end + array.data.size()}}};
        end += array.data.size();
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    uint64_t const length = text.size();
    size_t const slash = path.rfind('/') + 1; // 0 where there is none
    std::string const partial
        = path.substr(0, slash) + "." + path.substr(slash) + "." + std::to_string(std::random_device{}()) + ".partial";
    std::ofstream file(partial, std::ios::binary | std::ios::trunc);
    for (int i = 0; i < 8; ++i)
    {
        file.put(static_cast<char>(length >> (8 * i) & 0xff));
    }
    file << text;
    for (auto const& [name, array] : saved.tensors)
    {
        file.write(reinterpret_cast<char const*>(array.data.data()), static_cast<std::streamsize>(array.data.size()));
    }
    file.close();
    if (!file || std::rename(partial.c_str(), path.c_str()) != 0)
    {
        int const error = errno;
        ::unlink(partial.c_str());
        throw Error(SEMKV_RUNTIME, std::string("cannot be written: ") + std::strerror(error))
            .where(path)
            .fix("give another path");
    }
}

namespace
{
// A file's beginning: the JSON of its tensors, and the bytes of all of them, which begin where the stream stands then.
std::pair<json, uint64_t> readHeader(std::ifstream& file, std::string const& path)
{
    struct stat status = {};
    if (::stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode))
    {
        throw Error(SEMKV_ALTERED_FILE, "no such file")
            .where(path)
            .expected("a file that semkv_session_save or Session.save wrote");
    }
    uint64_t const bytes = static_cast<uint64_t>(status.st_size);
    file.open(path, std::ios::binary);
    unsigned char begin[8] = {};
    file.read(reinterpret_cast<char*>(begin), sizeof(begin));
    uint64_t length = 0;
    for (size_t i = 0; i < sizeof(begin); ++i)
    {
        length |= static_cast<uint64_t>(begin[i]) << (8 * i);
    }
    if (!file || length > kHeaderLimit || length > bytes - sizeof(begin))
    {
        throw damaged(path, std::to_string(bytes) + " bytes");
    }
    std::string text(static_cast<size_t>(length), '\0');
    file.read(text.data(), static_cast<std::streamsize>(text.size()));
    json header = json::parse(text, nullptr, false);
    if (!file || !header.is_object())
    {
        throw damaged(path, "a header that is none");
    }
    return {std::move(header), bytes - sizeof(begin) - length};
}
} // namespace

std::map<std::string, std::string> readMetadata(std::string const& path)
{
    std::ifstream file;
    auto const [header, bytes] = readHeader(file, path);
    try
    {
        uint64_t end = 0;
        for (auto const& [name, entry] : header.items())
        {
            end = name == "__metadata__" ? end : std::max(end, entry.at("data_offsets").at(1).get<uint64_t>());
        }
        if (end != bytes)
        {
            throw damaged(path, std::to_string(bytes) + " bytes of tensors");
        }
        return header.value("__metadata__", std::map<std::string, std::string>{});
    }
    catch (json::exception const& error)
    {
        throw damaged(path, "a header that is none");
    }
}

SavedTensors readTensors(std::string const& path)
{
    std::ifstream file;
    auto const [header, bytes] = readHeader(file, path);
    std::string content(static_cast<size_t>(bytes), '\0');
    file.read(content.data(), static_cast<std::streamsize>(content.size()));
    if (!file)
    {
        throw damaged(path, "a file that ends too early");
    }
    SavedTensors saved;
    try
    {
        for (auto const& [name, entry] : header.items())
        {
            if (name == "__metadata__")
            {
                saved.metadata = entry.get<std::map<std::string, std::string>>();
                continue;
            }
            saved.tensors[name] = readTensor(entry, content.data(), content.size(), path);
        }
    }
    catch (json::exception const& error)
    {
        throw damaged(path, "a header that is none");
    }
    return saved;
}
} // namespace semkv::runtime
