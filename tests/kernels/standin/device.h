// For nvcc, in front of kernels.cu: its own definition of a kernel, for those that are wanted.
#pragma once
#include "selected.h"
#define PS_KERNEL(name, parameters, call) PS_JOIN(PS_DEFINE_, PS_SELECTED(name))(name, parameters, call)
#define PS_DEFINE_0(name, parameters, call)
#define PS_DEFINE_1(name, parameters, call) extern "C" __global__ void __launch_bounds__(256) name parameters { call; }
