// What Python hands over: memory by address and size, and groups of numbers by the names of their fields.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace deqfast {

using Address = std::uintptr_t;

// A tensor that the caller keeps alive: where it lies, its bytes. From Python, a tuple of the two.
struct Array {
    Address address = 0;
    int64_t bytes = 0;
};

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// The array as what it must be: std::invalid_argument, which names it, if its size says that it is another one.
template <class T = void>
T* checked(const char* name, const Array& array, int64_t bytes) {
    if (array.bytes != bytes)
        throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(bytes) + " bytes, got " +
                                    std::to_string(array.bytes));
    return pointer<T>(array.address);
}

// Whether a NamedTuple has the fields of a group, by name and in order; std::invalid_argument says where not.
template <class Group>
void check_fields(const char* name, const pybind11::tuple& given) {
    const pybind11::tuple names = given.attr("_fields");
    Group group;
    std::string expected;
    size_t count = 0;
    bool same = true;
    fields(group, [&](const char* field, auto&) {
        expected += (count ? ", " : "") + std::string(field);
        same = same && count < names.size() && names[count].cast<std::string>() == field;
        ++count;
    });
    if (!same || count != names.size())
        throw std::invalid_argument(std::string(name) + ": expected the fields " + expected + ", got " +
                                    pybind11::str(names).cast<std::string>());
}

// A NamedTuple as a group of numbers that has `fields`: the same names, which are looked at once a type.
template <class Group>
Group read_group(const char* name, const pybind11::tuple& given) {
    static PyTypeObject* known = nullptr;  // under the GIL; a type that was let through is never freed, see below
    PyTypeObject* type = Py_TYPE(given.ptr());
    if (type != known) {
        check_fields<Group>(name, given);
        Py_INCREF(type);
        known = type;
    }
    Group group;
    Py_ssize_t at = 0;
    fields(group, [&](const char*, auto& value) {
        using T = std::remove_reference_t<decltype(value)>;
        const pybind11::handle item = PyTuple_GET_ITEM(given.ptr(), at++);
        if constexpr (std::is_enum<T>::value)
            value = T(item.cast<int>());
        else
            value = item.cast<T>();
    });
    return group;
}

// Memory aligned to cache lines that nobody has to free.
class Buffer {
   public:
    char* reserve(int64_t bytes) {
        memory_.reset(new char[size_t(bytes) + 64]);
        return pointer<char>((Address(memory_.get()) + 63) / 64 * 64);
    }

   private:
    std::unique_ptr<char[]> memory_;
};

}  // namespace deqfast

template <>
struct pybind11::detail::type_caster<deqfast::Array> {
    PYBIND11_TYPE_CASTER(deqfast::Array, const_name("tuple[int, int]"));

    bool load(handle source, bool) {
        if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
        value.address = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(source.ptr(), 0));
        value.bytes = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), 1));
        if (!PyErr_Occurred()) return true;
        PyErr_Clear();
        return false;
    }
};
