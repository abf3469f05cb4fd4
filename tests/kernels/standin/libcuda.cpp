// The part of the CUDA driver that the launcher uses, over the kernels' own source on a CPU.
#include "fibers.h"

#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernels.cuh"

namespace {

typedef std::function<void(void**)> Kernel;

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

// A kernel with its arguments where cuLaunchKernel finds them: one pointer to each.
template <class... Arguments, size_t... Places>
Kernel unpacked(void (*kernel)(Arguments...), std::index_sequence<Places...>) {
    return [kernel](void** pointers) { kernel(*(std::remove_const_t<Arguments>*)pointers[Places]...); };
}

struct Registered {
    explicit Registered(const char* name) { kernels()[name] = nullptr; }  // known, but not built
    template <class... Arguments>
    Registered(const char* name, void (*kernel)(Arguments...)) {
        kernels()[name] = unpacked(kernel, std::index_sequence_for<Arguments...>());
    }
};

std::string image, message;

}  // namespace

#include "selected.h"
#define PS_KERNEL(name, parameters, call) PS_JOIN(PS_DEFINE_, PS_SELECTED(name))(name, parameters, call)
#define PS_DEFINE_0(name, parameters, call) static const Registered registered_##name(#name);
#define PS_DEFINE_1(name, parameters, call) \
    static void name parameters { call; }   \
    static const Registered registered_##name(#name, name);
#include "kernels.cu"

extern "C" {

enum { SUCCESS = 0, INVALID_IMAGE = 200, INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

int cuInit(unsigned) { return SUCCESS; }

int cuGetErrorName(int code, const char** name) {
    *name = code == INVALID_IMAGE    ? "CUDA_ERROR_INVALID_IMAGE"
            : code == INVALID_HANDLE ? "CUDA_ERROR_INVALID_HANDLE"
            : code == NOT_FOUND      ? "CUDA_ERROR_NOT_FOUND"
            : code == LAUNCH_FAILED  ? "CUDA_ERROR_LAUNCH_FAILED"
                                     : "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}

int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
    image = (const char*)code;
    *library = &image;
    return image == "stand-in" ? SUCCESS : INVALID_IMAGE;
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    if (library != &image) return INVALID_HANDLE;
    const auto found = kernels().find(name);
    if (found == kernels().end()) return NOT_FOUND;
    *kernel = &found->second;
    return SUCCESS;
}

int cuLaunchKernel(void* kernel, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block, unsigned block_y,
                   unsigned block_z, unsigned shared, void*, void** arguments, void**) {
    if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared != 0 || !grid || !block || block > 256)
        return INVALID_HANDLE;
    const Kernel& run = *(const Kernel*)kernel;
    if (!run) return NOT_FOUND;
    message = fibers::run_grid(grid, block, [&] { run(arguments); });
    return message.empty() ? SUCCESS : LAUNCH_FAILED;
}

const char* standin_message() { return message.c_str(); }

void standin_order(int kind) {
    fibers::thread_order.kind = kind;
    fibers::thread_order.random.seed((unsigned)kind);
}
}
