#!/usr/bin/env bash
# Installs k2 from its authors' wheel pages: the wheel for the torch, CUDA and Python at hand.
#
#   tools/install_k2.sh               k2; training then uses it (see train.loss_backend)
#   tools/install_k2.sh k2 kaldifeat  both
#   tools/install_k2.sh --dry-run     says which wheel it would take
#   tools/install_k2.sh --page URL    a copy of the page, as on a machine without network
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"

usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

# find_wheel PACKAGE PAGE: prints the address of the newest wheel that fits, or says what there is.
find_wheel() {
  python - "$1" "$2" <<'PYTHON'
import html.parser
import platform
import re
import sys
import urllib.parse
import urllib.request

import torch
from pip._vendor.packaging import tags, utils

package, page = sys.argv[1:]
cuda = f"cuda{torch.version.cuda}" if torch.version.cuda else "cpu"
if not page:
    base = {"k2": "https://k2-fsa.github.io/k2", "kaldifeat": "https://csukuangfj.github.io/kaldifeat"}
    page = f"{base[package]}/{'cuda' if torch.version.cuda else 'cpu'}.html"
version = torch.__version__.partition("+")[0]
here = f"torch {version}, {cuda}, Python {platform.python_version()}, {platform.machine()}"
print(f"{package}: looking for a wheel for {here} on {page}", file=sys.stderr)


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if (tag, name) == ("a", "href")]


links = Links()
try:
    with urllib.request.urlopen(page, timeout=60) as reply:
        links.feed(reply.read().decode("utf-8"))
except (OSError, ValueError) as error:
    sys.exit(f"error: {page} cannot be read ({error}); save it elsewhere and give --page file:///...")
supported = set(tags.sys_tags())
fitting, others = [], set()
for link in links.found:
    name = urllib.parse.unquote(link.rpartition("/")[2])
    built = re.search(r"\+(cpu|cuda[\d.]+)\.torch([\d.]+)-", name)
    if built is None or not name.startswith(f"{package}-"):
        continue
    _, own_version, _, own_tags = utils.parse_wheel_filename(name)
    if not supported & own_tags:
        continue
    if built.groups() == (cuda, version):
        fitting.append((own_version, urllib.parse.urljoin(page, link)))
    others.add((tuple(map(int, built[2].split("."))), built[1]))
if not fitting:
    there = ", ".join(f"{'.'.join(map(str, t))} {c}" for t, c in sorted(others, reverse=True)[:12])
    sys.exit(
        f"error: no wheel of {package} for {here}.\n"
        f"For this Python and machine there are wheels for torch {there or '(none)'}.\n"
        f"Install one of these versions of torch in an environment of its own, or go on without "
        f"{package}: training then computes the same loss in torch."
    )
newest = max(fitting)
print(f"{package}: found {newest[0]}, {newest[1]}", file=sys.stderr)
print(newest[1])
PYTHON
}

# install PACKAGE URL: torch stays as it is.
install() {
  local constraints
  constraints=$(mktemp)
  python -c 'import torch; print(f"torch=={torch.__version__}")' >"$constraints"
  python -m pip install --quiet --constraint "$constraints" "$2" ||
    environment_die "$1 could not be installed; the lines above say why"
  rm -f "$constraints"
  python -c "import $1" ||
    environment_die "$1 is installed but cannot be imported; the lines above say why. Remove it \
with: python -m pip uninstall $1"
  echo "$1 is installed and can be imported"
}

packages=() dry=false page=''
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h)
      usage
      exit
      ;;
    --dry-run) dry=true ;;
    --page)
      [ $# -ge 2 ] || environment_die "--page needs an address"
      page=$2
      shift
      ;;
    k2 | kaldifeat) packages+=("$1") ;;
    *) environment_die "expected k2, kaldifeat, --dry-run or --page URL, got '$1'" ;;
  esac
  shift
done
[ ${#packages[@]} -gt 0 ] || packages=(k2)
activate_environment "$root"
for package in "${packages[@]}"; do
  url=$(find_wheel "$package" "$page") || exit 2
  $dry || install "$package" "$url"
done
