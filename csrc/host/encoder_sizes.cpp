#include "encoder_sizes.h"

#include "cuda/sm90/encoder/sizes.h"
#include "cuda/sm90/mlp_encoder/shape.h"

namespace sidmlp {

std::string encode_t5_why_not(bool half, int dim, int layers, int heads, int head_dim,
                              int ffn_dim) {
  const cuda::sm90::EncodeSizes sizes{half, dim, layers, heads, head_dim, ffn_dim};
  const char* reason = cuda::sm90::why_not(sizes);
  return reason == nullptr ? "" : reason;
}

std::string encode_mlp_why_not(bool half, int dim, int layers, int roles, int hidden_dim) {
  const char* reason =
      cuda::sm90::why_not(cuda::sm90::MlpSizesOf{half, dim, layers, roles, hidden_dim});
  return reason == nullptr ? "" : reason;
}

}  // namespace sidmlp
