# SPDX-License-Identifier: Apache-2.0
# The optional module _cuda: CUDA C++ kernels with the CUDA runtime inside, so that it needs neither a driver to be
# imported nor a library to be found. AUTO builds it where nvcc is, ON fails where it is not.
# Code for one chip of each generation; it runs on those of the same generation as well (8.6 and 8.9, 10.3, 12.1). What
# comes later, or between, compiles the PTX of the first when a kernel is first used.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 80 90a-real 100-real 120-real)
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(NOT PYLEARNGENE_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "PYLEARNGENE_CUDA is ${PYLEARNGENE_CUDA}, but no nvcc was found: put it on PATH or name it in "
                        "CUDACXX, or leave the module _cuda out with -DPYLEARNGENE_CUDA=OFF")
  endif()
  message(STATUS "The module _cuda is left out: no nvcc was found")
  return()
endif()

enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
find_package(CUDAToolkit REQUIRED)

pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/cuda/bindings.cpp)
# One instruction level: nothing of the CPU kernels is in this module.
target_compile_definitions(_cuda PRIVATE PYLEARNGENE_VERSION="${SKBUILD_PROJECT_VERSION}" PYLEARNGENE_LEVELS=1)
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)

# Each kernel file is compiled once per dtype of x, so that they are compiled side by side.
foreach(stem IN ITEMS expansion)
  foreach(x IN ITEMS FLOAT32 BFLOAT16 FLOAT16)
    add_library(${stem}_${x}_cuda OBJECT csrc/cuda/${stem}.cu)
    target_compile_definitions(${stem}_${x}_cuda PRIVATE PYLEARNGENE_X=${x})
    target_compile_options(${stem}_${x}_cuda PRIVATE -O3 -Xptxas=-warn-spills,-warn-lmem-usage -Xcompiler=-Wall,-Wextra)
    target_link_libraries(_cuda PRIVATE ${stem}_${x}_cuda)
  endforeach()
endforeach()
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O2 -Wall -Wextra>)

install(TARGETS _cuda DESTINATION pylearngene)
