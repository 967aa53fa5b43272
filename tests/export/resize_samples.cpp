// Resizes each picture that comes in as a line "width height channels new_width new_height pillow
// filter" and its samples.
#include <cstdio>

#include "resize.h"

int main() {
    int width, height, channels, new_width, new_height, pillow;
    char filter[16];
    while (std::scanf("%d %d %d %d %d %d %15s", &width, &height, &channels, &new_width, &new_height,
                      &pillow, filter) == 7) {
        std::getchar();
        vitrim::Picture picture{
            width, height, channels,
            std::vector<uint8_t>(static_cast<size_t>(width) * height * channels)};
        if (std::fread(picture.samples.data(), 1, picture.samples.size(), stdin) !=
            picture.samples.size())
            return 1;
        const vitrim::Picture made = vitrim::resize(picture, new_width, new_height, filter, pillow);
        std::fwrite(made.samples.data(), 1, made.samples.size(), stdout);
    }
}
