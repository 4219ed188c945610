// How Python calls the kernels: a function object that reads the addresses of the tensors it is given and runs a kernel on
// them, in a tenth of what ctypes takes. It needs no header of Python's, which many machines lack: what it uses is of the
// stable ABI (docs.python.org/3/c-api/stable.html), the same in every Python since 3.10.
#include <cstdint>
#include <exception>

struct PyObject;

extern "C" {

struct PyMethodDef {
  const char* name;
  PyObject* (*function)(PyObject* self, PyObject* const* args, intptr_t count, PyObject* names);
  int flags;
  const char* doc;
};

extern PyObject _Py_NoneStruct;
extern PyObject *PyExc_MemoryError, *PyExc_RuntimeError, *PyExc_TypeError;
void Py_IncRef(PyObject*);
void Py_DecRef(PyObject*);
char* PyBytes_AsString(PyObject*);
PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject* self, PyObject* module);
PyObject* PyErr_Format(PyObject* type, const char* format, ...);
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
long PyLong_AsLong(PyObject*);
long long PyLong_AsLongLong(PyObject*);
PyObject* PyObject_CallObject(PyObject* function, PyObject* arguments);
PyObject* PyObject_GetAttrString(PyObject*, const char* name);
PyObject* PySequence_GetItem(PyObject*, intptr_t i);
PyObject* PyTuple_GetItem(PyObject*, intptr_t i);
intptr_t PyTuple_Size(PyObject*);
}

namespace {

constexpr int MOST = 10;                        // tensors that a kernel takes: a pair with biases and a norm, 9
constexpr int FASTCALL = 0x80, KEYWORDS = 0x2;  // METH_FASTCALL, METH_KEYWORDS

// A kernel and what does not change from call to call.
struct Entry {
  int (*run)(const void* how, void* const* tensors, int64_t rows, int threads);  // not 0: no memory
  const void* how;
  void* (*address)(PyObject* tensor);  // torch's
  PyObject* get_num_threads;           // torch's
  int64_t rows;                        // negative: as many as the first tensor has
  int64_t tensors;
};

int64_t rows_of(PyObject* tensor) {
  PyObject* shape = PyObject_GetAttrString(tensor, "shape");
  PyObject* size = shape ? PySequence_GetItem(shape, 0) : nullptr;
  const int64_t rows = size ? PyLong_AsLongLong(size) : -1;
  Py_DecRef(size);  // which takes null
  Py_DecRef(shape);
  return rows;
}

int threads_of(const Entry& entry) {
  PyObject* threads = PyObject_CallObject(entry.get_num_threads, nullptr);
  const int number = threads ? (int)PyLong_AsLong(threads) : -1;
  Py_DecRef(threads);
  return number;
}

// self: a tuple whose first is an Entry in bytes. Tensors, by whatever names, in the order the kernel takes them; None is
// left out.
PyObject* enter(PyObject* self, PyObject* const* args, intptr_t count, PyObject* names) {
  const Entry& entry = *(const Entry*)PyBytes_AsString(PyTuple_GetItem(self, 0));
  if (names) count += PyTuple_Size(names);
  void* tensors[MOST];
  int64_t given = 0;
  try {
    for (intptr_t i = 0; i < count; i++) {
      if (args[i] == &_Py_NoneStruct) continue;
      if (given < entry.tensors) tensors[given] = entry.address(args[i]);
      given++;
    }
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
  if (given != entry.tensors)
    return PyErr_Format(PyExc_TypeError, "the kernel takes %lld tensors, not %lld", (long long)entry.tensors, (long long)given);
  const int64_t rows = entry.rows < 0 ? rows_of(args[0]) : entry.rows;
  const int threads = threads_of(entry);
  if (rows < 0 || threads < 0) return nullptr;
  void* state = PyEval_SaveThread();
  const int failed = entry.run(entry.how, tensors, rows, threads);
  PyEval_RestoreThread(state);
  if (failed)
    return PyErr_Format(PyExc_MemoryError, "no memory for %lld rows: call the model with fewer rows at a time", (long long)rows);
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

PyMethodDef method = {"run", enter, FASTCALL | KEYWORDS, nullptr};

}  // namespace

// A function of tensors, for such a `self`.
extern "C" PyObject* autoplan_entry(PyObject* self) { return PyCFunction_NewEx(&method, self, nullptr); }
