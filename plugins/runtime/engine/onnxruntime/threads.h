// How many threads are worth having.
#pragma once

#include <cstdint>

namespace semkv::runtime
{
// CPUs that the scheduler gives this process: its affinity, cut by the quota of its control group; 1 at least.
int64_t usableCpus();
} // namespace semkv::runtime
