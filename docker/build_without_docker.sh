#!/usr/bin/env bash
# Build the CPU image and run a study inside it on a machine without a Docker engine: root on Debian.
#
#   apt-get install buildah debootstrap
#   docker/build_without_docker.sh WORK_FOLDER [SWEEP]      # about 12 GB; SWEEP: quickstart
#
# The base is a plain Debian with Python, made by debootstrap. What pip and apt need on this machine
# (mirrors, certificates) is taken from it for the build, and does not end in the image.
set -euo pipefail
work=$(realpath "${1:?a folder to work in}")
sweep=${2:-quickstart}
project=$(realpath "$(dirname "$0")/..")
export STORAGE_DRIVER=overlay BUILDAH_ISOLATION=chroot
storage=(--root "$work/containers" --runroot "$work/run")
commit=$(git -C "$project" rev-parse HEAD)

if [ ! -e "$work/base/usr/bin/pip3" ]; then
  mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list* | head -n 1)
  debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates \
    bookworm "$work/base" "${mirror:-http://deb.debian.org/debian}"
fi
if ! buildah "${storage[@]}" inspect --type image debian-python > /dev/null 2>&1; then
  base=$(buildah "${storage[@]}" from scratch)
  buildah "${storage[@]}" copy --quiet "$base" "$work/base" /
  buildah "${storage[@]}" commit --quiet "$base" debian-python
fi

# pip's settings of this machine, and the local folders that they name, for the build alone
python3 -m pip config list | sed -E "s/^(global|:env:)\.//; s/='(.*)'$/ = \1/" \
  | awk 'BEGIN {print "[global]"} !seen[$1]++' > "$work/pip.conf"
volumes=(--volume "$work/pip.conf:/etc/pip.conf:ro" --volume /etc/ssl/certs:/etc/ssl/certs:ro)
for folder in $(grep -oE '/(opt|srv)/[^/ ]+' "$work/pip.conf" | sort -u); do
  [ -d "$folder" ] && volumes+=(--volume "$folder:$folder:ro")
done

start=$SECONDS
buildah "${storage[@]}" bud --layers --format docker --quiet --file "$project/docker/Dockerfile" "${volumes[@]}" \
  --build-arg BASE_IMAGE=localhost/debian-python --build-arg COMMIT="$commit" \
  --tag prunefleet:cpu "$project"
digest=$(buildah "${storage[@]}" inspect --type image --format '{{.FromImageDigest}}' prunefleet:cpu)
echo "built prunefleet:cpu at $commit in $((SECONDS - start)) s: $digest"

start=$SECONDS
container=$(buildah "${storage[@]}" from prunefleet:cpu)
trap 'buildah "${storage[@]}" rm "$container" > /dev/null' EXIT
in_image=(buildah "${storage[@]}" run --env "PRUNEFLEET_IMAGE_DIGEST=$digest" "$container" --)
"${in_image[@]}" id
"${in_image[@]}" prunefleet run "$sweep"
echo "$sweep inside the image: $((SECONDS - start)) s"
"${in_image[@]}" python3 -c "
import pandas
rows = pandas.read_parquet('/storage/leaderboard/rows')
print(rows.groupby(['image_digest', 'git_commit'])['job_key'].nunique())"
