// In place of libtensorrt_rtx.so.1 under TensorRT-RTX's Python module: every function of its objects' implementations
// notes its place in the virtual table. What the module calls where is what the library's headers say.
#include <cstdint>
#include <utility>

namespace
{
enum Kind
{
    kRuntime,
    kEngine,
    kContext
};

constexpr int kPlaces = 100;
int gCalled = -1;

struct Implementation
{
    void* const* table;
};

struct Object
{
    explicit Object(Implementation* of)
        : implementation(of)
    {
    }

    virtual ~Object() = default; // the module asks for the object's type

    Implementation* implementation;
};

extern Object gObjects[3];

// Answers as what the module needs of each kind's functions: the runtime makes an engine, the engine a context or a text.
template <int OfKind, int Place>
intptr_t function()
{
    gCalled = Place;
    return OfKind == kContext ? 1 : reinterpret_cast<intptr_t>(&gObjects[OfKind + 1]);
}

template <int OfKind, int... Place>
void* const* tableOf(std::integer_sequence<int, Place...>)
{
    static void* const table[]{reinterpret_cast<void*>(&function<OfKind, Place>)...};
    return table;
}

using All = std::make_integer_sequence<int, kPlaces>;
Implementation gImplementations[3]{{tableOf<kRuntime>(All())}, {tableOf<kEngine>(All())}, {tableOf<kContext>(All())}};
Object gObjects[3]{Object(&gImplementations[0]), Object(&gImplementations[1]), Object(&gImplementations[2])};
} // namespace

extern "C" {
int called()
{
    return std::exchange(gCalled, -1);
}

void* createInferRuntime_INTERNAL(void*, int32_t)
{
    return &gObjects[kRuntime];
}

void* createInferBuilder_INTERNAL(void*, int32_t)
{
    return nullptr;
}

void* createInferRefitter_INTERNAL(void*, void*, int32_t)
{
    return nullptr;
}

int32_t getInferLibMajorVersion()
{
    return 1;
}

void* getPluginRegistry()
{
    return nullptr;
}

void* getBuilderPluginRegistry(int32_t)
{
    return nullptr;
}

void* getLogger()
{
    return nullptr;
}

// semkv::runtime::placesOf, for the test to compare with.
int place(int which);
}

#include "engine/tensorrt/places.h"

extern "C" int place(int which)
{
    auto const places = semkv::runtime::placesOf(1, 7);
    int const all[]{places.hostCode, places.deserialize, places.tensorCount, places.tensorName, places.aliasedInput,
        places.createContext, places.setProfile, places.setShape, places.setAddress, places.enqueue};
    return all[which];
}
