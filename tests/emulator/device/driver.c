// A libcuda.so.1 that has one device and no hardware: modules are PTX, and whoever sets the hooks
// below gets each function that is loaded and each launch. It answers what Triton's driver calls,
// but for clusters, which no kernel here uses.

#include "../core/tensor_map.h"
#include "cuda.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

struct Function {
  int dynamic_shared;  // the most that a launch may ask for
  _Bool waits;         // for the launch before, which has perhaps not ended when it begins
};

// Returns a handle's error as CUDA's; called where a kernel is loaded.
typedef int (*LoadHook)(uint64_t function, const char* ptx, const char* name);
typedef int (*LaunchHook)(uint64_t function, const uint32_t grid[3], uint32_t threads,
                          uint32_t shared_bytes, uint64_t stream, void** parameters);
typedef _Bool (*OwnsHook)(uint64_t address);

static LoadHook load_hook;
static LaunchHook launch_hook;
static OwnsHook owns_hook;
static int arch, multiprocessors, shared_memory;
static char last_error[768] = "unknown error";  // Triton's buffer holds 1024 bytes
static char context;

API void driver_set(LoadHook load, LaunchHook launch, OwnsHook owns, int new_arch,
                    int new_multiprocessors, int new_shared_memory) {
  load_hook = load;
  launch_hook = launch;
  owns_hook = owns;
  arch = new_arch;
  multiprocessors = new_multiprocessors;
  shared_memory = new_shared_memory;
}

// What the next error is called.
API void driver_set_error(const char* text) { snprintf(last_error, sizeof last_error, "%s", text); }

static CUresult refuse(CUresult code, const char* text) {
  driver_set_error(text);
  return code;
}

API CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

API CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = last_error;
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult code, const char** text) {
  *text = last_error;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = arch / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = arch % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_memory; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = shared_memory + 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 3201000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 6144; break;
    default: return refuse(CUDA_ERROR_NOT_SUPPORTED, "an attribute that the fake driver lacks");
  }
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

API CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }

API CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext* current, CUdevice device) {
  return cuCtxGetCurrent(current);
}

API CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

API CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadData(CUmodule* module, const void* ptx) {
  *module = (CUmodule)strdup(ptx);
  return CUDA_SUCCESS;
}

API CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  struct Function* made = calloc(1, sizeof *made);
  made->dynamic_shared = 48 * 1024;
  made->waits = strstr((const char*)module, "griddepcontrol.wait") != NULL;
  *function = (CUfunction)made;
  return load_hook((uint64_t)made, (const char*)module, name);
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > shared_memory)
      return refuse(CUDA_ERROR_INVALID_VALUE, "invalid argument: shared memory");
    ((struct Function*)function)->dynamic_shared = value;
  }
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute,
                                   CUdeviceptr pointer) {
  if (!owns_hook(pointer))
    return refuse(CUDA_ERROR_INVALID_VALUE, "invalid argument: memory of the host");
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}

// Refuses what the driver's documentation does: strides grow, each a multiple of the one before.
API CUresult cuTensorMapEncodeTiled(CUtensorMap* made, CUtensorMapDataType type, cuuint32_t rank,
                                    void* base, const cuuint64_t* sizes, const cuuint64_t* strides,
                                    const cuuint32_t* box, const cuuint32_t* steps,
                                    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                    CUtensorMapL2promotion promotion,
                                    CUtensorMapFloatOOBfill outside) {
  const _Bool is_half =
      type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!is_half || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      swizzle > CU_TENSOR_MAP_SWIZZLE_128B || outside != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return refuse(CUDA_ERROR_NOT_SUPPORTED, "a descriptor that the fake driver lacks");
  if (rank < 1 || rank > MOST_DIMENSIONS || (uint64_t)base % 16)
    return refuse(CUDA_ERROR_INVALID_VALUE, "invalid argument: a descriptor's rank or address");
  struct TensorMap map = {.magic = TENSOR_MAP_MAGIC,
                          .dimensions = rank,
                          .element = 2,
                          .base = (uint64_t)base,
                          .swizzle = swizzle ? 16u << swizzle : 0};
  uint64_t inner = map.element, extent = map.element;  // the last stride, and what it spans
  for (unsigned i = 0; i < rank; i++) {
    const uint64_t stride = i ? strides[i - 1] : map.element;
    if (i && (stride % 16 || stride >> 40 || stride % inner || stride < extent))
      return refuse(CUDA_ERROR_INVALID_VALUE, "invalid argument: a descriptor's strides");
    if (!sizes[i] || sizes[i] > INT32_MAX || !box[i] || box[i] > 256 || steps[i] != 1)
      return refuse(CUDA_ERROR_INVALID_VALUE, "invalid argument: a descriptor's sizes or box");
    map.strides[i] = inner = stride;
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    extent = stride * sizes[i];
  }
  const uint32_t row = box[0] * map.element;
  if (row % 16 || (map.swizzle && row > map.swizzle))
    return refuse(CUDA_ERROR_INVALID_VALUE, "invalid argument: the rows of a descriptor's box");
  memset(made, 0, sizeof *made);
  memcpy(made, &map, sizeof map);
  return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function,
                                          const CUlaunchConfig* config) {
  *count = 1;
  return CUDA_SUCCESS;
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                              void** extra) {
  const uint32_t grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffff || grid[1] > 65535 ||
      grid[2] > 65535)
    return refuse(CUDA_ERROR_INVALID_VALUE, "invalid argument: the grid");
  if (config->blockDimX > 1024 || config->blockDimY != 1 || config->blockDimZ != 1)
    return refuse(CUDA_ERROR_INVALID_VALUE, "invalid argument: the block");
  if ((int)config->sharedMemBytes > ((struct Function*)function)->dynamic_shared)
    return refuse(CUDA_ERROR_INVALID_VALUE, "invalid argument: shared memory");
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      return refuse(CUDA_ERROR_NOT_SUPPORTED, "clusters, which the fake driver lacks");
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION &&
        !((struct Function*)function)->waits)
      return refuse(CUDA_ERROR_INVALID_VALUE, "an early launch of a kernel that does not wait");
  }
  return launch_hook((uint64_t)function, grid, config->blockDimX, config->sharedMemBytes,
                     (uint64_t)config->hStream, parameters);
}

API CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z,
                            unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                            CUstream stream, void** parameters, void** extra) {
  CUlaunchConfig config = {.gridDimX = x,
                           .gridDimY = y,
                           .gridDimZ = z,
                           .blockDimX = block_x,
                           .blockDimY = block_y,
                           .blockDimZ = block_z,
                           .sharedMemBytes = shared,
                           .hStream = stream};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}
