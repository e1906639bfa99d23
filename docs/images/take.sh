#!/usr/bin/env bash
# Take the README's picture of the demonstration's report with headless Chromium (Debian: apt-get install chromium).
# usage: docs/images/take.sh   after `make demo`
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1 --user-data-dir="$profile" \
  --window-size=1100,1900 --screenshot="$PWD/docs/images/report.png" "file://$PWD/runs/demo/report.html"
