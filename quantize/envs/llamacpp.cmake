# What of llama.cpp is compiled, and where it is installed. llama-cpp-python's own CMakeLists.txt
# includes this file right after its project() (CMAKE_PROJECT_llama_cpp_INCLUDE).
#
# QUANTIZE_CUDA is ON where nvcc is there. QUANTIZE_ENVIRONMENT is what identifies this file and its
# settings, so that a wheel which uv kept from another version of it is not taken for this one.

set(LLAMA_BUILD_TOOLS ON CACHE BOOL "" FORCE)
set(LLAMA_BUILD_SERVER ON CACHE BOOL "" FORCE)
set(LLAMA_TOOLS_INSTALL ON CACHE BOOL "" FORCE)
set(LLAMA_BUILD_TESTS OFF CACHE BOOL "" FORCE)
set(LLAMA_BUILD_EXAMPLES OFF CACHE BOOL "" FORCE)
set(LLAMA_BUILD_APP OFF CACHE BOOL "" FORCE)
set(LLAVA_BUILD OFF CACHE BOOL "" FORCE)
# Nothing is downloaded by a build or by a tool.
set(LLAMA_BUILD_UI OFF CACHE BOOL "" FORCE)
set(LLAMA_USE_PREBUILT_UI OFF CACHE BOOL "" FORCE)
set(LLAMA_OPENSSL OFF CACHE BOOL "" FORCE)
# The cache folder may be shared by machines: no instructions that only this one has. What is left is
# AVX2 on x86-64.
set(GGML_NATIVE OFF CACHE BOOL "" FORCE)
if(QUANTIZE_CUDA)
    set(GGML_CUDA ON CACHE BOOL "" FORCE)
endif()

# Programs go to the environment's bin/, beside its interpreter; they find the libraries, which the
# Python package has, by a path relative to their own place.
execute_process(
    COMMAND ${Python_EXECUTABLE} -c
        "import os, sysconfig as s; print(os.path.relpath(s.get_path('platlib'), s.get_path('scripts')))"
    OUTPUT_VARIABLE from_bin OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(CMAKE_INSTALL_BINDIR ${SKBUILD_SCRIPTS_DIR} CACHE PATH "" FORCE)
set(CMAKE_INSTALL_LIBDIR llama_cpp/lib CACHE PATH "" FORCE)
set(CMAKE_INSTALL_INCLUDEDIR llama_cpp/include CACHE PATH "" FORCE)
set(CMAKE_INSTALL_RPATH "$ORIGIN;$ORIGIN/${from_bin}/llama_cpp/lib" CACHE STRING "" FORCE)

function(quantize_select)
    set(root ${CMAKE_SOURCE_DIR}/vendor/llama.cpp)
    foreach(name batched-bench cli completion cvector-generator export-lora fit-params gguf-split results tts)
        if(NOT IS_DIRECTORY ${root}/tools/${name})
            message(FATAL_ERROR "llama.cpp has no tools/${name} any more: correct llamacpp.cmake")
        endif()
        set_property(DIRECTORY ${root}/tools/${name} PROPERTY EXCLUDE_FROM_ALL TRUE)
    endforeach()
    # What computes is ggml, with all optimization. The rest reads files, builds graphs and answers
    # requests: it takes nine tenths of the time to compile, and two fifths less of that like this.
    foreach(name src common vendor/cpp-httplib tools/mtmd tools/server)
        get_property(targets DIRECTORY ${root}/${name} PROPERTY BUILDSYSTEM_TARGETS)
        foreach(target ${targets})
            get_target_property(type ${target} TYPE)
            if(type MATCHES "^(EXECUTABLE|(STATIC|SHARED|OBJECT)_LIBRARY)$")
                target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O1>)
            endif()
        endforeach()
    endforeach()
endfunction()
# After the last line of CMakeLists.txt, when those folders are known.
cmake_language(DEFER CALL quantize_select)
