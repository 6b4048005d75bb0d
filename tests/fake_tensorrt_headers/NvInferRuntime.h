// The part of TensorRT's runtime that docs/cpp/run_engine.cpp uses. An engine is a text of lines
// "input|output|host NAME TYPE DIM...", TYPE by its number; running it fills output i with input i's bytes, reversed.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

inline int fake_version(int part) {
    std::stringstream version(std::getenv("FAKE_TENSORRT"));
    std::string text;
    for (int i = 0; i <= part; ++i) std::getline(version, text, '.');
    return std::atoi(text.c_str());
}

inline std::int32_t getInferLibMajorVersion() { return fake_version(0); }
inline std::int32_t getInferLibMinorVersion() { return fake_version(1); }
inline std::int32_t getInferLibPatchVersion() { return fake_version(2); }
inline std::int32_t getInferLibBuildVersion() { return fake_version(3); }

namespace nvinfer1 {

enum class DataType { kFLOAT = 0, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64 };
enum class TensorIOMode { kNONE, kINPUT, kOUTPUT };
enum class TensorLocation { kDEVICE, kHOST };

struct Dims {
    std::int32_t nbDims = 0;
    std::int64_t d[8] = {};
};

class ILogger {
public:
    enum class Severity { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};

struct FakeTensor {
    std::string name;
    TensorIOMode mode;
    TensorLocation location;
    DataType type;
    Dims dims;
    std::size_t bytes;
};

using FakeTensors = std::vector<FakeTensor>;

class IExecutionContext {
public:
    explicit IExecutionContext(const FakeTensors& tensors) : tensors_(tensors) {}

    bool setTensorAddress(const char* name, void* data) {
        bound_[name] = static_cast<unsigned char*>(data);
        return true;
    }

    bool enqueueV3(cudaStream_t) {
        std::vector<const FakeTensor*> inputs, outputs;
        for (const FakeTensor& tensor : tensors_) {
            if (bound_.count(tensor.name) == 0) return false;
            (tensor.mode == TensorIOMode::kINPUT ? inputs : outputs).push_back(&tensor);
        }
        for (std::size_t i = 0; i < outputs.size(); ++i) {
            const unsigned char* from = bound_[inputs[i]->name];
            unsigned char* to = bound_[outputs[i]->name];
            for (std::size_t k = 0; k < outputs[i]->bytes; ++k) to[k] = from[outputs[i]->bytes - 1 - k];
        }
        return true;
    }

private:
    const FakeTensors& tensors_;
    std::map<std::string, unsigned char*> bound_;
};

class ICudaEngine {
public:
    FakeTensors tensors;

    std::int32_t getNbIOTensors() const { return static_cast<std::int32_t>(tensors.size()); }
    TensorIOMode getTensorIOMode(const char* name) const { return find(name).mode; }
    Dims getTensorShape(const char* name) const { return find(name).dims; }
    DataType getTensorDataType(const char* name) const { return find(name).type; }
    TensorLocation getTensorLocation(const char* name) const { return find(name).location; }
    IExecutionContext* createExecutionContext() { return new IExecutionContext(tensors); }

private:
    const FakeTensor& find(const std::string& name) const {
        static const FakeTensor none{"", TensorIOMode::kNONE, TensorLocation::kDEVICE, DataType::kFLOAT, {}, 0};
        for (const FakeTensor& tensor : tensors)
            if (tensor.name == name) return tensor;
        return none;
    }
};

class IRuntime {
public:
    explicit IRuntime(ILogger& logger) : logger_(logger) {}

    ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) {
        const std::size_t sizes[] = {4, 2, 1, 4, 1, 1, 1, 2, 8};
        std::stringstream lines(std::string(static_cast<const char*>(blob), size));
        std::string line, mode, name;
        auto* engine = new ICudaEngine();
        while (std::getline(lines, line)) {
            std::stringstream words(line);
            int type = -1;
            if (!(words >> mode >> name >> type)) {
                logger_.log(ILogger::Severity::kERROR, "this is no engine");
                delete engine;
                return nullptr;
            }
            const auto location = mode == "host" ? TensorLocation::kHOST : TensorLocation::kDEVICE;
            const auto kind = mode == "output" ? TensorIOMode::kOUTPUT : TensorIOMode::kINPUT;
            FakeTensor tensor{name, kind, location, static_cast<DataType>(type), {}, sizes[type]};
            while (words >> tensor.dims.d[tensor.dims.nbDims])
                tensor.bytes *= static_cast<std::size_t>(tensor.dims.d[tensor.dims.nbDims++]);
            engine->tensors.push_back(tensor);
        }
        return engine;
    }

private:
    ILogger& logger_;
};

inline IRuntime* createInferRuntime(ILogger& logger) { return new IRuntime(logger); }

}  // namespace nvinfer1
