#!/usr/bin/env bash
# Compile Triton's C++ onnxruntime backend for the server of nvidia-pytriton, which comes without it, into a folder.
#   usage: get_onnxruntime_backend.sh DIR      then: DIFFENSE_ONNXRUNTIME_BACKEND=DIR diffense serve ...
# The sources are those of the server's release; the runtime is the one of the installed onnxruntime (or onnxruntime-gpu) wheel.
# Needs g++, git, curl, RapidJSON's headers (Debian: rapidjson-dev) and GitHub. With CUDA_HOME it is built for GPUs, which needs
# nvcc and onnxruntime-gpu; the server then needs CUDA's and cuDNN's libraries in LD_LIBRARY_PATH.
#   PYTHON   an interpreter that has onnxruntime            SOURCES  a folder with the four checkouts, to fetch none
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
mkdir -p "$1" 2>/dev/null || fail "$1 cannot be made"
folder=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo '#include <rapidjson/document.h>' | g++ -x c++ -fsyntax-only - 2>"$work/log" ||
  fail "$(head -n 1 "$work/log"); on Debian and Ubuntu: apt install g++ rapidjson-dev"
find_capi='
import importlib.util, pathlib, sys
found = importlib.util.find_spec("onnxruntime") or sys.exit("not installed")
print(pathlib.Path(found.origin).parent / "capi")
'
capi=$("$PYTHON" -c "$find_capi" 2>"$work/log") ||
  fail "$PYTHON has no onnxruntime ($(tail -n 1 "$work/log")); name one that has: PYTHON=.venv/bin/python $0 DIR"
runtime=$(find "$capi" -name 'libonnxruntime.so.*' 2>/dev/null | head -n 1 || true)
[ -n "$runtime" ] || fail "the onnxruntime in $capi has no libonnxruntime.so; 1.32 has one"
[ -z "${CUDA_HOME:-}" ] || [ -f "$capi/libonnxruntime_providers_cuda.so" ] ||
  fail "CUDA_HOME is set, but the onnxruntime in $capi is not onnxruntime-gpu"

sources=${SOURCES:-$work/sources}
for part in onnxruntime_backend backend core common; do
  [ -d "$sources/$part" ] || [ -z "${SOURCES:-}" ] || fail "SOURCES=$SOURCES has no folder $part"
  [ -d "$sources/$part" ] ||
    git clone --quiet --depth 1 --branch "$RELEASE" "$TRITON/$part.git" "$sources/$part" 2>"$work/log" ||
    fail "cannot fetch $part $RELEASE: $(tail -n 1 "$work/log")"
done
mkdir "$work/include"
if [ -n "${HEADER:-}" ]; then
  cp "$HEADER" "$work/include/onnxruntime_c_api.h" 2>/dev/null || fail "HEADER=$HEADER cannot be read"
else
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
    fail "nvcc: $(grep -m 1 error "$work/log" || tail -n 1 "$work/log")"
fi
compile() { g++ "${flags[@]}" -c "$1" -o "$work/$(basename "$1" .cc).o" 2>"$work/$(basename "$1").log"; }
finish() { wait "$1" || fail "g++: $(cat "$work"/*.cc.log | grep -m 1 error || cat "$work"/*.cc.log | tail -n 1)"; }
# The memory tracker needs CUPTI and is switched off; of `common` the backend's parts use these three files.
running=()
for file in "$sources"/onnxruntime_backend/src/*.cc "$sources"/backend/src/*.cc "$sources"/common/src/{async_work_queue,thread_pool,error}.cc; do
  [ "$(basename "$file")" = device_memory_tracker.cc ] && continue
  [ ${#running[@]} -lt "$(nproc)" ] || { finish "${running[0]}"; running=("${running[@]:1}"); }
  compile "$file" &
  running+=($!)
done
for one in "${running[@]}"; do finish "$one"; done
ln -s "$runtime" "$work/libonnxruntime.so"
g++ -shared -o "$work/libtriton_onnxruntime.so" "$work"/*.o -L"$work" -lonnxruntime "${link[@]}" -Wl,-rpath,'$ORIGIN' \
  -Wl,--version-script="$sources/onnxruntime_backend/src/libtriton_onnxruntime.ldscript" 2>"$work/log" ||
  fail "g++: $(tail -n 1 "$work/log")"

# The runtime looks for its providers beside itself. Moved into place, since a server may be using the files that are there.
cp "$runtime" "$work/libonnxruntime.so.1"
find "$capi" -name 'libonnxruntime_providers_*.so' -exec cp -t "$work" {} +
for file in "$work"/libonnxruntime.so.1 "$work"/libonnxruntime_providers_*.so "$work/libtriton_onnxruntime.so"; do
  mv -f "$file" "$folder/"
done
echo "$folder"
