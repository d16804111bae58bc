// semkv_texts: what lines of its standard input ask of libsemkv_text, answered as semkv_driver answers.
#include <semkv/semkv_text.hpp>

#include <nlohmann/json.hpp>

#include <iostream>
#include <optional>
#include <thread>

using nlohmann::json;

namespace
{
semkv::Messages messagesOf(json const& line)
{
    semkv::Messages messages;
    for (json const& each : line.at("messages"))
    {
        messages.push_back({each.at("role"), each.at("content")});
    }
    return messages;
}

semkv::Text opened(json const& line)
{
    semkv::Bundle const bundle(line.at("bundle"));
    return semkv::Text(bundle, {line.value("genai", ""), line.value("onnxruntime", "")});
}

// Pieces by token, and the rest.
json streamed(semkv::Text const& text, semkv::Ids const& ids)
{
    semkv::TextStream stream = text.stream();
    json pieces = json::array();
    for (int32_t const id : ids)
    {
        pieces.push_back(stream.push(id));
    }
    pieces.push_back(stream.flush());
    return pieces;
}

// The same text by several threads at once; whether each got the same ids.
json together(semkv::Text const& text, std::string const& from)
{
    std::vector<semkv::Ids> found(4);
    std::vector<std::thread> threads;
    for (semkv::Ids& each : found)
    {
        threads.emplace_back([&] {
            for (int i = 0; i < 20; ++i)
            {
                each = text.encode(from);
            }
        });
    }
    for (std::thread& thread : threads)
    {
        thread.join();
    }
    return found;
}

json done(semkv::Text const& text, json const& line)
{
    std::string const what = line.at("do");
    json all = json::array();
    if (what == "encode")
    {
        for (json const& each : line.at("texts"))
        {
            all.push_back(text.encode(each));
        }
        return all;
    }
    if (what == "taken")
    {
        for (json const& each : line.at("texts"))
        {
            bool taken = true;
            try
            {
                text.encode(each);
            }
            catch (semkv::Error const&)
            {
                taken = false;
            }
            all.push_back(taken);
        }
        return all;
    }
    if (what == "decode" || what == "stream")
    {
        for (json const& each : line.at("ids"))
        {
            all.push_back(what == "decode" ? json(text.decode(each)) : streamed(text, each));
        }
        return all;
    }
    if (what == "encode_bytes")
    {
        std::string bytes; // of a text that JSON cannot have
        for (int const byte : line.at("bytes"))
        {
            bytes += static_cast<char>(byte);
        }
        return text.encode(bytes);
    }
    if (what == "together")
    {
        return together(text, line.at("text"));
    }
    if (what == "stops")
    {
        return text.stopIds();
    }
    if (what == "render")
    {
        return text.render(messagesOf(line), line.at("prompt"));
    }
    return what == "opening" ? text.opening(messagesOf(line)) : text.following(messagesOf(line));
}
} // namespace

int main()
{
    std::optional<semkv::Text> text;
    for (std::string asked; std::getline(std::cin, asked);)
    {
        json answer;
        try
        {
            json const line = json::parse(asked);
            if (line.at("do") == "open")
            {
                text.reset();
                text.emplace(opened(line));
                answer = {{"ok", nullptr}};
            }
            else
            {
                answer = {{"ok", done(text.value(), line)}};
            }
        }
        catch (semkv::Error const& error)
        {
            answer = {{"code", error.code()}, {"error", error.what()}};
        }
        catch (std::exception const& error)
        {
            answer = {{"code", -1}, {"error", error.what()}};
        }
        std::cout << answer.dump() << std::endl;
    }
    return 0;
}
