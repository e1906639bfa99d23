#!/usr/bin/env bash
# Compile Triton's C++ onnxruntime backend for the server of nvidia-pytriton, which comes without it, into a folder.
#   usage: get_onnxruntime_backend.sh DIR      then: DIFFENSE_ONNXRUNTIME_BACKEND=DIR diffense serve ...
# The sources are those of the server's release; the runtime is the one of the installed onnxruntime (or onnxruntime-gpu) wheel.
# Needs g++, git and RapidJSON's headers (Debian: rapidjson-dev). With CUDA_HOME it is built for GPUs, which needs nvcc.
#   PYTHON   an interpreter that has onnxruntime            SOURCES  a folder with the four checkouts, to fetch nothing
#   HEADER   onnxruntime_c_api.h of API version 19, likewise
set -euo pipefail

RELEASE=r24.10
HEADER_VERSION=v1.19.2
TRITON=https://github.com/triton-inference-server
API=https://raw.githubusercontent.com/microsoft/onnxruntime/$HEADER_VERSION/include/onnxruntime/core/session/onnxruntime_c_api.h
PYTHON=${PYTHON:-python3}
fail() { echo "get_onnxruntime_backend: $*" >&2; exit 1; }

[ $# -eq 1 ] || fail "usage: $0 DIR"
[ "$(uname -sm)" = "Linux x86_64" ] || fail "only for Linux on x86-64, this is $(uname -sm)"
mkdir -p "$1"
folder=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo '#include <rapidjson/document.h>' | g++ -x c++ -fsyntax-only - 2>"$work/log" ||
  fail "$(head -n 1 "$work/log"); on Debian and Ubuntu: apt install g++ rapidjson-dev"
capi=$("$PYTHON" -c 'import importlib.util as u, pathlib as p; print(p.Path(u.find_spec("onnxruntime").origin).parent / "capi")' 2>"$work/log") ||
  fail "$PYTHON has no onnxruntime: $(tail -n 1 "$work/log")"
runtime=$(find "$capi" -name 'libonnxruntime.so.*' | head -n 1)
[ -n "$runtime" ] || fail "the onnxruntime in $capi has no libonnxruntime.so; 1.32 has one"

sources=${SOURCES:-$work/sources}
for part in onnxruntime_backend backend core common; do
  [ -d "$sources/$part" ] ||
    git clone --quiet --depth 1 --branch "$RELEASE" "$TRITON/$part.git" "$sources/$part" 2>"$work/log" ||
    fail "cannot fetch $part $RELEASE: $(tail -n 1 "$work/log")"
done
mkdir "$work/include"
if [ -n "${HEADER:-}" ]; then cp "$HEADER" "$work/include/onnxruntime_c_api.h"; else
  curl --fail --silent --show-error --location --output "$work/include/onnxruntime_c_api.h" "$API" 2>"$work/log" ||
    fail "cannot fetch onnxruntime's C header $HEADER_VERSION: $(tail -n 1 "$work/log")"
fi

flags=(-std=c++17 -O3 -fPIC -DNDEBUG -DTRITON_ENABLE_STATS=1 -I"$work/include")
for part in onnxruntime_backend/src backend/include core/include common/include; do flags+=(-I"$sources/$part"); done
link=()
if [ -n "${CUDA_HOME:-}" ]; then
  flags+=(-DTRITON_ENABLE_GPU=1 -I"$CUDA_HOME/include")
  link+=(-L"$CUDA_HOME/lib64" -lcudart)
  "$CUDA_HOME/bin/nvcc" -O3 -Xcompiler -fPIC -c "$sources/backend/src/kernel.cu" -o "$work/kernel.o" 2>"$work/log" ||
    fail "nvcc: $(grep -m 1 error "$work/log")"
fi
# The memory tracker needs CUPTI and is switched off; of `common` the backend's parts use these three files.
find "$sources/onnxruntime_backend/src" "$sources/backend/src" "$sources/common/src" -maxdepth 1 -name '*.cc' |
  grep -E '/(onnxruntime|backend)[^/]*/src/|/(async_work_queue|thread_pool|error)\.cc$' | grep -v device_memory_tracker |
  xargs -P "$(nproc)" -I{} sh -c 'g++ "$@" -c {} -o "$0/$(basename {} .cc).o" || exit 255' "$work" "${flags[@]}" 2>"$work/log" ||
  fail "g++: $(grep -m 1 error "$work/log")"
ln -s "$runtime" "$work/libonnxruntime.so"
g++ -shared -o "$work/libtriton_onnxruntime.so" "$work"/*.o -L"$work" -lonnxruntime "${link[@]}" -Wl,-rpath,'$ORIGIN' \
  -Wl,--version-script="$sources/onnxruntime_backend/src/libtriton_onnxruntime.ldscript" 2>"$work/log" ||
  fail "g++: $(tail -n 1 "$work/log")"

# The runtime looks for its providers beside itself.
cp "$runtime" "$folder/libonnxruntime.so.1"
find "$capi" -name 'libonnxruntime_providers_*.so' -exec cp {} "$folder" \;
mv "$work/libtriton_onnxruntime.so" "$folder/libtriton_onnxruntime.so"
echo "$folder"
