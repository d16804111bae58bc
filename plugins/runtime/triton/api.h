// The functions of Triton's server that this backend calls: declarations of our own, because Triton's headers are in
// no package, and a backend links no library of Triton's: its functions are found in the server that loads it. From
// backend API 1.19 (Triton 2.51) on.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct TRITONSERVER_Error;
struct TRITONSERVER_Message;
struct TRITONSERVER_Metric;
struct TRITONSERVER_MetricFamily;
struct TRITONSERVER_Parameter;
struct TRITONBACKEND_Backend;
struct TRITONBACKEND_Model;
struct TRITONBACKEND_ModelInstance;
struct TRITONBACKEND_Input;
struct TRITONBACKEND_Output;
struct TRITONBACKEND_Request;
struct TRITONBACKEND_Response;
struct TRITONBACKEND_ResponseFactory;

// Enumerations, as the C functions take them.
using TritonCode = int32_t;
using TritonDataType = int32_t;
using TritonMemory = int32_t;

constexpr uint32_t kTritonMajor = 1, kTritonMinor = 19;
constexpr TritonCode kTritonInternal = 1, kTritonNotFound = 2, kTritonInvalid = 3, kTritonUnavailable = 4,
                     kTritonCancelled = 7;
constexpr TritonDataType kTritonBool = 1, kTritonUint64 = 5, kTritonInt32 = 8, kTritonInt64 = 9, kTritonFp32 = 11,
                         kTritonBytes = 13;
constexpr TritonMemory kTritonCpu = 0;
constexpr uint32_t kTritonFinal = 1;      // of a response's flags: no more follow
constexpr uint32_t kTritonReleaseAll = 1; // of a request
constexpr uint32_t kTritonSequenceStart = 1, kTritonSequenceEnd = 2; // flags of a request in a sequence
constexpr int32_t kTritonCounter = 0, kTritonGauge = 1;
constexpr int32_t kTritonString = 0; // type of a parameter
constexpr int32_t kTritonLogWarn = 1, kTritonLogError = 2;

TRITONSERVER_Error* TRITONSERVER_ErrorNew(TritonCode code, char const* text);
void TRITONSERVER_ErrorDelete(TRITONSERVER_Error* error);
char const* TRITONSERVER_ErrorMessage(TRITONSERVER_Error* error);
TRITONSERVER_Error* TRITONSERVER_MessageSerializeToJson(
    TRITONSERVER_Message* message, char const** text, size_t* bytes);
TRITONSERVER_Error* TRITONSERVER_MessageDelete(TRITONSERVER_Message* message);
TRITONSERVER_Error* TRITONSERVER_LogMessage(int32_t level, char const* file, int line, char const* text);
TRITONSERVER_Parameter* TRITONSERVER_ParameterNew(char const* name, int32_t type, void const* value);
void TRITONSERVER_ParameterDelete(TRITONSERVER_Parameter* parameter);
TRITONSERVER_Error* TRITONSERVER_MetricFamilyNew(
    TRITONSERVER_MetricFamily** family, int32_t kind, char const* name, char const* description);
TRITONSERVER_Error* TRITONSERVER_MetricFamilyDelete(TRITONSERVER_MetricFamily* family);
TRITONSERVER_Error* TRITONSERVER_MetricNew(TRITONSERVER_Metric** metric, TRITONSERVER_MetricFamily* family,
    TRITONSERVER_Parameter const** labels, uint64_t labelCount);
TRITONSERVER_Error* TRITONSERVER_MetricDelete(TRITONSERVER_Metric* metric);
TRITONSERVER_Error* TRITONSERVER_MetricIncrement(TRITONSERVER_Metric* metric, double value);
TRITONSERVER_Error* TRITONSERVER_MetricSet(TRITONSERVER_Metric* metric, double value);

TRITONSERVER_Error* TRITONBACKEND_ApiVersion(uint32_t* major, uint32_t* minor);
TRITONSERVER_Error* TRITONBACKEND_ModelConfig(
    TRITONBACKEND_Model* model, uint32_t version, TRITONSERVER_Message** config);
TRITONSERVER_Error* TRITONBACKEND_ModelVersion(TRITONBACKEND_Model* model, uint64_t* version);
TRITONSERVER_Error* TRITONBACKEND_ModelRepository(TRITONBACKEND_Model* model, int32_t* kind, char const** location);
TRITONSERVER_Error* TRITONBACKEND_ModelState(TRITONBACKEND_Model* model, void** state);
TRITONSERVER_Error* TRITONBACKEND_ModelSetState(TRITONBACKEND_Model* model, void* state);
TRITONSERVER_Error* TRITONBACKEND_ModelInstanceModel(
    TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Model** model);
TRITONSERVER_Error* TRITONBACKEND_ModelInstanceReportStatistics(TRITONBACKEND_ModelInstance* instance,
    TRITONBACKEND_Request* request, bool success, uint64_t executeStart, uint64_t computeStart, uint64_t computeEnd,
    uint64_t executeEnd);
TRITONSERVER_Error* TRITONBACKEND_RequestInputCount(TRITONBACKEND_Request* request, uint32_t* count);
TRITONSERVER_Error* TRITONBACKEND_RequestInputByIndex(
    TRITONBACKEND_Request* request, uint32_t index, TRITONBACKEND_Input** input);
TRITONSERVER_Error* TRITONBACKEND_RequestCorrelationId(TRITONBACKEND_Request* request, uint64_t* id);
TRITONSERVER_Error* TRITONBACKEND_RequestCorrelationIdString(TRITONBACKEND_Request* request, char const** id);
TRITONSERVER_Error* TRITONBACKEND_RequestFlags(TRITONBACKEND_Request* request, uint32_t* flags);
TRITONSERVER_Error* TRITONBACKEND_RequestRelease(TRITONBACKEND_Request* request, uint32_t flags);
TRITONSERVER_Error* TRITONBACKEND_InputProperties(TRITONBACKEND_Input* input, char const** name, TritonDataType* type,
    int64_t const** shape, uint32_t* dimensions, uint64_t* bytes, uint32_t* buffers);
TRITONSERVER_Error* TRITONBACKEND_InputBuffer(TRITONBACKEND_Input* input, uint32_t index, void const** data,
    uint64_t* bytes, TritonMemory* memory, int64_t* memoryId);
TRITONSERVER_Error* TRITONBACKEND_ResponseFactoryNew(
    TRITONBACKEND_ResponseFactory** factory, TRITONBACKEND_Request* request);
TRITONSERVER_Error* TRITONBACKEND_ResponseFactoryDelete(TRITONBACKEND_ResponseFactory* factory);
TRITONSERVER_Error* TRITONBACKEND_ResponseFactoryIsCancelled(TRITONBACKEND_ResponseFactory* factory, bool* cancelled);
TRITONSERVER_Error* TRITONBACKEND_ResponseNewFromFactory(
    TRITONBACKEND_Response** response, TRITONBACKEND_ResponseFactory* factory);
TRITONSERVER_Error* TRITONBACKEND_ResponseOutput(TRITONBACKEND_Response* response, TRITONBACKEND_Output** output,
    char const* name, TritonDataType type, int64_t const* shape, uint32_t dimensions);
TRITONSERVER_Error* TRITONBACKEND_OutputBuffer(
    TRITONBACKEND_Output* output, void** data, uint64_t bytes, TritonMemory* memory, int64_t* memoryId);
TRITONSERVER_Error* TRITONBACKEND_ResponseSend(
    TRITONBACKEND_Response* response, uint32_t flags, TRITONSERVER_Error* error);
}
