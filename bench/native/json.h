// The JSON of the runner's line protocol: reads one value per line, writes one object per line.
#pragma once

#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace vitrim {

struct Json {
    enum class Kind { null, boolean, number, text, list, object };
    Kind kind = Kind::null;
    bool truth = false;
    double number = 0.0;
    std::string text;
    std::vector<Json> list;
    std::map<std::string, Json> object;

    // Returns the value of a key, or null where there is none.
    const Json &operator[](const std::string &key) const {
        static const Json nothing;
        const auto found = object.find(key);
        return found == object.end() ? nothing : found->second;
    }
    bool is_null() const { return kind == Kind::null; }
    int64_t whole(int64_t otherwise) const {
        return kind == Kind::number ? static_cast<int64_t>(number) : otherwise;
    }
    double real(double otherwise) const { return kind == Kind::number ? number : otherwise; }
    bool flag(bool otherwise) const { return kind == Kind::boolean ? truth : otherwise; }
    std::string words(const std::string &otherwise) const {
        return kind == Kind::text ? text : otherwise;
    }
};

class JsonReader {
  public:
    explicit JsonReader(const std::string &source) : source_(source) {}

    Json read() {
        const Json value = any(0);
        space();
        if (at_ != source_.size()) fail("something follows the value");
        return value;
    }

  private:
    const std::string &source_;
    size_t at_ = 0;

    [[noreturn]] void fail(const char *why) const {
        throw std::runtime_error("not JSON: " + std::string(why) + " at byte " +
                                 std::to_string(at_));
    }
    void space() {
        while (at_ < source_.size() && std::isspace(static_cast<unsigned char>(source_[at_])))
            ++at_;
    }
    char next() { return at_ < source_.size() ? source_[at_] : '\0'; }
    void expect(char wanted) {
        if (next() != wanted) fail("an unexpected character");
        ++at_;
    }
    bool word(const char *wanted) {
        const std::string text(wanted);
        if (source_.compare(at_, text.size(), text) != 0) return false;
        at_ += text.size();
        return true;
    }

    Json any(int depth) {
        if (depth > 64) fail("too deep");
        space();
        Json value;
        const char first = next();
        if (first == '{') {
            value.kind = Json::Kind::object;
            ++at_;
            for (space(); next() != '}'; space()) {
                if (!value.object.empty()) {
                    expect(',');
                    space();
                }
                const std::string key = string();
                space();
                expect(':');
                value.object[key] = any(depth + 1);
            }
            ++at_;
        } else if (first == '[') {
            value.kind = Json::Kind::list;
            ++at_;
            for (space(); next() != ']'; space()) {
                if (!value.list.empty()) expect(',');
                value.list.push_back(any(depth + 1));
            }
            ++at_;
        } else if (first == '"') {
            value.kind = Json::Kind::text;
            value.text = string();
        } else if (word("true")) {
            value.kind = Json::Kind::boolean;
            value.truth = true;
        } else if (word("false")) {
            value.kind = Json::Kind::boolean;
        } else if (!word("null")) {
            char *end = nullptr;
            value.kind = Json::Kind::number;
            value.number = std::strtod(source_.c_str() + at_, &end);
            const size_t after = static_cast<size_t>(end - source_.c_str());
            if (after == at_) fail("no value");
            at_ = after;
        }
        return value;
    }

    std::string string() {
        expect('"');
        std::string made;
        while (next() != '"') {
            if (at_ >= source_.size()) fail("a string without an end");
            char letter = source_[at_++];
            if (letter != '\\') {
                made += letter;
                continue;
            }
            letter = next();
            ++at_;
            if (letter == 'u') {
                made += utf8(code_point());
            } else {
                const std::string from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
                const size_t place = from.find(letter);
                if (place == std::string::npos) fail("an unknown escape");
                made += to[place];
            }
        }
        ++at_;
        return made;
    }

    unsigned hex4() {
        if (at_ + 4 > source_.size()) fail("a short escape");
        char *end = nullptr;
        const std::string digits = source_.substr(at_, 4);
        const unsigned value = static_cast<unsigned>(std::strtoul(digits.c_str(), &end, 16));
        if (*end != '\0') fail("a bad escape");
        at_ += 4;
        return value;
    }

    unsigned code_point() {
        const unsigned high = hex4();
        if (high < 0xd800 || high > 0xdbff || source_.compare(at_, 2, "\\u") != 0) return high;
        at_ += 2;
        return 0x10000 + ((high - 0xd800) << 10) + (hex4() - 0xdc00);
    }

    static std::string utf8(unsigned code) {
        std::string made;
        if (code < 0x80) return made += static_cast<char>(code);
        if (code < 0x800)
            return made = {static_cast<char>(0xc0 | code >> 6),
                           static_cast<char>(0x80 | (code & 0x3f))};
        if (code < 0x10000) {
            return made = {static_cast<char>(0xe0 | code >> 12),
                           static_cast<char>(0x80 | (code >> 6 & 0x3f)),
                           static_cast<char>(0x80 | (code & 0x3f))};
        }
        return made = {static_cast<char>(0xf0 | code >> 18),
                       static_cast<char>(0x80 | (code >> 12 & 0x3f)),
                       static_cast<char>(0x80 | (code >> 6 & 0x3f)),
                       static_cast<char>(0x80 | (code & 0x3f))};
    }
};

inline Json parse(const std::string &source) { return JsonReader(source).read(); }

inline std::string quoted(const std::string &text) {
    std::string made = "\"";
    for (const char letter : text) {
        if (letter == '"' || letter == '\\') {
            made += '\\';
            made += letter;
        } else if (static_cast<unsigned char>(letter) < 0x20) {
            char escape[8];
            std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(letter));
            made += escape;
        } else {
            made += letter;
        }
    }
    return made + '"';
}

inline std::string written(double value) {
    if (!std::isfinite(value)) return "null";
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.17g", value);
    return digits;
}
inline std::string written(int64_t value) { return std::to_string(value); }
inline std::string written(bool value) { return value ? "true" : "false"; }
inline std::string written(const std::string &value) { return quoted(value); }
template <typename Item> std::string written(const std::vector<Item> &items) {
    std::string made = "[";
    for (size_t i = 0; i < items.size(); ++i) made += (i ? ", " : "") + written(items[i]);
    return made + "]";
}

// {"key": value, ...}, in the order of the calls.
class Line {
  public:
    template <typename Value> Line &add(const char *key, const Value &value) {
        return raw(key, written(value));
    }
    Line &raw(const char *key, const std::string &json) {
        body_ += (body_.empty() ? "" : ", ") + quoted(key) + ": " + json;
        return *this;
    }
    std::string str() const { return "{" + body_ + "}"; }

  private:
    std::string body_;
};

}  // namespace vitrim
