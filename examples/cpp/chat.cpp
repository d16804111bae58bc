// A chat in token ids, without Python: each line of the standard input is a turn's ids, each line printed a reply's.
//
//     chat BUNDLE [MAX_NEW_TOKENS [BUDGET [NATIVE_LIBRARY]]] < turns
//
// ONNX Runtime's library is found by SEMKV_ONNXRUNTIME, or by the loader. `talk.py` beside this file makes ids of
// texts, and texts of ids: a tokenizer is the host's own choice. Ctrl-C ends a reply; what was said stays.
#include <semkv/semkv.hpp>

#include <csignal>
#include <iostream>
#include <sstream>
#include <string>

namespace
{
volatile std::sig_atomic_t gStopped = 0;

semkv::Ids parsed(std::string const& line)
{
    semkv::Ids ids;
    std::istringstream words(line);
    for (int32_t id = 0; words >> id;)
    {
        ids.push_back(id);
    }
    return ids;
}

int chat(int count, char** arguments)
{
    semkv::BundleOptions of;
    of.nativeLibrary = count > 4 ? arguments[4] : ""; // code that runs here: only where somebody names it
    semkv::Bundle const bundle(arguments[1], of);
    semkv::SessionOptions options;
    options.budget = count > 3 ? std::stod(arguments[3]) : 0; // 0: the smallest that was built
    semkv::Session session = bundle.session(options);
    semkv::GenerateOptions how;
    how.maxNewTokens = count > 2 ? std::stoi(arguments[2]) : 128;
    for (std::string line; std::getline(std::cin, line);)
    {
        gStopped = 0;
        session.generate(parsed(line), how, [](int32_t, int32_t token) {
            std::cout << token << ' ' << std::flush;
            return gStopped == 0;
        });
        session.endTurn();
        auto const stats = session.stats();
        std::cout << std::endl;
        std::cerr << '[' << stats.position << " tokens seen, " << stats.kept_slots << " slots used, "
                  << stats.compressions << " compressions]\n";
    }
    return 0;
}
} // namespace

int main(int count, char** arguments)
{
    if (count < 2)
    {
        std::cerr << "usage: chat BUNDLE [MAX_NEW_TOKENS [BUDGET [NATIVE_LIBRARY]]] < turns\n";
        return 2;
    }
    std::signal(SIGINT, [](int) { gStopped = 1; });
    try
    {
        return chat(count, arguments);
    }
    catch (std::exception const& error)
    {
        std::cerr << "chat: " << error.what() << '\n';
        return 1;
    }
}
