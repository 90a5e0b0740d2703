#!/usr/bin/env bash
# Build the image where no registry of images can be reached, on Debian's own Python 3.11, and ask a
# container of it for vectors. Needs root, and: apt-get install buildah debootstrap curl
#   tests/try_image.sh [FOLDER]     (with a folder, what is built stays there for the next time)
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$(mktemp -d)}
mkdir -p "$work"
work=$(realpath "$work")
engine() { buildah --root "$work/store" --runroot "$work/run" "$@"; }
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}
container=
server=
cleanup() {
  if [ -n "$server" ]; then kill -TERM "$server" 2> /dev/null || true; wait "$server" || true; fi
  if [ -n "$container" ]; then engine rm "$container" > /dev/null; fi
  if [ -z "${1:-}" ]; then rm -rf "$work"; fi
}
trap 'cleanup "${1:-}"' EXIT

if ! engine images -q python-stand-in 2> /dev/null | grep -q .; then
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm \
    "$work/debian" > "$work/debootstrap.log"
  tar -C "$work/debian" -cf "$work/debian.tar" .
  printf 'FROM scratch\nADD debian.tar /\n' > "$work/Dockerfile"
  engine bud -q -t python-stand-in -f "$work/Dockerfile" "$work"
  rm -rf "$work/debian" "$work/debian.tar"
fi

# where this machine's pip looks for packages, pip has to look in there as well; what stands in an
# index on disk leads to folders beside it
mounts=()
for path in /etc/pip.conf "$HOME/.config/pip/pip.conf" /etc/ssl/certs \
  $(python3 -m pip config list | grep -oE "(file://)?/[^' ]+" | sed 's,^file://,,; s,/simple/*$,,'); do
  if [ -e "$path" ]; then mounts+=(-v "$path:$path:ro"); fi
done
engine bud --layers --format docker --network host -t finetuner:trial "${mounts[@]}" \
  --build-arg PYTHON_IMAGE=localhost/python-stand-in --build-arg TORCH_INDEX= . > "$work/build.log" 2>&1 \
  || { tail -30 "$work/build.log"; exit 1; }
engine inspect --type image finetuner:trial \
  | python3 -c 'import json, sys; config = json.load(sys.stdin)["Docker"]["config"]
print("user", config["User"], "volumes", list(config["Volumes"]), "healthcheck", bool(config["Healthcheck"]))'

read -r grpc http < <(python3 -c 'import socket
sockets = [socket.socket() for _ in range(2)]
for each in sockets: each.bind(("127.0.0.1", 0))
print(*(each.getsockname()[1] for each in sockets))')
mkdir -p "$work/flow"
sed -e "s/port: \[.*\]/port: [$grpc, $http]/" -e 's,\.\./executors,/app/executors,' \
  flows/encode.yml > "$work/flow/flow.yml"
container=$(engine from --pull-never localhost/finetuner:trial)
if engine run "$container" -- finetuner serve --host 0.0.0.0 flows/encode.yml > "$work/open.log" 2>&1; then
  echo 'it started open to all, without a token'; exit 1
fi
grep -o 'without a token' "$work/open.log" | head -1
engine run -v "$work/flow:/flow:ro" -e FINETUNER_TOKEN=only-for-this-trial "$container" -- \
  finetuner serve --host 0.0.0.0 /flow/flow.yml > "$work/server.log" 2>&1 &
server=$!
ask() { curl -sS --fail-with-body -H 'Authorization: Bearer only-for-this-trial' \
  -H 'Content-Type: application/json' "http://127.0.0.1:$http$1" "${@:2}"; }
for _ in $(seq 120); do
  if ask /dry_run > /dev/null 2>&1; then break; fi
  kill -0 "$server" || { cat "$work/server.log"; exit 1; }
  sleep 1
done
picture=$(base64 -w0 examples/emoji/test/airplane/noto.webp)
printf '{"data": [{"blob": "%s"}]}' "$picture" > "$work/question.json"
ask /encode -d "@$work/question.json" \
  | python3 -c 'import json, sys; print("a vector of", len(json.load(sys.stdin)["data"][0]["embedding"]))'
