// The emulator's version of csrc/cuda/launch.cuh.
#pragma once

#include "emulator.h"

namespace embkern::cuda {

struct Stream {};

struct Device {
  int multiprocessors;
  int shared_per_block;
  int shared_per_multiprocessor;
};

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Stream,
            const Arguments&... arguments) {
  if (blocks > INT32_MAX) emulator::fail("a launch has more blocks than CUDA permits");
  emulator::Machine::instance().run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace embkern::cuda
