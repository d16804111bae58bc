#include "json.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>

namespace semkv::runtime
{
using nlohmann::json;

namespace
{
char const* const kRebuild = "build the bundle again, or copy it again from where it was built";

std::string shortened(json const& value)
{
    std::string const text = value.dump(-1, ' ', false, json::error_handler_t::replace);
    return text.size() > 60 ? text.substr(0, 57) + "..." : text;
}
} // namespace

Field Field::at(std::string const& name) const
{
    if (!mValue->is_object())
    {
        reject("an object");
    }
    auto const found = mValue->find(name);
    std::string const path = mPath.empty() ? name : mPath + "." + name;
    if (found == mValue->end())
    {
        throw Error(SEMKV_BAD_BUNDLE, path + " is missing").where(mFile).fix(kRebuild);
    }
    return Field(*found, mFile, path);
}

Field Field::at(size_t index) const
{
    if (!mValue->is_array() || index >= mValue->size())
    {
        reject("a list of more than " + std::to_string(index));
    }
    return Field((*mValue)[index], mFile, mPath + "." + std::to_string(index));
}

bool Field::has(std::string const& name) const
{
    return mValue->is_object() && mValue->contains(name) && !(*mValue)[name].is_null();
}

size_t Field::size() const
{
    if (!mValue->is_array())
    {
        reject("a list");
    }
    return mValue->size();
}

std::vector<std::string> Field::names() const
{
    if (!mValue->is_object())
    {
        reject("an object");
    }
    std::vector<std::string> found;
    for (auto const& [name, value] : mValue->items())
    {
        found.push_back(name);
    }
    return found;
}

void Field::only(std::initializer_list<char const*> known) const
{
    for (std::string const& name : names())
    {
        bool const fine = std::any_of(known.begin(), known.end(), [&](char const* each) { return name == each; });
        // Rules are texts for people.
        if (!fine && !(name.size() > 5 && name.compare(name.size() - 5, 5, "_rule") == 0))
        {
            throw Error(SEMKV_BAD_BUNDLE, at(name).mPath + " is a field that this version does not know")
                .where(mFile)
                .fix("build the bundle again with the version of semkv-deploy that this library is of");
        }
    }
}

int64_t Field::integer(int64_t least, int64_t most) const
{
    bool const whole = mValue->is_number_integer()
        && (!mValue->is_number_unsigned() || mValue->get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX));
    if (!whole || mValue->get<int64_t>() < least || mValue->get<int64_t>() > most)
    {
        reject("an integer from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return mValue->get<int64_t>();
}

double Field::number(double least, double most) const
{
    if (!mValue->is_number() || !(mValue->get<double>() >= least) || !(mValue->get<double>() <= most))
    {
        reject("a number from " + json(least).dump() + " to " + json(most).dump());
    }
    return mValue->get<double>();
}

std::string Field::text() const
{
    if (!mValue->is_string())
    {
        reject("a text");
    }
    return mValue->get<std::string>();
}

std::string Field::text(std::initializer_list<char const*> allowed) const
{
    std::string all;
    for (char const* each : allowed)
    {
        if (mValue->is_string() && mValue->get<std::string>() == each)
        {
            return each;
        }
        all += (all.empty() ? "" : " or ") + std::string(each);
    }
    reject(all);
}

std::vector<int64_t> Field::integers(int64_t least, int64_t most) const
{
    std::vector<int64_t> found(size());
    for (size_t i = 0; i < found.size(); ++i)
    {
        found[i] = at(i).integer(least, most);
    }
    return found;
}

std::vector<double> Field::numbers(double least, double most) const
{
    std::vector<double> found(size());
    for (size_t i = 0; i < found.size(); ++i)
    {
        found[i] = at(i).number(least, most);
    }
    return found;
}

void Field::contradicts(std::string const& expected, std::string const& got) const
{
    throw Error(SEMKV_BAD_BUNDLE, mPath + " contradicts the rest of the manifest")
        .where(mFile)
        .expected(expected)
        .got(got)
        .fix(kRebuild);
}

void Field::reject(std::string const& expected) const
{
    throw Error(SEMKV_BAD_BUNDLE, (mPath.empty() ? std::string("it") : mPath) + " is not what it should be")
        .where(mFile)
        .expected(expected)
        .got(shortened(*mValue))
        .fix(kRebuild);
}

bool Field::isText() const
{
    return mValue->is_string();
}

bool Field::isInteger() const
{
    return mValue->is_number_integer();
}

bool Field::isList() const
{
    return mValue->is_array();
}

Document::Document(std::string const& text, std::string file)
    : mValue(std::make_unique<json>(json::parse(text, nullptr, false)))
    , mFile(std::move(file))
{
    if (mValue->is_discarded())
    {
        throw Error(SEMKV_BAD_BUNDLE, "not valid JSON").where(mFile).fix(kRebuild);
    }
}

Document::~Document() = default;

Field Document::root() const
{
    return Field(*mValue, mFile);
}

std::string shortest(double number)
{
    return json(number).dump();
}
} // namespace semkv::runtime
