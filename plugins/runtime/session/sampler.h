// Choosing the next token from logits, as semkv_deploy/runtime/sampling.py does: the same seed draws the same tokens.
#pragma once

#include <cstdint>
#include <vector>

namespace semkv::runtime
{
// NumPy's default_rng(seed): PCG64 seeded by SeedSequence.
class Random
{
public:
    explicit Random(uint64_t seed);

    double uniform(); // [0,1), 53 bits

private:
    unsigned __int128 mState = 0, mIncrement = 0;
};

struct Sampling
{
    double temperature = 0; // 0: greedy
    double topP = 1;
    int64_t topK = 0; // 0: all
    uint64_t seed = 0;
};

class Sampler
{
public:
    // Throws SEMKV_BAD_ARGUMENT for what is out of range.
    explicit Sampler(Sampling const& how);

    // A token of [vocab] logits; ties go to the lowest id. Throws SEMKV_RUNTIME where logits are not finite numbers.
    int64_t choose(float const* logits, int64_t vocab);

    // Draws as for a row that does not generate: rows draw in order, so that a batch is reproducible as a whole.
    void skip();

private:
    Sampling mHow;
    Random mRandom;
};
} // namespace semkv::runtime
