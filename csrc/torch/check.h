// Checks of operator arguments. Every message says which argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "sidmlp/views.h"

namespace sidmlp::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return shape;
}

// Where an argument must live: every tensor of a call is on the device of the call's first tensor.
struct Place {
  bool cuda;
  int device_index;

  explicit Place(const Tensor& first)
      : cuda(first.is_cuda()), device_index(cuda ? first.get_device() : -1) {}
  bool holds(const Tensor& t) const {
    return t.is_cuda() == cuda && (!cuda || t.get_device() == device_index);
  }
};

inline const void* check_tensor(const Tensor& tensor, const std::string& name, ScalarType dtype,
                                const std::vector<int64_t>& shape, const Place& place) {
  STD_TORCH_CHECK(place.holds(tensor), name,
                  ": expected on the device of the call's first tensor, got another device");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ", static_cast<int>(dtype),
                  ", got ", static_cast<int>(tensor.scalar_type()), " (torch ScalarType numbers)");
  STD_TORCH_CHECK(shape_of(tensor) == shape, name, ": expected shape ", shape_text(shape), ", got ",
                  shape_text(shape_of(tensor)));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  return tensor.data_ptr();
}

template <class T>
const T* check_as(const Tensor& tensor, const std::string& name, ScalarType dtype,
                  const std::vector<int64_t>& shape, const Place& place) {
  return static_cast<const T*>(check_tensor(tensor, name, dtype, shape, place));
}

inline DType weight_dtype(const Tensor& tensor, const std::string& name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name,
                  ": expected float32, bfloat16 or float16, got torch ScalarType number ",
                  static_cast<int>(tensor.scalar_type()));
  return DType::kFloat32;
}

inline ScalarType scalar_type_of(DType dtype) {
  return dtype == DType::kFloat32    ? ScalarType::Float
         : dtype == DType::kBFloat16 ? ScalarType::BFloat16
                                     : ScalarType::Half;
}

}  // namespace sidmlp::torch_ops
