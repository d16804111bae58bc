// JSON with errors that name the file and the field.
#pragma once

#include "common/error.h"

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace semkv::runtime
{
// A value somewhere in a file; the document must outlive it.
class Field
{
public:
    Field(nlohmann::json const& value, std::string file, std::string path = "")
        : mValue(&value)
        , mFile(std::move(file))
        , mPath(std::move(path))
    {
    }

    Field at(std::string const& name) const;
    Field at(size_t index) const;
    bool has(std::string const& name) const; // and it is not null
    size_t size() const;                     // of a list
    std::vector<std::string> names() const;  // of an object

    // An object must have no other fields: what is not known cannot be followed.
    void only(std::initializer_list<char const*> known) const;

    int64_t integer(int64_t least, int64_t most) const;
    double number(double least, double most) const;
    std::string text() const;
    std::string text(std::initializer_list<char const*> allowed) const;
    std::vector<int64_t> integers(int64_t least, int64_t most) const;
    std::vector<double> numbers(double least, double most) const;

    bool isText() const;
    bool isInteger() const;
    bool isList() const;

    std::string const& file() const
    {
        return mFile;
    }

    // This field contradicts others.
    [[noreturn]] void contradicts(std::string const& expected, std::string const& got) const;

private:
    [[noreturn]] void reject(std::string const& expected) const;

    nlohmann::json const* mValue;
    std::string mFile, mPath;
};

// A JSON text; its fields live as long as it does.
class Document
{
public:
    // Throws SEMKV_BAD_BUNDLE for what is no JSON.
    Document(std::string const& text, std::string file);
    ~Document();

    Field root() const;

private:
    std::unique_ptr<nlohmann::json> mValue;
    std::string mFile;
};

// A number as JSON has it.
std::string shortest(double number);
} // namespace semkv::runtime
