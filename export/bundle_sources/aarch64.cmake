# cmake -S . -B build-aarch64 -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake: for 64-bit ARM Linux, with Debian's cross compiler (g++-aarch64-linux-gnu), or zig
# (`pip install ziglang`) where that is missing.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

find_program(AARCH64_GXX aarch64-linux-gnu-g++)
if(AARCH64_GXX)
  set(CMAKE_CXX_COMPILER ${AARCH64_GXX})
else()
  find_program(ZIG NAMES zig python-zig)
  if(NOT ZIG)
    message(FATAL_ERROR "no compiler for aarch64: install g++-aarch64-linux-gnu, or `pip install ziglang` and have python-zig on the PATH")
  endif()
  set(CMAKE_CXX_COMPILER ${ZIG} c++)
  set(CMAKE_CXX_COMPILER_TARGET aarch64-linux-gnu)
endif()

# Headers and libraries of the machine that builds are not the device's; the folder of onnxruntime_c_api.h is named by hand.
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
