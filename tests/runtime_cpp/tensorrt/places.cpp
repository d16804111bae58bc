// Prints for each function that libsemkv calls by place: its name, the place in the headers that this is compiled with, and
// the place that libsemkv has for their version.
#include "engine/tensorrt/places.h"

#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>

using namespace nvinfer1;

// A virtual member function's pointer is 1 + the bytes before its entry in the table (Itanium C++ ABI).
template <class Function>
int placeOf(Function function)
{
    intptr_t bytes = 0;
    std::memcpy(&bytes, &function, sizeof(bytes));
    return static_cast<int>((bytes - 1) / static_cast<intptr_t>(sizeof(void*)));
}

int main()
{
    auto const ours = semkv::runtime::placesOf(NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
    auto const print = [](char const* name, auto function, int place) {
        std::printf("%s %d %d\n", name, placeOf(function), place);
    };
    ICudaEngine* (apiv::VRuntime::*const deserialize)(void const*, std::size_t) noexcept
        = &apiv::VRuntime::deserializeCudaEngine;
    print("deserializeCudaEngine", deserialize, ours.deserialize);
    print("setEngineHostCodeAllowed", &apiv::VRuntime::setEngineHostCodeAllowed, ours.hostCode);
    print("createExecutionContext", &apiv::VCudaEngine::createExecutionContext, ours.createContext);
    print("getNbIOTensors", &apiv::VCudaEngine::getNbIOTensors, ours.tensorCount);
    print("getIOTensorName", &apiv::VCudaEngine::getIOTensorName, ours.tensorName);
    print("setOptimizationProfileAsync", &apiv::VExecutionContext::setOptimizationProfileAsync, ours.setProfile);
    print("setInputShape", &apiv::VExecutionContext::setInputShape, ours.setShape);
    print("setTensorAddress", &apiv::VExecutionContext::setTensorAddress, ours.setAddress);
    print("enqueueV3", &apiv::VExecutionContext::enqueueV3, ours.enqueue);
    print("log", &ILogger::log, semkv::functionPlaces(NV_TENSORRT_MAJOR).log);
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 15
    print("getAliasedInputTensor", &apiv::VCudaEngine::getAliasedInputTensor, ours.aliasedInput);
#endif
    static_assert(sizeof(Dims) == sizeof(semkv::runtime::TrtDims), "setInputShape takes other shapes");
    static_assert(offsetof(Dims, d) == offsetof(semkv::runtime::TrtDims, sizes), "setInputShape takes other shapes");
    static_assert(static_cast<int>(ExecutionContextAllocationStrategy::kSTATIC) == 0, "contexts are made otherwise");
    static_assert(static_cast<int>(ILogger::Severity::kERROR) == 1, "errors are told otherwise");
    return 0;
}
