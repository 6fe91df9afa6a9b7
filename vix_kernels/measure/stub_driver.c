/* A CUDA driver that does nothing. Triton's launcher uses it to measure the host time of launches without a GPU.
 *
 * It defines the functions that Triton's driver.c calls. Every call succeeds, and the only device is an H100.
 */

typedef int Result;
typedef unsigned long long Pointer;

#define SUCCEED(name) \
  Result name(void) { return 0; }

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { return *version = 13000, 0; }
Result cuDeviceGetCount(int *count) { return *count = 1, 0; }
Result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
Result cuCtxGetDevice(int *device) { return *device = 0, 0; }
Result cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
Result cuCtxGetLimit(unsigned long *value, int limit) { return *value = 1 << 20, 0; }
Result cuGetErrorString(Result error, const char **text) { return *text = "stub", 0; }
Result cuModuleLoadData(void **module, const void *image) { return *module = (void *)1, 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { return *function = (void *)1, 0; }
Result cuPointerGetAttribute(void *data, int attribute, Pointer pointer) { return *(Pointer *)data = pointer, 0; }
Result cuPointerGetAttributes(unsigned count, int *attributes, void **data, Pointer pointer) { return 0; }
Result cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) { /* values of the enum CUdevice_attribute */
  case 10: return *value = 32, 0;      /* threads per warp */
  case 12: return *value = 65536, 0;   /* registers per block */
  case 16: return *value = 132, 0;     /* multiprocessors */
  case 75: return *value = 9, 0;       /* compute capability, major */
  case 76: return *value = 0, 0;       /* compute capability, minor */
  case 8: return *value = 49152, 0;    /* bytes of shared memory per block, by default */
  case 97: return *value = 232448, 0;  /* bytes of shared memory per block, at most */
  case 81: return *value = 233472, 0;  /* bytes of shared memory per multiprocessor */
  default: return *value = 1, 0;
  }
}

Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  return *value = attribute == 0 ? 1024 : 0, 0; /* 0: maximum number of threads per block */
}

SUCCEED(cuCtxSetCurrent)
SUCCEED(cuCtxSetLimit)
SUCCEED(cuFuncSetAttribute)
SUCCEED(cuFuncSetCacheConfig)
SUCCEED(cuLaunchKernel)
SUCCEED(cuLaunchKernelEx)
SUCCEED(cuModuleUnload)
SUCCEED(cuOccupancyMaxActiveClusters)
SUCCEED(cuTensorMapEncodeIm2col)
SUCCEED(cuTensorMapEncodeTiled)
