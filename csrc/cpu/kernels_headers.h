// Everything kernels.inl needs, included before a level's instruction set is switched on: an inline function
// of a header compiled with it could be the copy that the linker keeps for every level.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif
