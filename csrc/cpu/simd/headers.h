// All headers that the code of a level uses. A level's source includes them before it switches its instruction
// set on: the linker keeps one copy of an inline function, and that copy has to run on every processor.
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

#include "cpu/common/compiler.h"
#include "cpu/common/memory.h"
#include "cpu/kernels/kernels.h"
#include "cpu/simd/features.h"

#if defined(EMBKERN_X86_LEVELS)
#include <immintrin.h>
#endif
