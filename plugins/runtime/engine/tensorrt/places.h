// TensorRT's interfaces as this library calls them: by place in a virtual table, because the tables of TensorRT 10, of 11
// and of TensorRT-RTX differ, and one build of this library runs with each. So no TensorRT header is needed to build it.
//
// An object that the runtime gives out has its implementation behind its own table's pointer; the functions lie in the
// implementation's table, behind two entries of its destructor. The places of 10 and 11 were read from the headers of
// 10.14, 10.15, 10.16 and 11.1; those of TensorRT-RTX 1 from the calls that its Python module makes. Tests compare:
// tests/runtime_cpp/tensorrt/test_places.py.
#pragma once

#include "../../../common/runtime_abi.h"

#include <cstdint>

namespace semkv::runtime
{
struct Places
{
    // IRuntime
    int deserialize; // deserializeCudaEngine(void const* blob, size_t size)
    int hostCode;    // setEngineHostCodeAllowed(bool)
    // ICudaEngine
    int createContext; // createExecutionContext(ExecutionContextAllocationStrategy)
    int tensorCount;   // getNbIOTensors()
    int tensorName;    // getIOTensorName(int32_t)
    int aliasedInput;  // getAliasedInputTensor(char const*); -1: this version has none
    // IExecutionContext
    int setProfile; // setOptimizationProfileAsync(int32_t, cudaStream_t)
    int setShape;   // setInputShape(char const*, Dims const&)
    int setAddress; // setTensorAddress(char const*, void*)
    int enqueue;    // enqueueV3(cudaStream_t)
};

// Of TensorRT 10 and 11, and of TensorRT-RTX 1, which counts as `major` 1.
inline Places placesOf(int32_t major, int32_t minor)
{
    return major == 10 ? Places{3, 21, 5, 30, 31, minor >= 15 ? 58 : -1, 17, 21, 24, 37}
                       : Places{3, 20, 5, 26, 27, 50, 16, 20, 23, 36};
}

// As nvinfer1::Dims, since TensorRT 10.
struct TrtDims
{
    int32_t count = 0;
    int64_t sizes[8]{};
};

// Calls a function of an interface's implementation.
template <typename Result, typename... Arguments>
Result callImplementation(void* object, int place, Arguments... arguments)
{
    return callVirtual<Result>(static_cast<void**>(object)[1], place, arguments...);
}

// As `delete`: the second entry of an object's own table.
inline void deleteObject(void* object)
{
    if (object != nullptr)
    {
        callVirtual<void>(object, 1);
    }
}
} // namespace semkv::runtime
