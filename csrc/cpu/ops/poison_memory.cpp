// poison_memory: a switch for tests; see common/memory.h.
#include "cpu/common/memory.h"
#include "cpu/ops/ops.h"

namespace embkern {

void set_poison_memory(bool on) { poison_memory.store(on); }

}  // namespace embkern
