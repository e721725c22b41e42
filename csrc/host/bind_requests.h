// The part of sidmlp_kernels._lib._host that stands between Python lists and arrays.
#pragma once

#include <pybind11/pybind11.h>

namespace sidmlp {

// Adds flatten_lists, place_requests, place_lists and item_lists to the module.
void bind_requests(pybind11::module_& m);

}  // namespace sidmlp
