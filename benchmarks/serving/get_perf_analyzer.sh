#!/usr/bin/env bash
# Put a perf_analyzer that runs on Debian 12 and newer (x86-64, no GPU, no root) into a folder.
#   usage: get_perf_analyzer.sh DIR      then: diffense bench --perf-analyzer DIR/perf_analyzer ...
# tritonclient's wheels up to 2.60 carry the program; 2.51.0 is the last that was built for a C library as old as Debian 12's.
# It also needs libb64 and libcudart, which the nvidia-pytriton wheel carries. PYTHON chooses an interpreter that has pip.
set -euo pipefail

CLIENT=2.51.0
SERVER=0.7.0
PYTHON=${PYTHON:-python3}
fail() { echo "get_perf_analyzer: $*" >&2; exit 1; }

[ $# -eq 1 ] || fail "usage: $0 DIR"
[ "$(uname -sm)" = "Linux x86_64" ] || fail "only for Linux on x86-64, this is $(uname -sm)"
mkdir -p "$1/lib"
folder=$(cd "$1" && pwd)
program=$folder/perf_analyzer
works() { [ -x "$program" ] && "$program" --version 2>&1 | grep -q "Version $CLIENT "; }
if works; then echo "$program is there already"; exit 0; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for wheel in "tritonclient==$CLIENT" "nvidia-pytriton==$SERVER"; do
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$work" "$wheel" 2>"$work/log" ||
    fail "pip cannot download $wheel: $(tail -n 1 "$work/log")"
done
"$PYTHON" - "$work" "$folder/lib" <<'PY' || fail "the wheels do not hold what they used to"
import pathlib, sys, zipfile

work, lib = map(pathlib.Path, sys.argv[1:])
wanted = {"/bin/perf_analyzer": "perf_analyzer", "/libb64-": "libb64.so.0d", "/libcudart-": "libcudart.so.12"}
for wheel in work.glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            for mark, file in wanted.items():
                if name.endswith(mark) or (mark.endswith("-") and mark in name):
                    (lib / file).write_bytes(archive.read(name))
sys.exit(not all((lib / file).is_file() for file in wanted.values()))
PY
chmod 755 "$folder/lib/perf_analyzer"
cat >"$program" <<'SH'
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$here/lib/perf_analyzer" "$@"
SH
chmod 755 "$program"
works || fail "it does not run here: $("$program" --version 2>&1 | head -n 1)"
echo "$program"
