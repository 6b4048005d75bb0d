// The manifest beside a TensorRT engine (ENGINE.manifest.json): what the engine takes and gives, and what it was built
// for. C++17, the standard library alone; it needs neither TensorRT nor CUDA.
#pragma once

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace t3compile {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// --- JSON (RFC 8259) ---------------------------------------------------------------------------------------------

// One value. Numbers keep their text, so that 64-bit integers stay exact; of equal keys the last one counts.
struct Json {
    enum class Kind { null, boolean, number, string, array, object };
    Kind kind = Kind::null;
    std::string text;
    std::vector<Json> items;
    std::map<std::string, Json> members;

    const Json& at(const std::string& key) const {
        const auto found = members.find(key);
        if (kind != Kind::object || found == members.end()) throw Error("the manifest has no '" + key + "'");
        return found->second;
    }

    const std::string& string(const std::string& what) const {
        if (kind != Kind::string) throw Error("'" + what + "' of the manifest is not a string");
        return text;
    }

    const std::vector<Json>& array(const std::string& what) const {
        if (kind != Kind::array) throw Error("'" + what + "' of the manifest is not a list");
        return items;
    }

    bool boolean(const std::string& what) const {
        if (kind != Kind::boolean) throw Error("'" + what + "' of the manifest is neither true nor false");
        return text == "true";
    }

    std::int64_t integer(const std::string& what) const {
        std::int64_t value = 0;
        const char* end = text.data() + text.size();
        const auto [stop, code] = std::from_chars(text.data(), end, value);
        if (kind != Kind::number || code != std::errc() || stop != end)
            throw Error("'" + what + "' of the manifest is not a 64-bit integer");
        return value;
    }
};

class JsonReader {
public:
    static Json read(const std::string& text) {
        JsonReader reader(text);
        reader.skip_space();
        Json value = reader.value(0);
        reader.skip_space();
        if (reader.at_ < text.size()) reader.fail("text after the end");
        return value;
    }

private:
    explicit JsonReader(const std::string& text) : text_(text) {}

    [[noreturn]] void fail(const std::string& why) const {
        throw Error("the manifest is not JSON: " + why + " at byte " + std::to_string(at_));
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    void skip_space() {
        while (at_ < text_.size() && std::string(" \t\n\r").find(text_[at_]) != std::string::npos) ++at_;
    }

    bool take(const std::string& word) {
        if (text_.compare(at_, word.size(), word) != 0) return false;
        at_ += word.size();
        return true;
    }

    void expect(char wanted) {
        if (peek() != wanted) fail(std::string("expected '") + wanted + "'");
        ++at_;
    }

    Json value(int depth) {
        if (depth > 100) fail("nested too deeply");
        Json made;
        const char first = peek();
        if (first == '{') {
            made.kind = Json::Kind::object;
            sequence('{', '}', [&] {
                std::string key = string();
                skip_space();
                expect(':');
                skip_space();
                made.members.insert_or_assign(std::move(key), value(depth + 1));
            });
        } else if (first == '[') {
            made.kind = Json::Kind::array;
            sequence('[', ']', [&] { made.items.push_back(value(depth + 1)); });
        } else if (first == '"') {
            made.kind = Json::Kind::string;
            made.text = string();
        } else if (take("true") || take("false")) {
            made.kind = Json::Kind::boolean;
            made.text = first == 't' ? "true" : "false";
        } else if (!take("null")) {
            made.kind = Json::Kind::number;
            made.text = number();
        }
        return made;
    }

    template <typename Item>
    void sequence(char open, char close, Item item) {
        expect(open);
        skip_space();
        if (peek() == close) {
            ++at_;
            return;
        }
        while (true) {
            item();
            skip_space();
            if (peek() == close) break;
            expect(',');
            skip_space();
        }
        ++at_;
    }

    void digits() {
        if (peek() < '0' || peek() > '9') fail("expected a value");
        while (peek() >= '0' && peek() <= '9') ++at_;
    }

    std::string number() {
        const std::size_t start = at_;
        take("-");
        if (!take("0")) digits();
        if (take(".")) digits();
        if (take("e") || take("E")) {
            if (!take("+")) take("-");
            digits();
        }
        return text_.substr(start, at_ - start);
    }

    unsigned hex4() {
        unsigned code = 0;
        const char* start = text_.data() + at_;
        const char* end = start + (text_.size() - at_ < 4 ? text_.size() - at_ : 4);
        const auto [stop, error] = std::from_chars(start, end, code, 16);
        if (error != std::errc() || stop != start + 4) fail("expected four hexadecimal digits");
        at_ += 4;
        return code;
    }

    static void append_utf8(std::string& out, unsigned code) {
        if (code < 0x80) {
            out += static_cast<char>(code);
        } else if (code < 0x800) {
            out += static_cast<char>(0xC0 | code >> 6);
            out += static_cast<char>(0x80 | (code & 0x3F));
        } else if (code < 0x10000) {
            out += static_cast<char>(0xE0 | code >> 12);
            out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
            out += static_cast<char>(0x80 | (code & 0x3F));
        } else {
            out += static_cast<char>(0xF0 | code >> 18);
            out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
            out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
            out += static_cast<char>(0x80 | (code & 0x3F));
        }
    }

    unsigned code_point() {
        const unsigned high = hex4();
        if (high < 0xD800 || high > 0xDFFF) return high;
        if (high > 0xDBFF || !take("\\u")) fail("half of a surrogate pair");
        const unsigned low = hex4();
        if (low < 0xDC00 || low > 0xDFFF) fail("half of a surrogate pair");
        return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
    }

    std::string string() {
        expect('"');
        std::string out;
        while (true) {
            if (at_ >= text_.size()) fail("a string does not end");
            const char c = text_[at_++];
            if (c == '"') return out;
            if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
            if (c != '\\') {
                out += c;
                continue;
            }
            const char escaped = peek();
            ++at_;
            const std::string plain = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
            const std::size_t index = escaped == '\0' ? std::string::npos : plain.find(escaped);
            if (escaped == 'u') {
                append_utf8(out, code_point());
            } else if (index != std::string::npos) {
                out += meant[index];
            } else {
                fail("an unknown escape");
            }
        }
    }

    const std::string& text_;
    std::size_t at_ = 0;
};

// --- the manifest ------------------------------------------------------------------------------------------------

// An input or output: dtype by numpy's name, bytes of the whole tensor, row-major.
struct Tensor {
    std::string name;
    std::vector<std::int64_t> shape;
    std::string dtype;
    std::size_t bytes = 0;
};

struct Manifest {
    std::string tensorrt_version;    // "10.13.3.9"
    std::string compute_capability;  // "9.0"
    std::uint64_t engine_bytes = 0;
    bool stripped = false;  // the weights must be put in from the ONNX file first
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
};

constexpr std::int64_t known_format = 1;

inline std::size_t element_bytes(const std::string& dtype) {
    static const std::map<std::string, std::size_t> known = {{"float32", 4}, {"float16", 2}, {"bfloat16", 2},
                                                             {"int64", 8},   {"int32", 4},   {"int8", 1},
                                                             {"uint8", 1},   {"bool", 1}};
    const auto found = known.find(dtype);
    if (found == known.end()) throw Error("dtype '" + dtype + "' is unknown");
    return found->second;
}

// Names become file names.
inline void check_name(const std::string& name) {
    const std::string allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-";
    if (name.empty() || name[0] == '.' || name.find_first_not_of(allowed) != std::string::npos)
        throw Error("'" + name + "' cannot be a tensor's name: only letters, digits, '_', '-' and '.' can");
}

inline std::vector<Tensor> read_tensors(const Json& json, const std::string& side) {
    std::vector<Tensor> tensors;
    for (const Json& row : json.at(side).array(side)) {
        Tensor tensor{row.at("name").string("name"), {}, row.at("dtype").string("dtype"), 0};
        check_name(tensor.name);
        tensor.bytes = element_bytes(tensor.dtype);
        for (const Json& item : row.at("shape").array("shape")) {
            const std::int64_t dim = item.integer("shape");
            if (dim < 1)
                throw Error("'" + tensor.name + "' has dimension " + std::to_string(dim) + ", expected 1 or more");
            if (tensor.bytes > std::numeric_limits<std::size_t>::max() / static_cast<std::size_t>(dim))
                throw Error("'" + tensor.name + "' is larger than memory can be");
            tensor.bytes *= static_cast<std::size_t>(dim);
            tensor.shape.push_back(dim);
        }
        tensors.push_back(std::move(tensor));
    }
    return tensors;
}

inline Manifest parse_manifest(const std::string& text) {
    const Json json = JsonReader::read(text);
    const std::int64_t format = json.at("format").integer("format");
    if (format != known_format)
        throw Error("the manifest has format " + std::to_string(format) + ", this program reads " +
                    std::to_string(known_format) + ": build both anew from one version of t3compile");
    Manifest manifest;
    manifest.tensorrt_version = json.at("tensorrt_version").string("tensorrt_version");
    manifest.compute_capability = json.at("compute_capability").string("compute_capability");
    manifest.engine_bytes = static_cast<std::uint64_t>(json.at("engine_bytes").integer("engine_bytes"));
    manifest.stripped = json.at("stripped").boolean("stripped");
    manifest.inputs = read_tensors(json, "inputs");
    manifest.outputs = read_tensors(json, "outputs");
    return manifest;
}

inline std::vector<char> read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    const std::streamoff size = file ? static_cast<std::streamoff>(file.tellg()) : -1;
    if (size < 0) throw Error("cannot read '" + path + "'");
    std::vector<char> bytes(static_cast<std::size_t>(size));
    file.seekg(0);
    if (!file.read(bytes.data(), size)) throw Error("cannot read '" + path + "'");
    return bytes;
}

inline Manifest read_manifest(const std::string& path) {
    const std::vector<char> bytes = read_file(path);
    return parse_manifest(std::string(bytes.begin(), bytes.end()));
}

// An engine runs with the TensorRT and on the kind of GPU that it was built with, and nowhere else. `version` has four
// numbers; the manifest's may have fewer.
inline void check_tensorrt(const Manifest& manifest, const std::string& version) {
    if ((version + ".").rfind(manifest.tensorrt_version + ".", 0) != 0)
        throw Error("the engine was built by TensorRT " + manifest.tensorrt_version + " and this is TensorRT " +
                    version + ": build it again, or install that version");
}

inline void check_capability(const Manifest& manifest, const std::string& capability) {
    if (manifest.compute_capability != capability)
        throw Error("the engine was built for compute capability " + manifest.compute_capability +
                    " and this GPU has " + capability + ": build it again on a GPU like this one");
}

// A raw little-endian file that must hold exactly this tensor.
inline std::vector<char> read_tensor(const Tensor& tensor, const std::string& path) {
    std::vector<char> bytes = read_file(path);
    if (bytes.size() != tensor.bytes)
        throw Error("'" + path + "' has " + std::to_string(bytes.size()) + " bytes, and the input '" + tensor.name +
                    "' needs " + std::to_string(tensor.bytes));
    return bytes;
}

// Written beside and renamed: a file of that name is whole.
inline void write_file(const std::string& path, const std::vector<char>& bytes) {
    const std::string part = path + ".part";
    std::ofstream file(part, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
    if (!file || std::rename(part.c_str(), path.c_str()) != 0) {
        std::remove(part.c_str());
        throw Error("cannot write '" + path + "'");
    }
}

}  // namespace t3compile
