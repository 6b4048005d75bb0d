/* The nine C functions that TensorRT's Python bindings link, so that the real bindings import without TensorRT.
 *
 * Makers return null: enums, signatures and docstrings are real, a Builder or Runtime cannot be made, there is no plugin
 * registry, and nothing can be built or run.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void* createInferBuilder_INTERNAL(void* logger, int32_t version) { return NULL; }
void* createInferRefitter_INTERNAL(void* engine, void* logger, int32_t version) { return NULL; }
void* createInferRuntime_INTERNAL(void* logger, int32_t version) { return NULL; }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int32_t version) { return NULL; }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int32_t version) { return NULL; }
void* getPluginRegistry(void) { return NULL; }
void* getBuilderPluginRegistry(int32_t capability) { return NULL; }
bool initLibNvInferPlugins(void* logger, char const* namespace_) { return true; }
int32_t getNvOnnxParserVersion(void) { return 0; }
