// Python module sidmlp_kernels._lib._host: the trie builder on numpy arrays, lists to arrays and
// back (bind_requests.cpp), and what this build is.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <climits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind_requests.h"
#include "cuda/problem.h"
#include "cuda/sm90/shape.h"
#include "encoder_sizes.h"
#include "trie_builder.h"

// The build passes both; a hand-made library says that it is one.
#ifndef SIDMLP_VERSION
#define SIDMLP_VERSION "unknown"
#endif
#ifndef SIDMLP_COMPILE_FLAGS
#define SIDMLP_COMPILE_FLAGS "unknown"
#endif

namespace py = pybind11;

namespace sidmlp {
namespace {

constexpr int kMaxRequestedThreads = 256;

std::string describe(const py::array& array) {
  std::string text = py::str(array.dtype()).cast<std::string>() + " [";
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    text += (axis > 0 ? ", " : "") + std::to_string(array.shape(axis));
  }
  return text + "]";
}

template <class T>
bool has_dtype(const py::array& array) {
  return py::isinstance<py::array_t<T>>(array);
}

void check_layout(const py::array& array, const char* name) {
  constexpr int kNeeded = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & kNeeded) != kNeeded) {
    throw InputError(std::string(name) +
                     ": expected an aligned C-contiguous array, got a strided or unaligned one; "
                     "use numpy.ascontiguousarray");
  }
}

// A vector of num_items elements of T, contiguous.
template <class T>
const T* checked_vector(const py::array& array, const char* name, const char* dtype,
                        int64_t num_items) {
  if (!has_dtype<T>(array) || array.ndim() != 1 || array.shape(0) != num_items) {
    throw InputError(std::string(name) + ": expected " + dtype + " [" + std::to_string(num_items) +
                     "], got " + describe(array) + "; give one value per row of codes");
  }
  check_layout(array, name);
  return static_cast<const T*>(array.data());
}

// Hands the buffer's memory to numpy.
template <class T>
py::array take(Buffer<T> buffer) {
  const py::ssize_t size = buffer.size;
  T* data = buffer.data.get();
  py::capsule owner(data, [](void* memory) { delete[] static_cast<T*>(memory); });
  buffer.data.release();  // the capsule stands: from here on it frees the memory
  return py::array_t<T>({size}, {static_cast<py::ssize_t>(sizeof(T))}, data, owner);
}

template <class Code>
Trie build_without_gil(const CatalogueView<Code>& catalogue, int threads) {
  py::gil_scoped_release release;
  return build_trie(catalogue, threads);
}

py::dict build_trie_numpy(const py::array& codes, const py::array& item_ids,
                          const std::optional<py::array>& available,
                          const std::vector<int64_t>& codes_per_level, int threads) {
  const bool narrow = has_dtype<int16_t>(codes);
  if ((!narrow && !has_dtype<int32_t>(codes)) || codes.ndim() != 2) {
    throw InputError("codes: expected int16 or int32 [items, levels], got " + describe(codes));
  }
  const int64_t num_items = codes.shape(0), num_levels = codes.shape(1);
  if (num_levels < 1 || num_levels > kMaxLevels) {
    throw InputError("codes has " + std::to_string(num_levels) + " levels; expected 1.." +
                     std::to_string(kMaxLevels) + " (codes is [items, levels])");
  }
  // Before anything reads the data: an array can claim any size without owning it.
  if (num_items > kMaxItems) {
    throw InputError("the catalogue has " + std::to_string(num_items) +
                     " items; expected at most " + std::to_string(kMaxItems) +
                     ": split it over several catalogues");
  }
  check_layout(codes, "codes");
  if (static_cast<int64_t>(codes_per_level.size()) != num_levels) {
    throw InputError("codes_per_level: expected " + std::to_string(num_levels) +
                     " numbers, one per column of codes, got " +
                     std::to_string(codes_per_level.size()));
  }
  if (threads < 0 || threads > kMaxRequestedThreads) {
    throw InputError("threads: expected 0 (automatic) or 1.." +
                     std::to_string(kMaxRequestedThreads) + ", got " + std::to_string(threads));
  }
  const int64_t* ids = checked_vector<int64_t>(item_ids, "item_ids", "int64", num_items);
  const uint8_t* flags =
      available ? checked_vector<uint8_t>(*available, "available", "uint8", num_items) : nullptr;
  if (threads == 0) threads = default_threads(num_items);

  const auto build = [&](auto* typed_codes) {
    return build_without_gil(
        CatalogueView<std::remove_const_t<std::remove_pointer_t<decltype(typed_codes)>>>{
            typed_codes, ids, flags, codes_per_level.data(), num_items,
            static_cast<int>(num_levels)},
        threads);
  };
  Trie trie = narrow ? build(static_cast<const int16_t*>(codes.data()))
                     : build(static_cast<const int32_t*>(codes.data()));

  py::dict result;
  for (size_t l = 0; l < trie.levels.size(); ++l) {
    const std::string level = std::to_string(l + 1);
    result[py::str("child_begin_" + level)] = take(std::move(trie.levels[l].child_begin));
    result[py::str("codes_" + level)] = take(std::move(trie.levels[l].codes));
  }
  result["leaf_begin"] = take(std::move(trie.leaf_begin));
  result["leaf_item_ids"] = take(std::move(trie.leaf_item_ids));
  result["leaf_available"] = take(std::move(trie.leaf_available));
  result["leaf_order"] = take(std::move(trie.leaf_order));
  return result;
}

// Names of the instruction sets that this processor has and the kernels may choose by.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define SIDMLP_PROBE(name) \
  if (__builtin_cpu_supports(name)) names.emplace_back(name)
  SIDMLP_PROBE("sse4.2");
  SIDMLP_PROBE("avx");
  SIDMLP_PROBE("avx2");
  SIDMLP_PROBE("fma");
  SIDMLP_PROBE("avx512f");
  SIDMLP_PROBE("avx512bw");
  SIDMLP_PROBE("avx512dq");
  SIDMLP_PROBE("avx512vl");
  SIDMLP_PROBE("avx512bf16");
#undef SIDMLP_PROBE
#elif defined(__aarch64__)
  names.emplace_back("neon");  // part of the base architecture
#endif
  return names;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["flags"] = SIDMLP_COMPILE_FLAGS;
  info["version"] = SIDMLP_VERSION;
#ifdef SIDMLP_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["instruction_sets"] = instruction_sets();
  return info;
}

// What csrc/cuda/sm90/shape.cpp reads of a decode: sizes alone.
cuda::BeamDecodeProblem decode_of_sizes(bool half, int dim, int hidden_dim, int blocks_per_head,
                                        const std::vector<int>& codes_per_level, int num_beams) {
  if (codes_per_level.empty() || codes_per_level.size() > kMaxLevels) {
    throw InputError("codes_per_level: expected 1.." + std::to_string(kMaxLevels) +
                     " levels, got " + std::to_string(codes_per_level.size()));
  }
  cuda::BeamDecodeProblem problem{};
  problem.heads.dtype = half ? DType::kBFloat16 : DType::kFloat32;
  problem.heads.num_levels = static_cast<int>(codes_per_level.size());
  problem.heads.dim = dim;
  problem.heads.hidden_dim = hidden_dim;
  problem.heads.num_blocks = blocks_per_head;
  for (size_t l = 0; l < codes_per_level.size(); ++l)
    problem.heads.heads[l].num_codes = codes_per_level[l];
  problem.config.num_beams = num_beams;
  return problem;
}

std::string tensor_cores_why_not(bool half, int dim, int hidden_dim, int blocks_per_head,
                                 const std::vector<int>& codes_per_level, int num_beams) {
  const char* reason = cuda::sm90::why_not(
      decode_of_sizes(half, dim, hidden_dim, blocks_per_head, codes_per_level, num_beams));
  return reason == nullptr ? "" : reason;
}

bool tensor_cores_read(bool half, bool factored, int dim, int num_heads, int head_dim,
                       int ffn_dim) {
  return cuda::sm90::reads_on_tensor_cores({half, factored, dim, num_heads, head_dim, ffn_dim});
}

// (most_requests, cluster, group, resident, reason) for each range of batches. A cut that does not
// fit leaves its range to the one that a launch takes instead.
py::list tensor_core_cuts(bool half, int dim, int hidden_dim, int blocks_per_head,
                          const std::vector<int>& codes_per_level, int num_beams, int launches) {
  if (launches != 1 && launches != 2)
    throw InputError("launches: expected 1 or 2, got " + std::to_string(launches));
  struct Range {
    int most_requests;
    const cuda::sm90::Cut* cut;
    bool instead;  // of another in a part of the range
  };
  auto problem =
      decode_of_sizes(half, dim, hidden_dim, blocks_per_head, codes_per_level, num_beams);
  std::vector<Range> ranges;
  if (cuda::sm90::why_not(problem) == nullptr && (launches == 1 || !cuda::sm90::is_wide(problem))) {
    for (const cuda::sm90::Cut& cut : cuda::sm90::cuts_of(problem, launches)) {
      problem.batch = cut.most_requests;
      const cuda::sm90::Cut* taken = cuda::sm90::cut_of(problem, launches);
      if (ranges.empty() || ranges.back().cut != taken) ranges.push_back({0, taken, false});
      ranges.back().most_requests = cut.most_requests;
      ranges.back().instead |= taken->most_requests != cut.most_requests;
    }
  }
  py::list rows;
  for (const Range& range : ranges) {
    std::string reason = range.cut->reason;
    if (range.instead) reason += "; also where another cut needs more shared memory than there is";
    rows.append(py::make_tuple(range.most_requests, range.cut->cluster, range.cut->group,
                               range.cut->resident, reason));
  }
  return rows;
}

}  // namespace
}  // namespace sidmlp

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host side of sidmlp_kernels: the catalogue's trie, requests, and build information.";
  sidmlp::bind_requests(m);
  m.def("build_trie", &sidmlp::build_trie_numpy, py::arg("codes"), py::arg("item_ids"),
        py::arg("available").none(true), py::arg("codes_per_level"), py::arg("threads") = 0,
        R"doc(Builds the CSR trie of a catalogue in time and memory linear in its size.

codes int16 or int32 [N, L]; item_ids int64 [N]; available uint8 [N] or None (all);
codes_per_level: L numbers C_l, 1..32767; threads 0: as many as pay. The GIL is released, so no
thread may change the arrays during the call.

Returns a dict of numpy arrays: child_begin_l int32 [n_{l-1} + 1] and codes_l int16 [n_l] for
l = 1..L, leaf_begin int32 [n_L + 1], leaf_item_ids int64 [N], leaf_available uint8 [N] and
leaf_order int32 [N], the catalogue position of each leaf slot.

Raises ValueError for a code out of range, an empty or too large catalogue, a wrong shape or dtype.)doc");
  m.def("build_info", &sidmlp::build_info,
        "Compiler, flags, version, whether CUDA kernels were compiled, and the processor's "
        "instruction sets.");
  m.def("tensor_cores_why_not", &sidmlp::tensor_cores_why_not, py::arg("half"), py::arg("dim"),
        py::arg("hidden_dim"), py::arg("blocks_per_head"), py::arg("codes_per_level"),
        py::arg("num_beams"),
        "Why the CUDA backend takes its plain kernel for these sizes, or ''.");
  m.def("tensor_cores_read", &sidmlp::tensor_cores_read, py::arg("half"), py::arg("factored"),
        py::arg("dim"), py::arg("num_heads"), py::arg("head_dim"), py::arg("ffn_dim"),
        "Whether the tensor core kernels read out these sizes, where they take the weights.");
  m.def("tensor_core_cuts", &sidmlp::tensor_core_cuts, py::arg("half"), py::arg("dim"),
        py::arg("hidden_dim"), py::arg("blocks_per_head"), py::arg("codes_per_level"),
        py::arg("num_beams"), py::arg("launches") = 1,
        "How batches of these sizes are cut among clusters: (most_requests, cluster, group, "
        "resident, reason) for each range, with launches 2 by the second launch; [] where the "
        "plain kernel decodes.");
  m.def("encode_t5_why_not", &sidmlp::encode_t5_why_not, py::arg("half"), py::arg("dim"),
        py::arg("layers"), py::arg("heads"), py::arg("head_dim"), py::arg("ffn_dim"),
        "Why the CUDA backend has no kernel for a T5 encoder of these sizes, or ''.");
  m.def("encode_mlp_why_not", &sidmlp::encode_mlp_why_not, py::arg("half"), py::arg("dim"),
        py::arg("layers"), py::arg("roles"), py::arg("hidden_dim"),
        "Why the CUDA backend has no kernel for SID-MLP++'s encoder of these sizes, or ''.");
}
