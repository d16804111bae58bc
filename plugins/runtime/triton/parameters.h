// Parameters of config.pbtxt.
#pragma once

#include "bundle/json.h"

#include <nlohmann/json.hpp>

#include <map>
#include <string>

namespace semkv::runtime
{
// Each is taken once.
class Parameters
{
public:
    explicit Parameters(nlohmann::json const& config)
    {
        nlohmann::json const parameters = config.value("parameters", nlohmann::json::object());
        for (auto const& [name, value] : parameters.items())
        {
            mGiven[name] = value.value("string_value", "");
        }
    }

    std::string text(std::string const& name, std::string const& otherwise = "")
    {
        auto const found = mGiven.find(name);
        std::string const value = found != mGiven.end() ? found->second : otherwise;
        mGiven.erase(name);
        return value;
    }

    double number(std::string const& name, double otherwise, double least)
    {
        std::string const value = text(name);
        if (value.empty())
        {
            return otherwise;
        }
        size_t read = 0;
        double number = least - 1;
        try
        {
            number = std::stod(value, &read);
        }
        catch (std::exception const&)
        {
        }
        if (read != value.size() || !(number >= least) || number > 1e9)
        {
            throw Error(SEMKV_BAD_ARGUMENT, "not a number of a sensible size")
                .where("config.pbtxt, parameter " + name)
                .expected(shortest(least) + " or more")
                .got(value);
        }
        return number;
    }

    int64_t integer(std::string const& name, int64_t otherwise, int64_t least)
    {
        return static_cast<int64_t>(number(name, static_cast<double>(otherwise), static_cast<double>(least)));
    }

    bool flag(std::string const& name)
    {
        std::string const value = text(name, "false");
        bool const yes = value == "true" || value == "True";
        if (!yes && value != "false" && value != "False")
        {
            throw Error(SEMKV_BAD_ARGUMENT, "neither true nor false")
                .where("config.pbtxt, parameter " + name)
                .got(value);
        }
        return yes;
    }

    // What is not known cannot be followed.
    void checkEmpty() const
    {
        if (!mGiven.empty())
        {
            throw Error(SEMKV_BAD_ARGUMENT, "the C++ backend does not know the parameter")
                .where("config.pbtxt")
                .got(mGiven.begin()->first);
        }
    }

private:
    std::map<std::string, std::string> mGiven;
};
} // namespace semkv::runtime
