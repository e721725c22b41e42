#include "cuda/sm90/encoder/encode_t5.h"

#include <algorithm>

#include "cuda/cluster_launch.h"
#include "cuda/layout.h"
#include "cuda/sm90/encoder/long.h"
#include "cuda/sm90/encoder/shape.h"
#include "cuda/sm90/encoder/split.h"

namespace sidmlp::cuda::sm90 {

namespace {

constexpr int kMostHidden = 512;       // feed-forward columns between two sums
constexpr int kMostBias = 16 * 1024;   // bytes of bias that may stay in shared memory
constexpr int kShareBytes = 8 * 4096;  // while requests are shared out

int half_row(int columns) { return round_up(2 * columns, 128); }

EncodeSizes sizes_of(const T5View& m) {
  return {m.dtype != DType::kFloat32, m.dim, m.num_layers, m.num_heads, m.head_dim, m.ffn_dim};
}

EncodeShape lay_out(const EncodeT5Problem& problem, int cluster, int tiles, int heads_at_once) {
  const T5View& m = problem.model;
  EncodeShape s{};
  s.cluster = cluster;
  s.tiles = tiles;
  s.own_heads = (m.num_heads + cluster - 1) / cluster;
  s.heads_at_once = heads_at_once;
  // The chunk orders a sum: it depends on the model and the form alone.
  const int own = round_up((m.ffn_dim / 16 + cluster - 1) / cluster, 1) * 16;
  const int chunks = (own + kMostHidden - 1) / kMostHidden;
  s.ffn_chunk = round_up((own + chunks - 1) / chunks, 16);
  const int rows = kTileRows * tiles, tokens = problem.tokens.tokens;
  const bool may_be_long = tokens > rows;
  const int key_rows = may_be_long ? std::max(rows, kKeyBlock) : rows;
  s.x_bytes = 4 * m.dim + 16;  // every other row of four lies in other banks
  s.normed_bytes = half_row(m.dim);
  s.mixed_bytes = half_row(s.own_heads * m.head_dim);
  s.head_bytes = half_row(heads_at_once * round_up(m.head_dim, 32));
  s.hidden_bytes = half_row(s.ffn_chunk);
  s.bias_stride = 2 * tokens - 1;
  s.bias_heads = 4 * s.bias_stride * s.own_heads <= kMostBias ? s.own_heads : heads_at_once;

  int at = 0;  // after EncodeBlock
  auto take = [&](int64_t bytes) {
    const int from = at;
    at += round_up(bytes, 128);
    return from;
  };
  s.x = take(int64_t{s.x_bytes} * ((rows + cluster - 1) / cluster));
  s.partial = cluster == 1 ? s.x : take(int64_t{s.x_bytes} * rows);
  s.normed = take(int64_t{s.normed_bytes} * rows);
  s.bias = take(int64_t{4} * s.bias_stride * s.bias_heads);
  s.hidden = s.mixed = take(int64_t{s.mixed_bytes} * rows);  // one after the other
  s.query = take(int64_t{s.head_bytes} * rows);
  s.key = take(int64_t{s.head_bytes} * key_rows);
  s.value = take(int64_t{s.head_bytes} * key_rows);
  s.shared_bytes =
      std::max(at, s.hidden + std::max(s.hidden_bytes * rows, kShareBytes)) + kEncodeBlockBytes;

  if (may_be_long) {
    const int64_t all_rows = round_up(tokens, kTileRows);
    int64_t bytes = 0;
    auto take_global = [&](int64_t size) {
      const int64_t from = bytes;
      bytes += (size + 255) / 256 * 256;
      return from;
    };
    s.workspace_x = take_global(4 * all_rows * m.dim);
    s.workspace_position = take_global(4 * all_rows);
    s.workspace_kv = take_global(2 * all_rows * s.own_heads * 2 * m.head_dim);
    s.workspace_bytes = bytes;
  }
  return s;
}

// The most rows at once, then the most heads at once, that fit; tiles is 0 if none do.
EncodeShape best_fit(const EncodeT5Problem& problem, int cluster) {
  const int own_heads = (problem.model.num_heads + cluster - 1) / cluster;
  for (int tiles = kMaxTiles; tiles > 0; --tiles) {
    for (int heads = own_heads; heads > 0; --heads) {
      const EncodeShape shape = lay_out(problem, cluster, tiles, heads);
      if (shape.shared_bytes <= kOneBlock) return shape;
    }
  }
  return {};
}

// Whether a batch whose form is open takes the one for long requests.
bool is_long(const EncodeT5Problem& problem) {
  return long_why_not(problem.model) == nullptr && !takes_wide(problem.model) &&
         problem.tokens.tokens > kLongTokens;
}
EncodeKernels kernels_of(const T5View& m) {
  return takes_split(m)  ? EncodeKernels::kSplit
         : takes_wide(m) ? EncodeKernels::kWide
                         : EncodeKernels::kGeneral;
}
EncodeForm form_of(const EncodeT5Problem& problem, EncodeForm asked) {
  if (asked == EncodeForm::kAuto && is_long(problem)) return EncodeForm::kLong;
  return form_of(asked, problem.tokens.batch, kernels_of(problem.model));
}
int blocks_of(EncodeForm form) {  // of a request
  const bool whole = form == EncodeForm::kThroughput || form == EncodeForm::kCluster1;
  return whole ? 1 : static_cast<int>(form);
}
// As many clusters as fit at once; clusters of eight leave some multiprocessors of a group over.
int clusters_of(const EncodeT5Problem& problem, int blocks) {
  const int most = blocks == 8 ? 15 : blocks == 4 ? 30 : multiprocessors() / blocks;
  return static_cast<int>(std::min<int64_t>(problem.tokens.batch, most));
}

}  // namespace

EncodeShape encode_shape(const EncodeT5Problem& problem, EncodeForm form) {
  const int cluster = blocks_of(form_of(problem, form));
  EncodeShape shape = best_fit(problem, cluster);
  shape.clusters = clusters_of(problem, cluster);
  return shape;
}

const char* why_not(const EncodeT5Problem& problem) {
  if (const char* reason = why_not(sizes_of(problem.model))) return reason;
  if (problem.tokens.tokens < 1) return "tokens: expected at least 1";
  if (problem.tokens.tokens > problem.model.bias_tokens)
    return "tokens: more than the packed position bias covers";
  for (const int cluster : {1, 2, 4, 8})
    if (best_fit(problem, cluster).tiles == 0) return "too wide for shared memory";
  return nullptr;
}

const char* why_not(const EncodeT5Problem& problem, EncodeForm form) {
  if (const char* reason = why_not(problem)) return reason;
  return form == EncodeForm::kLong ? long_why_not(problem.model) : nullptr;
}

LongShape long_shape(const EncodeT5Problem& problem, int blocks) {
  const T5View& m = problem.model;
  const int64_t of_request = round_up(problem.tokens.tokens, kLongRows) / kLongRows;
  LongShape s{};
  s.tiles = static_cast<int>(std::min<int64_t>(problem.tokens.batch * of_request,
                                               std::max<int64_t>(kLongMostTiles, of_request)));
  const auto take = [&](int64_t size) {
    const int64_t from = s.bytes;
    s.bytes += (size + 255) / 256 * 256;
    return from;
  };
  const int64_t tiles = s.tiles;
  s.x = take(tiles * kLongRows * m.dim * 4);
  s.qkv = take(tiles * 3 * m.num_heads * kLongBlock);
  s.mixed = take(tiles * m.num_heads * kLongBlock);
  s.zeros = take(kLongBlock);
  s.position = take(tiles * kLongRows * 4);
  s.requests = take(problem.tokens.batch * 8);
  s.reach = take(int64_t{4} * blocks);
  s.arrived = take(4);
  return s;
}

namespace {

// One block a multiprocessor, all there at once: they wait for each other.
cudaError_t launch_long(const EncodeT5Problem& problem, void* workspace, cudaStream_t stream) {
  const T5View& m = problem.model;
  const void* kernel =
      m.dtype == DType::kBFloat16 ? long_bf16(m.dim, m.activation) : long_fp16(m.dim, m.activation);
  const int blocks = multiprocessors(), shared_bytes = long_shared_bytes();
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  LongShape shape = long_shape(problem, blocks);
  void* arguments[] = {const_cast<EncodeT5Problem*>(&problem), &shape, &workspace};
  return cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                                     dim3(kLongThreads), arguments,
                                     static_cast<size_t>(shared_bytes), stream);
}

// Both: of a form that form_of gave.
bool is_wide(const EncodeT5Problem& problem, EncodeForm form) {
  return takes_wide(problem.model) &&
         (form == EncodeForm::kThroughput ||
          (form == EncodeForm::kCluster1 && !takes_split(problem.model)));
}
bool is_split(const EncodeT5Problem& problem, EncodeForm form) {
  return takes_split(problem.model) && form != EncodeForm::kThroughput && form != EncodeForm::kLong;
}

}  // namespace

int64_t workspace_bytes(const EncodeT5Problem& problem, EncodeForm form) {
  form = form_of(problem, form);
  if (form == EncodeForm::kLong) return long_shape(problem, multiprocessors()).bytes;
  if (is_wide(problem, form) || is_split(problem, form)) return 0;
  const EncodeShape shape = encode_shape(problem, form);
  return shape.workspace_bytes * shape.cluster * shape.clusters;
}

cudaError_t launch(const EncodeT5Problem& problem, EncodeForm form, void* workspace,
                   cudaStream_t stream) {
  if (problem.tokens.batch == 0) return cudaSuccess;
  if (multiprocessors() == 0) {
    const cudaError_t error = cudaGetLastError();
    return error != cudaSuccess ? error : cudaErrorInvalidDevice;
  }
  const bool bf16 = problem.model.dtype == DType::kBFloat16;
  form = form_of(problem, form);
  if (form == EncodeForm::kLong) return launch_long(problem, workspace, stream);
  const int blocks = blocks_of(form), clusters = clusters_of(problem, blocks);
  if (is_wide(problem, form) || is_split(problem, form)) {
    void* arguments[] = {const_cast<EncodeT5Problem*>(&problem)};
    const Activation activation = problem.model.activation;
    if (is_wide(problem, form))
      return launch_kernel(bf16 ? wide_bf16(activation) : wide_fp16(activation), arguments,
                           clusters, kWideThreads, 1, wide_shared_bytes(problem), stream);
    return launch_kernel(bf16 ? split_bf16(activation, blocks) : split_fp16(activation, blocks),
                         arguments, clusters * blocks, kSplitThreads, blocks,
                         split_shared_bytes(problem, blocks), stream);
  }
  EncodeShape shape = encode_shape(problem, form);
  if (shape.tiles == 0) return cudaErrorInvalidValue;
  const int head_dim = problem.model.head_dim;
  const void* kernel = bf16 ? encode_t5_bf16(head_dim) : encode_t5_fp16(head_dim);
  void* arguments[] = {const_cast<EncodeT5Problem*>(&problem), &shape, &workspace};
  return launch_kernel(kernel, arguments, shape.clusters * shape.cluster, kEncodeThreads,
                       shape.cluster, shape.shared_bytes, stream);
}

}  // namespace sidmlp::cuda::sm90
