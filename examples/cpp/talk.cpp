// A chat in texts, without Python: each line of the standard input is what the user says.
//
//     talk BUNDLE [MAX_NEW_TOKENS [BUDGET [NATIVE_LIBRARY]]] < lines
//
// SEMKV_ONNXRUNTIME and SEMKV_GENAI name ONNX Runtime's library and onnxruntime-genai's, else the loader finds them.
// Ctrl-C ends a reply; what was said stays.
#include <semkv/semkv_text.hpp>

#include <csignal>
#include <iostream>
#include <string>

namespace
{
volatile std::sig_atomic_t gStopped = 0;

int talk(int count, char** arguments)
{
    semkv::BundleOptions of;
    of.nativeLibrary = count > 4 ? arguments[4] : ""; // code that runs here: only where somebody names it
    semkv::Bundle const bundle(arguments[1], of);
    semkv::Text const text(bundle);
    semkv::SessionOptions options;
    options.budget = count > 3 ? std::stod(arguments[3]) : 0; // 0: the smallest that was built
    semkv::Session session = bundle.session(options);
    semkv::GenerateOptions how;
    how.maxNewTokens = count > 2 ? std::stoi(arguments[2]) : 128;
    how.bundleStops = false;
    how.stopIds = text.stopIds(); // the chat template's as well
    semkv::Messages messages;
    for (std::string line; std::getline(std::cin, line);)
    {
        gStopped = 0;
        messages.push_back({"user", line});
        // The cache has earlier turns: only what the template writes behind the last reply is new.
        semkv::Ids const ids = messages.size() > 1 ? text.following(messages) : text.opening(messages);
        semkv::TextStream stream = text.stream();
        std::string reply;
        auto const show = [&](std::string const& piece) {
            std::cout << piece << std::flush;
            reply += piece;
        };
        std::cout << "> " << line << std::endl;
        session.generate(ids, how, [&](int32_t, int32_t token) {
            show(stream.push(token));
            return gStopped == 0;
        });
        show(stream.flush());
        session.endTurn();
        messages.push_back({"assistant", reply});
        std::cout << std::endl;
    }
    return 0;
}
} // namespace

int main(int count, char** arguments)
{
    if (count < 2)
    {
        std::cerr << "usage: talk BUNDLE [MAX_NEW_TOKENS [BUDGET [NATIVE_LIBRARY]]] < lines\n";
        return 2;
    }
    std::signal(SIGINT, [](int) { gStopped = 1; });
    try
    {
        return talk(count, arguments);
    }
    catch (std::exception const& error)
    {
        std::cerr << "talk: " << error.what() << '\n';
        return 1;
    }
}
