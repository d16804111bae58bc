// Errors and bundles of the C interface.
#include "c_abi/handles.h"

using namespace semkv::runtime;

semkv_error semkv::runtime::gNoMemory{SEMKV_OUT_OF_MEMORY, "out of memory: open fewer rows, or a smaller budget."};

extern "C" {
uint32_t semkv_api_version(void)
{
    return SEMKV_API_VERSION;
}

semkv_code semkv_error_code(semkv_error const* error)
{
    return error != nullptr ? error->code : SEMKV_OK;
}

char const* semkv_error_message(semkv_error const* error)
{
    return error != nullptr ? error->message.c_str() : "";
}

void semkv_error_free(semkv_error* error)
{
    if (error != &gNoMemory)
    {
        delete error;
    }
}

semkv_error* semkv_bundle_open(char const* path, semkv_bundle_options const* given, semkv_bundle** out)
{
    return guarded([&] {
        notNull(path, "path");
        notNull(out, "out");
        semkv_bundle_options const options = taken(given, "options");
        RuntimeOptions runtime{options.target != nullptr ? options.target : "onnxruntime-cpu",
            text(options.onnxruntime), text(options.native_library), text(options.native_sha256),
            text(options.tensorrt), text(options.cudart), options.allow_plugins != 0};
        checkTarget(runtime.target);
        std::string root = path;
        root.erase(std::find_if(root.rbegin(), root.rend(), [](char c) { return c != '/'; }).base(), root.end());
        auto bundle
            = std::make_shared<Bundle const>(root.empty() ? "/" : root, runtime.target, options.verify_all != 0);
        *out = new semkv_bundle{std::move(bundle), std::move(runtime)};
    });
}

void semkv_bundle_close(semkv_bundle* bundle)
{
    delete bundle;
}

char const* semkv_bundle_manifest(semkv_bundle const* bundle)
{
    return bundle != nullptr ? bundle->bundle->text().c_str() : "";
}
}
