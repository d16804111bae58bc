#include "engine/onnxruntime/threads.h"

#include <algorithm>
#include <fstream>
#include <string>

#include <sched.h>

namespace semkv::runtime
{
namespace
{
// CPUs' worth of time that a control group may take; 0 where unlimited or not there (cgroup v2).
int64_t quota(std::string const& folder)
{
    std::ifstream file(folder + "/cpu.max");
    std::string most;
    double period = 0;
    if (!(file >> most >> period) || most == "max" || period <= 0 || most.find_first_not_of("0123456789") != most.npos)
    {
        return 0;
    }
    double const share = std::stod(most) / period;
    return static_cast<int64_t>(share) + (share > static_cast<double>(static_cast<int64_t>(share)) ? 1 : 0);
}
} // namespace

int64_t usableCpus()
{
    cpu_set_t set;
    CPU_ZERO(&set);
    int64_t count = ::sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
    // A container sees its own group as the root; else the path says which group it is.
    std::ifstream own("/proc/self/cgroup");
    for (std::string line; std::getline(own, line);)
    {
        std::string path = line.compare(0, 3, "0::") == 0 ? line.substr(3) : "";
        for (; !path.empty(); path = path.substr(0, path.rfind('/')))
        {
            int64_t const most = quota("/sys/fs/cgroup" + path);
            count = most > 0 ? std::min(count, most) : count;
        }
    }
    int64_t const most = quota("/sys/fs/cgroup");
    return std::max<int64_t>(1, most > 0 ? std::min(count, most) : count);
}
} // namespace semkv::runtime
