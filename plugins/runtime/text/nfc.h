// Unicode's form NFC.
#pragma once

#include <string>

namespace semkv::text
{
// Whether a UTF-8 text is surely in the form. A few texts that are get no for an answer: those in which a mark stands
// that joins other letters than the one before it.
bool isSurelyNfc(std::string const& text);
} // namespace semkv::text
