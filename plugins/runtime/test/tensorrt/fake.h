// What the two stand-ins for NVIDIA's libraries have between them.
#pragma once

#include <cstddef>

extern "C" {
// Whether so many bytes from an address on were allocated in one piece, and not freed.
bool fake_cuda_holds(void const* address, size_t bytes);
}
