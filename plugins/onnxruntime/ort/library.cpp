#include "library.h"

namespace semkv::native
{
OrtStatus* registerOperators(Library const& library, OrtSessionOptions* options, OrtApiBase const* base)
{
    OrtApi const* api = base->GetApi(library.ortVersion);
    if (api == nullptr)
    {
        std::string const message = std::string(library.name) + ": expected ONNX Runtime " + library.ortRelease
            + " or newer, got an older one: update it";
        return base->GetApi(1)->CreateStatus(ORT_FAIL, message.c_str());
    }
    setOrt(*api);
    return guarded([&] {
        // One domain for all sessions; ONNX Runtime keeps what it needs of it.
        static OrtCustomOpDomain* const domain = [&] {
            static auto* const operators = new std::vector<std::unique_ptr<Operator>>(library.operators());
            OrtCustomOpDomain* made = nullptr;
            check(ort().CreateCustomOpDomain("semkv", &made));
            for (auto const& op : *operators)
            {
                check(ort().CustomOpDomain_Add(made, op.get()));
            }
            return made;
        }();
        check(ort().AddCustomOpDomain(options, domain));
    });
}
} // namespace semkv::native
