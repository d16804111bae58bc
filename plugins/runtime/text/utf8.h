// Bytes as UTF-8 text: what is none becomes U+FFFD, as Python and Rust have it, one for each longest beginning of a
// character.
#pragma once

#include <string>
#include <vector>

namespace semkv::text
{
struct Character
{
    size_t begin, bytes; // where it lies
    bool valid;
    bool replacement; // U+FFFD, written so or in place of what is no character
};

std::vector<Character> charactersOf(std::string const& bytes);

// The text of the first `count` of them.
std::string textOf(std::string const& bytes, std::vector<Character> const& characters, size_t count);

// Throws SEMKV_BAD_ARGUMENT, naming the first byte that is no UTF-8.
void requireUtf8(std::string const& text, std::string const& where);
} // namespace semkv::text
