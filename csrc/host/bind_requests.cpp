#include "bind_requests.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "requests.h"
#include "trie_builder.h"  // InputError

namespace py = pybind11;

namespace sidmlp {
namespace {

template <class T>
using Array = py::array_t<T>;

// A list or tuple; another object, subclasses of these included, is none. No Python code runs while
// entries are read, so nobody can change the list meanwhile.
struct Sequence {
  explicit Sequence(PyObject* object) {
    if (PyList_CheckExact(object)) {
      is_one = true;
      count = PyList_GET_SIZE(object);
      entries = reinterpret_cast<PyListObject*>(object)->ob_item;
    } else if (PyTuple_CheckExact(object)) {
      is_one = true;
      count = PyTuple_GET_SIZE(object);
      entries = reinterpret_cast<PyTupleObject*>(object)->ob_item;
    }
  }

  bool is_one = false;
  Py_ssize_t count = 0;
  PyObject** entries = nullptr;
};

// Puts all ids in order and each request's number of them into the vectors; false for what is no
// list of lists of plain ints in int64.
bool append_lists(const py::handle& sequences, bool none_is_empty, std::vector<int64_t>* ids,
                  std::vector<int64_t>* lengths) {
  ids->clear();
  lengths->clear();
  const Sequence requests(sequences.ptr());
  if (!requests.is_one) return false;
  for (Py_ssize_t request = 0; request < requests.count; ++request) {
    const Sequence row(requests.entries[request]);
    if (!row.is_one && !(none_is_empty && requests.entries[request] == Py_None)) return false;
    lengths->push_back(row.count);
    for (Py_ssize_t i = 0; i < row.count; ++i) {
      if (!PyLong_CheckExact(row.entries[i])) return false;  // a bool is a subclass
      int overflow = 0;
      ids->push_back(PyLong_AsLongLongAndOverflow(row.entries[i], &overflow));
      if (overflow != 0) return false;
    }
  }
  return true;
}

// (ids int64 [N], lengths int64 [B]), or None for what append_lists refuses.
py::object flatten_lists(const py::handle& sequences, bool none_is_empty) {
  static thread_local std::vector<int64_t> ids, lengths;
  if (!append_lists(sequences, none_is_empty, &ids, &lengths)) return py::none();
  return py::make_tuple(Array<int64_t>(static_cast<py::ssize_t>(ids.size()), ids.data()),
                        Array<int64_t>(static_cast<py::ssize_t>(lengths.size()), lengths.data()));
}

// The data of a C-contiguous array of T, null for None; InputError for another.
template <class T>
const T* data_of(const std::optional<py::array>& array, const char* name, int ndim) {
  if (!array) return nullptr;
  constexpr int kNeeded = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (!py::isinstance<Array<T>>(*array) || array->ndim() != ndim ||
      (array->flags() & kNeeded) != kNeeded) {
    throw InputError(std::string(name) + ": expected a contiguous array of " +
                     py::str(py::dtype::of<T>()).cast<std::string>() + " in " +
                     std::to_string(ndim) + " dimensions, got " +
                     py::str(array->dtype()).cast<std::string>() + " in " +
                     std::to_string(array->ndim()) + "; convert it");
  }
  return static_cast<const T*>(array->data());
}

// What place_requests takes of the known items and the layout, checked.
struct Placing {
  Placing(const std::optional<py::array>& table, const std::optional<py::array>& sorted_ids,
          const std::optional<py::array>& order, const py::array& codes,
          const std::vector<int64_t>& code_offsets, int64_t user_offset, int64_t eos_id,
          int64_t pad_id, int64_t max_items, py::array& ids, py::array& mask)
      : known{data_of<int32_t>(table, "table", 1), data_of<int64_t>(sorted_ids, "sorted_ids", 1),
              data_of<int32_t>(order, "order", 1), data_of<int16_t>(codes, "codes", 2),
              table ? table->size() : 0,           codes.shape(0),
              static_cast<int>(codes.shape(1))},
        layout{{}, user_offset, eos_id, pad_id, max_items} {
    data_of<int64_t>(ids, "ids", 2);
    data_of<bool>(mask, "mask", 2);
    fits(code_offsets.size() == static_cast<size_t>(known.num_levels) &&
             code_offsets.size() <= kMaxLevels,
         "one code offset per level of the codes");
    fits(known.sorted_ids == nullptr ||
             (order && sorted_ids->size() == known.num_items && order->size() == known.num_items),
         "as many sorted ids and places as codes");
    fits(mask.shape(0) == ids.shape(0) && mask.shape(1) == ids.shape(1),
         "ids and mask of one shape, with a row for each of the lengths");
    std::copy(code_offsets.begin(), code_offsets.end(), layout.code_offsets);
    tokens = ids.shape(1);
    token = static_cast<int64_t*>(ids.mutable_data());
    valid = static_cast<uint8_t*>(mask.mutable_data());
  }

  static void fits(bool right, const char* what) {
    if (!right) throw InputError(std::string("place_requests: expected ") + what);
  }

  // Tokens of a request of so many items.
  int64_t tokens_of(int64_t length) const {
    return 2 + std::min(length, layout.max_items) * known.num_levels;
  }

  int64_t operator()(const HistoriesView& histories) const {
    return place_requests(histories, known, layout, tokens, token, valid);
  }

  KnownView known;
  TokenLayout layout;
  int64_t tokens;
  int64_t* token;
  uint8_t* valid;
};

int64_t place(const py::array& items, const py::array& lengths,
              const std::optional<py::array>& user_tokens, const std::optional<py::array>& table,
              const std::optional<py::array>& sorted_ids, const std::optional<py::array>& order,
              const py::array& codes, const std::vector<int64_t>& code_offsets, int64_t user_offset,
              int64_t eos_id, int64_t pad_id, int64_t max_items, py::array& ids, py::array& mask) {
  const Placing placing(table, sorted_ids, order, codes, code_offsets, user_offset, eos_id, pad_id,
                        max_items, ids, mask);
  const HistoriesView histories{data_of<int64_t>(items, "items", 1),
                                data_of<int64_t>(lengths, "lengths", 1),
                                data_of<int64_t>(user_tokens, "user_tokens", 1), lengths.size()};
  Placing::fits(
      ids.shape(0) == histories.batch && (!user_tokens || user_tokens->size() == lengths.size()),
      "ids, mask and user_tokens with a row for each of the lengths");
  int64_t total = 0, most = 0;
  for (int64_t request = 0; request < histories.batch; ++request) {
    Placing::fits(histories.lengths[request] >= 0, "lengths >= 0");
    total += histories.lengths[request];
    most = std::max(most, placing.tokens_of(histories.lengths[request]));
  }
  Placing::fits(total == items.size(), "as many items as the lengths say");
  Placing::fits(most <= placing.tokens, "rows that hold the longest request");
  return placing(histories);
}

bool place_lists(const py::handle& sequences, const std::optional<py::array>& table,
                 const std::optional<py::array>& sorted_ids, const std::optional<py::array>& order,
                 const py::array& codes, const std::vector<int64_t>& code_offsets,
                 int64_t user_offset, int64_t eos_id, int64_t pad_id, int64_t max_items,
                 py::array& ids, py::array& mask) {
  const Placing placing(table, sorted_ids, order, codes, code_offsets, user_offset, eos_id, pad_id,
                        max_items, ids, mask);
  // Kept from call to call, for each thread: as long as the largest batch so far.
  static thread_local std::vector<int64_t> items, lengths;
  if (!append_lists(sequences, false, &items, &lengths)) return false;
  const auto batch = static_cast<int64_t>(lengths.size());
  if (batch != ids.shape(0)) return false;
  for (const int64_t length : lengths)
    if (placing.tokens_of(length) > placing.tokens) return false;
  return placing({items.data(), lengths.data(), nullptr, batch}) < 0;
}

py::list item_lists(const py::array& items, const py::array& counts) {
  const int64_t* item = data_of<int64_t>(items, "items", 2);
  const int32_t* count = data_of<int32_t>(counts, "counts", 1);
  const py::ssize_t batch = items.shape(0), k = items.shape(1);
  if (counts.size() != batch) throw InputError("item_lists: expected a count for each row");
  py::list rows(batch);
  for (py::ssize_t request = 0; request < batch; ++request, item += k) {
    const py::ssize_t real = std::clamp<py::ssize_t>(count[request], 0, k);
    py::list row(real);
    for (py::ssize_t i = 0; i < real; ++i) {
      PyObject* const number = PyLong_FromLongLong(item[i]);
      if (number == nullptr) throw py::error_already_set();
      PyList_SET_ITEM(row.ptr(), i, number);
    }
    PyList_SET_ITEM(rows.ptr(), request, row.release().ptr());
  }
  return rows;
}

}  // namespace

void bind_requests(py::module_& m) {
  m.def("flatten_lists", &flatten_lists, py::arg("sequences"), py::arg("none_is_empty") = false,
        "A list (or tuple) of lists of plain ints -> ids int64 [N] of all in order and lengths "
        "int64 [B]; None for anything else, such as bools, numpy's integers and ids beyond int64. "
        "none_is_empty: None counts as an empty list.");
  m.def("place_requests", &place, py::arg("items"), py::arg("lengths"), py::arg("user_tokens"),
        py::arg("table"), py::arg("sorted_ids"), py::arg("order"), py::arg("codes"),
        py::arg("code_offsets"), py::arg("user_offset"), py::arg("eos_id"), py::arg("pad_id"),
        py::arg("max_items"), py::arg("ids"), py::arg("mask"),
        R"doc(Fills token ids int64 [B, T] and mask bool [B, T] of the histories items, lengths.

An item's position among codes int16 [M, L] is table[id] (int32, -1 = unknown), or order[i] where
sorted_ids[i] is the id, or the id itself where both are None. user_tokens int64 [B], or None:
user_offset for all. Of a history longer than max_items the newest count.

Returns -1, or the first request with an unknown item, from whose row on nothing is filled. Raises
ValueError for arrays that do not fit each other; T must hold the longest request.)doc");
  m.def("place_lists", &place_lists, py::arg("sequences"), py::arg("table"), py::arg("sorted_ids"),
        py::arg("order"), py::arg("codes"), py::arg("code_offsets"), py::arg("user_offset"),
        py::arg("eos_id"), py::arg("pad_id"), py::arg("max_items"), py::arg("ids"), py::arg("mask"),
        "flatten_lists and place_requests in one, without arrays in between. False, with ids and "
        "mask in any state, for what flatten_lists does not take, unknown items, another number of "
        "requests than rows, or rows too short.");
  m.def("item_lists", &item_lists, py::arg("items"), py::arg("counts"),
        "items int64 [B, k], counts int32 [B] -> a list of the first counts[b] of each row b.");
}

}  // namespace sidmlp
