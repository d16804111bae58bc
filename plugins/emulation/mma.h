// mma.sync.aligned.m16n8k16.row.col with float32 accumulators and 16-bit elements, by the fragment layouts of the PTX ISA:
// groupID = lane >> 2, threadID_in_group = lane % 4; elements 2i and 2i + 1 of a fragment are the lower and the upper half of
// its register i.
#pragma once

#include "half_types.h"

namespace semkv::emulation
{
inline float widen(__half v)
{
    return __half2float(v);
}
inline float widen(__nv_bfloat16 v)
{
    return __bfloat162float(v);
}

template <typename T>
float elementOfFragment(uint32_t const* registers, int i)
{
    return widen(T{static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2))});
}

template <typename T>
void mma16816(float (&c)[4], unsigned const (&a)[4], unsigned b0, unsigned b1)
{
    LaneWords const* const lanes = warpShare({{a[0], a[1], a[2], a[3], b0, b1}});
    int const groupId = lane() >> 2;
    int const threadInGroup = lane() % 4;
    // Row of c: groupID for c0, c1, groupID + 8 for c2, c3. Column: threadID_in_group * 2 + (i & 1).
    float rows[2][16];
    float columns[2][16];
    for (int half = 0; half < 2; ++half)
    {
        for (int k = 0; k < 16; ++k)
        {
            // a(row, k): of the lane with groupID = row % 8 and threadID_in_group = k % 8 / 2, element k & 1, plus 2 for
            // rows from 8 on, plus 4 for k from 8 on.
            rows[half][k] = elementOfFragment<T>(
                lanes[groupId * 4 + k % 8 / 2].word, (k & 1) + 2 * half + (k >= 8 ? 4 : 0));
            // b(k, column): of the lane with groupID = column and threadID_in_group = k % 8 / 2, element k & 1, plus 2 for
            // k from 8 on.
            columns[half][k] = elementOfFragment<T>(
                lanes[(threadInGroup * 2 + half) * 4 + k % 8 / 2].word + 4, (k & 1) + (k >= 8 ? 2 : 0));
        }
    }
    for (int i = 0; i < 4; ++i)
    {
        for (int k = 0; k < 16; ++k)
        {
            c[i] += rows[i / 2][k] * columns[i % 2][k];
        }
    }
}
} // namespace semkv::emulation
