// Binds the implementations to their schemas, which embkern/ops/*.py define with one overload per backend, so
// that the ops exist (and report what is missing) in installs without this extension.
#include <torch/csrc/stable/library.h>

#include "cpu/ops/ops.h"
#include "cpu/simd/capability.h"

STABLE_TORCH_LIBRARY_IMPL(embkern, CPU, m) {
  m.impl("gather_project_forward.native", TORCH_BOX(&embkern::gather_project_forward));
  m.impl("gather_project_out.native", TORCH_BOX(&embkern::gather_project_out));
  m.impl("gather_project_backward.native", TORCH_BOX(&embkern::gather_project_backward));
  m.impl("gather_decode_forward.native", TORCH_BOX(&embkern::gather_decode_forward));
  m.impl("packed_logits_forward.native", TORCH_BOX(&embkern::packed_logits_forward));
  m.impl("packed_logits_backward.native", TORCH_BOX(&embkern::packed_logits_backward));
  m.impl("packed_cross_entropy_forward.native", TORCH_BOX(&embkern::packed_cross_entropy_forward));
  m.impl("packed_cross_entropy_backward.native", TORCH_BOX(&embkern::packed_cross_entropy_backward));
  m.impl("quantize_rows.native", TORCH_BOX(&embkern::quantize_rows));
  m.impl("quantize_trellis.native", TORCH_BOX(&embkern::quantize_trellis));
  m.impl("cosine_mse_forward.native", TORCH_BOX(&embkern::cosine_mse_forward));
  m.impl("autoencoder_forward.native", TORCH_BOX(&embkern::autoencoder_forward));
  m.impl("autoencoder_train.native", TORCH_BOX(&embkern::autoencoder_train));
  m.impl("exp_and_tanh", TORCH_BOX(&embkern::exp_and_tanh));
}

STABLE_TORCH_LIBRARY_IMPL(embkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&embkern::cpu_capability));
  m.impl("poison_memory", TORCH_BOX(&embkern::set_poison_memory));
}

#ifdef USE_CUDA
#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(embkern, CUDA, m) {
  m.impl("gather_project_forward.native", TORCH_BOX(&embkern::cuda::gather_project_forward));
  m.impl("gather_project_out.native", TORCH_BOX(&embkern::cuda::gather_project_out));
  m.impl("gather_project_backward.native", TORCH_BOX(&embkern::cuda::gather_project_backward));
  m.impl("gather_decode_forward.native", TORCH_BOX(&embkern::cuda::gather_decode_forward));
  m.impl("packed_logits_forward.native", TORCH_BOX(&embkern::cuda::packed_logits_forward));
  m.impl("cosine_mse_forward.native", TORCH_BOX(&embkern::cuda::cosine_mse_forward));
  m.impl("scale_gradient_.native", TORCH_BOX(&embkern::cuda::scale_gradient));
}
#endif
