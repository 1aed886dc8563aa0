# Options that give apt sources and package lists of its own, so that suites which the system does
# not use can be asked without touching its configuration. Sourced after lib.sh; sets private_apt.
# shellcheck shell=bash disable=SC2154

apt_dir=$(dirname "$guests")/apt
mkdir -p "$apt_dir/lists/partial" "$apt_dir/archives/partial" "$apt_dir/empty"
keys=/usr/share/keyrings/debian-archive-keyring.gpg
cat >"$apt_dir/sources.list" <<EOF
deb [signed-by=$keys] http://deb.debian.org/debian bookworm main
deb [signed-by=$keys] http://deb.debian.org/debian bookworm-updates main
deb [signed-by=$keys] http://deb.debian.org/debian-security bookworm-security main
deb [signed-by=$keys] http://deb.debian.org/debian bookworm-backports main
EOF
private_apt=(
    -o "Dir::Etc::sourcelist=$apt_dir/sources.list"
    -o "Dir::Etc::sourceparts=$apt_dir/empty"
    -o "Dir::State::lists=$apt_dir/lists"
    -o "Dir::Cache::archives=$apt_dir/archives"
    -o "Dir::Cache::pkgcache="
    -o "Dir::Cache::srcpkgcache="
    -o "APT::Sandbox::User="
    -o "APT::Get::List-Cleanup=false"
)
# A list older than a day may name packages that the mirror has already replaced.
if [ -z "$(find "$apt_dir/lists" -name '*Packages*' -mtime -1 -print -quit)" ]; then
    say "reading Debian's package lists"
    apt-get "${private_apt[@]}" update -qq
fi
