// PS_SELECTED(name): 1 where all kernels are built, or where this one is wanted by `#define PS_WANTED_<name> ,1` in wanted.h; else 0.
#pragma once
#define PS_SECOND(first, second, ...) second
#define PS_PICK(...) PS_SECOND(__VA_ARGS__, 0, 0)
#define PS_JOIN(a, b) PS_JOINED(a, b)
#define PS_JOINED(a, b) a##b
#if defined(PS_SOME)
#include "wanted.h"
#define PS_SELECTED(name) PS_PICK(PS_WANTED_##name)
#else
#define PS_SELECTED(name) 1
#endif
