#!/usr/bin/env bash
# Makes a recipe for a new language from egs/TEMPLATE.
#
#   tools/new_recipe.sh CODE NAME      as in: tools/new_recipe.sh cy "Welsh"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

if [ $# -ne 2 ]; then
  sed -n '2,4s/^# \{0,1\}//p' tools/new_recipe.sh >&2
  exit 2
fi
code=$1 name=$2
[[ $code =~ ^[a-z]{2,3}$ ]] || fail "the code must be two or three letters a to z (ISO 639), got '$code'"
[[ -n ${name// /} && $name != *$'\n'* ]] || fail "the name must be one line of text, as in \"Welsh\""
[ ! -e "egs/$code" ] || fail "egs/$code is there already; edit it, or choose another code"

new=$(mktemp -d "egs/.new.XXXXXX")
trap 'rm -rf -- "$new"' EXIT
chmod 755 "$new"
cp -r egs/TEMPLATE/. "$new"
while IFS= read -r -d '' file; do
  text=$(<"$file")
  text=${text//@CODE@/"$code"}
  printf '%s\n' "${text//@LANGUAGE@/"$name"}" >"$file"
done < <(find "$new" -type f -print0)
mv -- "$new" "egs/$code"
printf 'made egs/%s: put audio and transcripts.tsv where egs/%s/README.md says, then egs/%s/run.sh\n' \
  "$code" "$code" "$code"
