// Saved sessions: the same files as semkv_deploy/runtime/state.py writes and reads, which says what is in them.
#include "session/safetensors.h"
#include "session/session.h"

#include <algorithm>
#include <charconv>
#include <cstring>

namespace semkv::runtime
{
namespace
{
// Python's repr of a number between 0 and 1.
std::string repr(double number)
{
    char text[64];
    auto const how = number != 0 && number < 1e-4 ? std::chars_format::scientific : std::chars_format::fixed;
    std::string written(text, std::to_chars(text, text + sizeof(text), number, how).ptr);
    return how == std::chars_format::fixed && written.find('.') == std::string::npos ? written + ".0" : written;
}

// Rows of an array [B, heads, slots, …], and of these the slots below `live`.
Array cut(Array const& whole, int64_t first, int64_t last, int64_t live)
{
    Shape shape = whole.shape;
    shape[0] = last - first;
    int64_t const slots = shape[2];
    shape[2] = live;
    Array part(whole.type, shape);
    size_t const slot
        = slots ? whole.data.size() / static_cast<size_t>(elements({whole.shape[0], shape[1], slots})) : 0;
    size_t const bytes = slot * static_cast<size_t>(live), step = slot * static_cast<size_t>(slots);
    std::byte const* from = whole.data.data() + static_cast<size_t>(first * shape[1]) * step;
    std::byte* to = part.data.data();
    for (int64_t i = 0; i < shape[0] * shape[1]; ++i, from += step, to += bytes)
    {
        std::memcpy(to, from, bytes);
    }
    return part;
}

void paste(Array& whole, Array const& part, int64_t first)
{
    size_t const step = whole.data.size() / static_cast<size_t>(whole.shape[0] * whole.shape[1]);
    size_t const rows = static_cast<size_t>(part.shape[0] * part.shape[1]);
    size_t const bytes = rows ? part.data.size() / rows : 0;
    std::byte* to = whole.data.data() + static_cast<size_t>(first * whole.shape[1]) * step;
    for (size_t i = 0; i < rows; ++i, to += step)
    {
        std::memcpy(to, part.data.data() + i * bytes, bytes);
    }
}

// Files hold bfloat16 as float32, which NumPy has.
Array widened(Array const& array)
{
    if (array.type != Type::kBFloat16)
    {
        return array;
    }
    Array wide(Type::kFloat32, array.shape);
    for (size_t i = 0; i < array.data.size() / 2; ++i)
    {
        wide.as<uint32_t>()[i] = static_cast<uint32_t>(array.as<uint16_t>()[i]) << 16;
    }
    return wide;
}

Array narrowed(Array const& array, Type type)
{
    if (array.type == type)
    {
        return array;
    }
    Array narrow(type, array.shape);
    for (size_t i = 0; i < narrow.data.size() / 2; ++i)
    {
        // What was saved from bfloat16 has no more bits.
        narrow.as<uint16_t>()[i] = static_cast<uint16_t>(array.as<uint32_t>()[i] >> 16);
    }
    return narrow;
}
} // namespace

std::map<std::string, std::string> Session::identity() const
{
    return {{"format", "semkv-session"}, {"version", "1"}, {"bundle", mBundle->fingerprint()},
        {"target", mContract.target}, {"budget", repr(mContract.budget)}};
}

// Everything of some rows; without content only types and shapes, and slots are as many as there can be.
Feeds Session::tensors(int64_t first, int64_t last, bool content) const
{
    Feeds tensors;
    int64_t const count = last - first;
    Ids position, chunk, length;
    for (int64_t row = first; row < last; ++row)
    {
        position.push_back(mSlots.at(row));
        chunk.push_back(mSlots.chunks[static_cast<size_t>(row)].chunk);
        chunk.push_back(mSlots.chunks[static_cast<size_t>(row)].afterDelimiter);
    }
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        int64_t live = 0;
        for (int64_t row = first; row < last; ++row)
        {
            length.push_back(mSlots.length(group, row));
            live = std::max(live, mSlots.length(group, row));
        }
        std::string const tag = Binding::named(".{group}", group, mSlots.groups);
        for (size_t c = 0; c < mSlots.names.size(); ++c)
        {
            Column const& column = mSlots.columns[c][group];
            Array& array = tensors["column." + mSlots.names[c] + tag];
            array = content ? cut(Array::of({batch(), column.heads, column.capacity}, column.values), first, last, live)
                            : Array(Type::kInt64, {count, column.heads, column.capacity});
        }
        for (Buffer const& buffer : mContract.buffers)
        {
            Array& array = tensors["buffer." + buffer.name + tag];
            Shape shape = buffer.sizes(mContract.groups[group], count, mContract.headDim);
            if (!content)
            {
                array.type = buffer.type == Type::kBFloat16 ? Type::kFloat32 : buffer.type;
                array.shape = shape;
                continue;
            }
            int64_t const slots = buffer.hasSlots() ? live : shape[2];
            array = widened(cut(mEngine->read(buffer.name, group), first, last, slots));
        }
    }
    tensors["position"] = Array::of({count}, position);
    tensors["length"] = Array::of({static_cast<int64_t>(mSlots.groups), count}, length);
    tensors["chunk"] = Array::of({count, 2}, chunk);
    for (size_t number = 0; number < mBehaviours.size(); ++number)
    {
        for (auto& [name, array] : mBehaviours[number]->state(first, last))
        {
            tensors["behaviour." + std::to_string(number) + "." + name] = array;
        }
    }
    return tensors;
}

void Session::save(std::string const& path, int64_t row, std::string const& note) const
{
    mask(row);
    int64_t const first = row == kEveryRow ? 0 : row, last = row == kEveryRow ? batch() : row + 1;
    for (int64_t each = first; each < last; ++each)
    {
        checkBroken(each);
    }
    SavedTensors saved{tensors(first, last, true), identity()};
    saved.metadata["sha256"] = digestOf(saved.tensors);
    if (!note.empty())
    {
        saved.metadata["note"] = note;
    }
    writeTensors(path, saved);
}

// The note that was saved with a conversation, without reading the conversation; empty where there is none.
std::string Session::readNote(std::string const& path) const
{
    auto const metadata = readMetadata(path);
    checkIdentity(metadata, path);
    auto const note = metadata.find("note");
    return note != metadata.end() ? note->second : "";
}

void Session::load(std::string const& path, int64_t row)
{
    mask(row);
    int64_t const first = row == kEveryRow ? 0 : row, count = row == kEveryRow ? batch() : 1;
    SavedTensors const saved = readTensors(path);
    checkSaved(saved, path, first, count);
    int64_t const* const length = saved.tensors.at("length").as<int64_t>();
    reset(row);
    for (int64_t i = 0; i < count; ++i)
    {
        size_t const r = static_cast<size_t>(first + i);
        int64_t const* const chunk = saved.tensors.at("chunk").as<int64_t>() + 2 * i;
        mSlots.position[r] = saved.tensors.at("position").as<int64_t>()[i];
        mSlots.chunks[r] = {std::clamp<int64_t>(chunk[0], 0, mSlots.position[r]), chunk[1] != 0};
    }
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        std::string const tag = Binding::named(".{group}", group, mSlots.groups);
        std::copy_n(length + static_cast<int64_t>(group) * count, count, &mSlots.length(group, first));
        for (size_t c = 0; c < mSlots.names.size(); ++c)
        {
            Column& column = mSlots.columns[c][group];
            Array whole = Array::of({batch(), column.heads, column.capacity}, column.values);
            paste(whole, saved.tensors.at("column." + mSlots.names[c] + tag), first);
            std::copy_n(whole.as<int64_t>(), column.values.size(), column.values.data());
        }
        for (Buffer const& buffer : mContract.buffers)
        {
            Array whole = mEngine->read(buffer.name, group);
            paste(whole, narrowed(saved.tensors.at("buffer." + buffer.name + tag), buffer.type), first);
            mEngine->write(buffer.name, group, whole);
        }
    }
    for (size_t number = 0; number < mBehaviours.size(); ++number)
    {
        std::string const prefix = "behaviour." + std::to_string(number) + ".";
        Feeds state;
        for (auto const& [name, array] : mBehaviours[number]->state(first, first + count))
        {
            state[name] = saved.tensors.at(prefix + name);
        }
        mBehaviours[number]->restore(state, first);
    }
}
} // namespace semkv::runtime
