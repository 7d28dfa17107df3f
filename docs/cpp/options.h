// Command line options.

#pragma once

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace maskrcnn {

struct Options {
    std::string engine, image, plugins, masks;
    int min_size = 0, max_size = 0;  // model preprocessing, px
    float score = 0.5f;
    bool is_version_compatible = false;
};

// An integer of the metadata beside an engine, by its name; 0 if absent.
inline int metadata_number(const std::string &engine, const std::string &name) {
    std::ifstream file(engine + ".json");
    std::string text{std::istreambuf_iterator<char>(file), {}}, key = '"' + name + "\":";
    size_t found = text.find(key);
    return found == std::string::npos ? 0 : std::atoi(text.c_str() + found + key.size());
}

inline Options options_of(int count, char **words) {
    Options options;
    std::vector<std::string> paths;
    for (int k = 1; k < count; ++k) {
        std::string word = words[k];
        auto value = [&] { return ++k < count ? words[k] : throw std::runtime_error(word + " without a value"); };
        if (word == "--plugins") options.plugins = value();
        else if (word == "--min-size") options.min_size = std::atoi(value());
        else if (word == "--max-size") options.max_size = std::atoi(value());
        else if (word == "--masks") options.masks = value();
        else if (word == "--score") options.score = float(std::atof(value()));
        else if (word == "--version-compatible") options.is_version_compatible = true;
        else if (word.rfind("--", 0) == 0) throw std::runtime_error("unknown option " + word);
        else paths.push_back(word);
    }
    if (paths.size() != 2) throw std::runtime_error("usage: detect ENGINE IMAGE.ppm [options]; see main.cpp");
    options.engine = paths[0];
    options.image = paths[1];
    if (!options.min_size) options.min_size = metadata_number(options.engine, "min_size_px");
    if (!options.max_size) options.max_size = metadata_number(options.engine, "max_size_px");
    if (options.min_size < 1 || options.max_size < 1) {
        throw std::runtime_error("no sizes of the model's images in " + options.engine +
                                 ".json, which build-engine writes; copy it, or pass --min-size and --max-size");
    }
    return options;
}

}  // namespace maskrcnn
