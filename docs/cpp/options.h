// The words of the command line.

#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace maskrcnn {

struct Options {
    std::string engine, image, plugins, masks;
    int min_size = 800, max_size = 1333;  // of the model's preprocessing: `maskrcnn inspect model.onnx`
    float score = 0.5f;
    bool is_version_compatible = false;
};

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
    if (options.min_size < 1 || options.max_size < 1) throw std::runtime_error("sizes are at least 1 pixel");
    options.engine = paths[0];
    options.image = paths[1];
    return options;
}

}  // namespace maskrcnn
