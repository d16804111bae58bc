#include "text/tokenizer.h"

#include "common/error.h"
#include "text/nfc.h"
#include "text/utf8.h"

#include <nlohmann/json.hpp>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include <stdlib.h>

namespace semkv::text
{
namespace fs = std::filesystem;
using nlohmann::json;
using runtime::Error;

namespace
{
// The least with which the library's tokenizer opens a folder. None of it says anything about the tokenizer.
char const* const kConfig = R"({"model": {"type": "decoder", "context_length": 1}})";

// A folder that only this user can read, gone at the end.
class TemporaryFolder
{
public:
    TemporaryFolder()
    {
        std::string pattern = (fs::temp_directory_path() / "semkv_text.XXXXXX").string();
        if (::mkdtemp(&pattern[0]) == nullptr)
        {
            throw Error(SEMKV_RUNTIME, std::string("no temporary folder can be made: ") + std::strerror(errno))
                .where(pattern)
                .fix("set TMPDIR to a folder that can be written");
        }
        mPath = pattern;
    }

    TemporaryFolder(TemporaryFolder const&) = delete;
    TemporaryFolder& operator=(TemporaryFolder const&) = delete;

    ~TemporaryFolder()
    {
        std::error_code ignored;
        fs::remove_all(mPath, ignored);
    }

    std::string path() const
    {
        return mPath.string();
    }

    void write(std::string const& name, std::string const& content) const
    {
        fs::create_directories((mPath / name).parent_path());
        std::ofstream file(mPath / name, std::ios::binary);
        file << content;
        file.close();
        if (!file)
        {
            throw Error(SEMKV_RUNTIME, "cannot be written")
                .where((mPath / name).string())
                .fix("set TMPDIR to a folder that has room");
        }
    }

private:
    fs::path mPath;
};

bool bringsTemplate(std::map<std::string, std::string> const& files)
{
    if (files.count("chat_template.jinja") > 0)
    {
        return true;
    }
    auto const config = files.find("tokenizer_config.json");
    json const read = config != files.end() ? json::parse(config->second, nullptr, false) : json();
    return read.is_object() && read.contains("chat_template") && !read["chat_template"].empty();
}
} // namespace

Tokenizer::Tokenizer(
    Genai const& genai, Kind kind, std::map<std::string, std::string> const& files, std::string const& where)
    : mGenai(genai)
    , mKind(std::move(kind))
    , mTokenizer(nullptr, genai.destroyTokenizer)
    , mHasTemplate(bringsTemplate(files))
{
    TemporaryFolder const folder;
    for (auto const& [name, content] : files)
    {
        folder.write(name, content);
    }
    folder.write("genai_config.json", kConfig);
    OgaTokenizer* made = nullptr;
    genai.check(genai.createTokenizer(folder.path().c_str(), &made), "onnxruntime-genai cannot read the tokenizer",
        where.c_str(), SEMKV_NO_TARGET);
    mTokenizer.reset(made);
    char const* const key = "add_special_tokens";
    char const* const value = "false";
    genai.check(genai.updateOptions(made, &key, &value, 1), "onnxruntime-genai does not take an option",
        "add_special_tokens", SEMKV_RUNTIME);
}

Ids Tokenizer::encode(std::string const& text) const
{
    requireUtf8(text, "text");
    if (mKind.nfc && !isSurelyNfc(text))
    {
        throw Error(SEMKV_BAD_ARGUMENT, "not surely in Unicode's form NFC, to which this tokenizer brings texts first")
            .where("text")
            .expected("a text without combining marks that may join a letter")
            .fix("normalize it, and leave out marks that no letter of Unicode's has");
    }
    std::lock_guard<std::mutex> const guard(mLock);
    OgaSequences* made = nullptr;
    mGenai.check(mGenai.createSequences(&made), "onnxruntime-genai fails", "text", SEMKV_RUNTIME);
    std::unique_ptr<OgaSequences, void (*)(OgaSequences*)> const sequences(made, mGenai.destroySequences);
    mGenai.check(mGenai.encode(mTokenizer.get(), text.c_str(), made), "onnxruntime-genai cannot encode it", "text",
        SEMKV_RUNTIME);
    int32_t const* const ids = mGenai.sequenceData(made, 0);
    return Ids(ids, ids + mGenai.sequenceCount(made, 0));
}

Ids Tokenizer::encodeAlone(std::string const& text) const
{
    if (!mKind.around.empty())
    {
        throw Error(SEMKV_BAD_ARGUMENT, "what the tokenizer puts around a text is not known here")
            .where("tokenizer/tokenizer.json: post_processor")
            .expected("none, ByteLevel or TemplateProcessing")
            .got(mKind.around)
            .fix("give ids, which Python's tokenizer makes");
    }
    Ids ids = mKind.before;
    Ids const own = encode(text);
    ids.insert(ids.end(), own.begin(), own.end());
    ids.insert(ids.end(), mKind.behind.begin(), mKind.behind.end());
    return ids;
}

std::string Tokenizer::render(std::vector<Message> const& messages, bool prompt) const
{
    if (!mHasTemplate)
    {
        throw Error(SEMKV_BAD_ARGUMENT, "the tokenizer has no chat template")
            .where("messages")
            .fix("encode texts as they are, or open a bundle of a chat model");
    }
    json list = json::array();
    for (size_t i = 0; i < messages.size(); ++i)
    {
        std::string const where = "messages[" + std::to_string(i) + "]";
        requireUtf8(messages[i].role, where + ".role");
        requireUtf8(messages[i].content, where + ".content");
        list.push_back({{"role", messages[i].role}, {"content", messages[i].content}});
    }
    std::lock_guard<std::mutex> const guard(mLock);
    char const* made = nullptr;
    mGenai.check(mGenai.applyChatTemplate(mTokenizer.get(), nullptr, list.dump().c_str(), nullptr, prompt, &made),
        "the chat template fails, or refuses the conversation", "messages", SEMKV_BAD_ARGUMENT);
    std::unique_ptr<char const, void (*)(char const*)> const owned(made, mGenai.destroyString);
    return made;
}
} // namespace semkv::text
