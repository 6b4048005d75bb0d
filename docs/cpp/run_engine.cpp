// Runs a TensorRT engine that `t3compile build-engine` wrote, without Python:
//
//     run_engine model.engine hidden_states=hidden_states.bin timestep=timestep.bin ... [--output FOLDER] [--repeat N]
//
// Inputs are raw little-endian files of the manifest's dtypes (NumPy: array.tofile); outputs are written the same way,
// as FOLDER/NAME.bin. The engine's manifest lies beside it as model.engine.manifest.json. No plugin library is needed,
// as is reported of plugins compiled ahead of time, which are part of the engine. Build it with
//
//     g++ -std=c++17 -O2 run_engine.cpp -I$TENSORRT/include -I$CUDA/include -L$TENSORRT/lib -L$CUDA/lib64
//         -lnvinfer -lcudart -o run_engine
//
// or with the CMakeLists.txt beside it. This file was compiled against the headers of TensorRT 10.13, 10.16 and 11.1; it
// was not run with TensorRT on a GPU, and that no plugin library is needed was not tried.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <iostream>
#include <memory>

#include "manifest.h"

namespace {

using t3compile::Error;
using t3compile::Manifest;
using t3compile::Tensor;

void check(cudaError_t code, const char* what) {
    if (code != cudaSuccess) throw Error(std::string(what) + " failed: " + cudaGetErrorString(code));
}

class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << "TensorRT: " << message << "\n";
    }
};

std::string library_version() {
    return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
           std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
}

std::string device_capability() {
    int device = 0, major = 0, minor = 0;
    check(cudaGetDevice(&device), "finding a GPU");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking the GPU");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking the GPU");
    return std::to_string(major) + "." + std::to_string(minor);
}

std::string dtype_name(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return "float32";
        case nvinfer1::DataType::kHALF: return "float16";
        case nvinfer1::DataType::kBF16: return "bfloat16";
        case nvinfer1::DataType::kINT64: return "int64";
        case nvinfer1::DataType::kINT32: return "int32";
        case nvinfer1::DataType::kINT8: return "int8";
        case nvinfer1::DataType::kUINT8: return "uint8";
        case nvinfer1::DataType::kBOOL: return "bool";
        default: return "a dtype of TensorRT with number " + std::to_string(static_cast<int>(type));
    }
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
    std::string text = "[";
    for (const std::int64_t dim : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
    return text + "]";
}

class DeviceBuffer {
public:
    explicit DeviceBuffer(std::size_t bytes) { check(cudaMalloc(&data_, bytes), "allocating GPU memory"); }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;
    ~DeviceBuffer() { cudaFree(data_); }
    void* data() const { return data_; }

private:
    void* data_ = nullptr;
};

// The engine must have exactly this tensor, in GPU memory.
void check_tensor(const nvinfer1::ICudaEngine& engine, const Tensor& tensor, nvinfer1::TensorIOMode mode) {
    const char* name = tensor.name.c_str();
    if (engine.getTensorIOMode(name) != mode)
        throw Error("the engine has no such input or output as the manifest's '" + tensor.name + "'");
    const nvinfer1::Dims dims = engine.getTensorShape(name);
    const std::vector<std::int64_t> shape(dims.d, dims.d + std::max(dims.nbDims, 0));
    const std::string dtype = dtype_name(engine.getTensorDataType(name));
    if (shape != tensor.shape || dtype != tensor.dtype)
        throw Error("'" + tensor.name + "' is " + dtype + " " + shape_text(shape) + " in the engine and " +
                    tensor.dtype + " " + shape_text(tensor.shape) +
                    " in the manifest: the two files do not belong together");
    if (engine.getTensorLocation(name) != nvinfer1::TensorLocation::kDEVICE)
        throw Error("'" + tensor.name + "' is a shape tensor on the host, which this program does not bind");
}

struct Arguments {
    std::string engine;
    std::map<std::string, std::string> inputs;
    std::string output = ".";
    int repeat = 1;
};

Arguments parse_arguments(int count, char** given) {
    Arguments arguments;
    const std::string usage = "usage: run_engine ENGINE NAME=FILE... [--output FOLDER] [--repeat N]";
    for (int i = 1; i < count; ++i) {
        const std::string word = given[i];
        const std::size_t equals = word.find('=');
        if (word == "--output" || word == "--repeat") {
            if (++i == count) throw Error(word + " needs a value; " + usage);
            if (word == "--output") {
                arguments.output = given[i];
                continue;
            }
            const char* end = given[i] + std::strlen(given[i]);
            const auto [stop, code] = std::from_chars(given[i], end, arguments.repeat);
            if (code != std::errc() || stop != end || arguments.repeat < 1)
                throw Error("--repeat is '" + std::string(given[i]) + "', expected 1 or more");
        } else if (arguments.engine.empty()) {
            arguments.engine = word;
        } else if (equals != std::string::npos) {
            arguments.inputs[word.substr(0, equals)] = word.substr(equals + 1);
        } else {
            throw Error("'" + word + "' is not NAME=FILE; " + usage);
        }
    }
    if (arguments.engine.empty()) throw Error(usage);
    return arguments;
}

std::vector<std::vector<char>> read_inputs(const Manifest& manifest, const Arguments& arguments) {
    std::vector<std::vector<char>> values;
    for (const Tensor& tensor : manifest.inputs) {
        const auto found = arguments.inputs.find(tensor.name);
        if (found == arguments.inputs.end())
            throw Error("input '" + tensor.name + "' is missing: " + tensor.dtype + " " + shape_text(tensor.shape));
        values.push_back(t3compile::read_tensor(tensor, found->second));
    }
    for (const auto& given : arguments.inputs) {
        const auto is_it = [&](const Tensor& tensor) { return tensor.name == given.first; };
        if (std::none_of(manifest.inputs.begin(), manifest.inputs.end(), is_it))
            throw Error("the engine has no input '" + given.first + "'");
    }
    return values;
}

// Milliseconds of each call on the GPU, without the copies; one call before to warm up.
std::vector<float> run_timed(nvinfer1::IExecutionContext& context, int repeat) {
    cudaStream_t stream = nullptr;
    cudaEvent_t begin = nullptr, end = nullptr;
    check(cudaStreamCreate(&stream), "creating a stream");
    check(cudaEventCreate(&begin), "creating an event");
    check(cudaEventCreate(&end), "creating an event");
    std::vector<float> times;
    for (int call = 0; call <= repeat; ++call) {
        float milliseconds = 0;
        check(cudaEventRecord(begin, stream), "running the engine");
        if (!context.enqueueV3(stream)) throw Error("TensorRT refused to run the engine; its messages are above");
        check(cudaEventRecord(end, stream), "running the engine");
        check(cudaStreamSynchronize(stream), "running the engine");
        check(cudaEventElapsedTime(&milliseconds, begin, end), "timing the engine");
        if (call > 0) times.push_back(milliseconds);
    }
    check(cudaEventDestroy(begin), "ending");
    check(cudaEventDestroy(end), "ending");
    check(cudaStreamDestroy(stream), "ending");
    return times;
}

void run(const Arguments& arguments) {
    const Manifest manifest = t3compile::read_manifest(arguments.engine + ".manifest.json");
    if (manifest.stripped)
        throw Error("the engine has no weights (--strip-weights): this program cannot put them in; build it with them");
    const std::vector<std::vector<char>> inputs = read_inputs(manifest, arguments);
    t3compile::check_tensorrt(manifest, library_version());
    t3compile::check_capability(manifest, device_capability());

    Logger logger;
    const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
    if (!runtime) throw Error("TensorRT did not start");
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    {
        const std::vector<char> plan = t3compile::read_file(arguments.engine);
        if (plan.size() != manifest.engine_bytes)
            throw Error("'" + arguments.engine + "' has " + std::to_string(plan.size()) +
                        " bytes and its manifest describes " + std::to_string(manifest.engine_bytes) +
                        ": copy both files again");
        engine.reset(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    }
    if (!engine) throw Error("TensorRT cannot load '" + arguments.engine + "'; its messages are above");
    const std::size_t known = manifest.inputs.size() + manifest.outputs.size();
    if (static_cast<std::size_t>(engine->getNbIOTensors()) != known)
        throw Error("the engine has " + std::to_string(engine->getNbIOTensors()) +
                    " inputs and outputs, the manifest " + std::to_string(known) + ": the two files do not belong together");
    for (const Tensor& tensor : manifest.inputs) check_tensor(*engine, tensor, nvinfer1::TensorIOMode::kINPUT);
    for (const Tensor& tensor : manifest.outputs) check_tensor(*engine, tensor, nvinfer1::TensorIOMode::kOUTPUT);
    const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
    if (!context) throw Error("TensorRT cannot make an execution context: too little GPU memory?");

    std::vector<std::unique_ptr<DeviceBuffer>> buffers;
    const auto bind = [&](const Tensor& tensor) {
        buffers.push_back(std::make_unique<DeviceBuffer>(tensor.bytes));
        if (!context->setTensorAddress(tensor.name.c_str(), buffers.back()->data()))
            throw Error("TensorRT refused memory for '" + tensor.name + "'");
    };
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        bind(manifest.inputs[i]);
        check(cudaMemcpy(buffers[i]->data(), inputs[i].data(), inputs[i].size(), cudaMemcpyHostToDevice),
              "copying an input");
    }
    for (const Tensor& tensor : manifest.outputs) bind(tensor);

    std::vector<float> times = run_timed(*context, arguments.repeat);
    for (std::size_t i = 0; i < manifest.outputs.size(); ++i) {
        const Tensor& tensor = manifest.outputs[i];
        std::vector<char> bytes(tensor.bytes);
        check(cudaMemcpy(bytes.data(), buffers[inputs.size() + i]->data(), bytes.size(), cudaMemcpyDeviceToHost),
              "copying an output");
        const std::string path = arguments.output + "/" + tensor.name + ".bin";
        t3compile::write_file(path, bytes);
        std::cout << path << ": " << tensor.dtype << " " << shape_text(tensor.shape) << "\n";
    }
    std::sort(times.begin(), times.end());
    std::cout << "median " << times[times.size() / 2] << " ms, fastest " << times.front() << " ms over " << times.size()
              << " calls\n";
}

}  // namespace

int main(int count, char** given) {
    try {
        run(parse_arguments(count, given));
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 2;
    }
    return 0;
}
