#!/usr/bin/env bash
# What the container runs: `diffense serve` on the mounted repository, with the log on standard error.
# Options given to the container come last, so they win.
set -euo pipefail
exec python3 -m diffense serve "${DIFFENSE_REPOSITORY:?set it to the folder that diffense export wrote}" \
  --host 0.0.0.0 --log - "$@"
