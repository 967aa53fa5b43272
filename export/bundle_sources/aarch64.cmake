# cmake -S . -B build-aarch64 -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake
#
# For 64-bit ARM Linux, with Debian's cross compiler (g++-aarch64-linux-gnu), or zig (`pip install
# ziglang`) where that is missing or with -DVITRIM_ZIG=ON.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
# CMake reads this file again for each of its checks, and passes on only what is named here.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES VITRIM_ZIG VITRIM_STATIC)

if(NOT VITRIM_ZIG)
  find_program(AARCH64_GXX aarch64-linux-gnu-g++)
endif()
if(AARCH64_GXX AND NOT VITRIM_ZIG)
  set(CMAKE_CXX_COMPILER ${AARCH64_GXX})
else()
  find_program(ZIG NAMES python-zig zig)
  if(NOT ZIG)
    message(FATAL_ERROR "no compiler for aarch64: install g++-aarch64-linux-gnu, or `pip install ziglang` and have python-zig on the PATH")
  endif()
  set(CMAKE_CXX_COMPILER ${ZIG} c++)
  if(VITRIM_STATIC)
    # zig links musl statically, but not glibc.
    set(CMAKE_CXX_COMPILER_TARGET aarch64-linux-musl)
  else()
    # The oldest C library that a device may have; Debian's compiler requires its own version.
    set(CMAKE_CXX_COMPILER_TARGET aarch64-linux-gnu.2.27)
  endif()
  # CMake's checks link nothing: zig compiles its C++ library once for each kind of build, which
  # takes a minute.
  set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
  # This machine's ar may not support the device's objects.
  set(CMAKE_CXX_ARCHIVE_CREATE "${ZIG} ar qc <TARGET> <LINK_FLAGS> <OBJECTS>")
  set(CMAKE_CXX_ARCHIVE_APPEND "${ZIG} ar q <TARGET> <LINK_FLAGS> <OBJECTS>")
  set(CMAKE_CXX_ARCHIVE_FINISH "${ZIG} ranlib <TARGET>")
endif()

# Headers and libraries of the build machine are not the device's; the folder of
# onnxruntime_c_api.h is given explicitly.
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
