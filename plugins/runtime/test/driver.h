// What the tests' program does: a scenario from the standard input, and one of threads.
#pragma once

#include "semkv/semkv.hpp"

#include <string>

namespace semkv::test
{
// Two sessions of a bundle generate in two threads, and a third thread cancels one of them. Returns the exit status.
int runThreads(Bundle const& bundle, int32_t rows);

// Reads a prompt's ids from the standard input, gives it to every row, and prints the lower quartile of greedy steps,
// in milliseconds, and the first row's tokens.
int runBench(Session& session, int32_t steps);
} // namespace semkv::test
