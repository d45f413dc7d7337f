#!/bin/bash
# A Debian machine with systemd and cgroups version 2, for tests/vm_tests.py. As root:
#
#   tests/vm.sh build        make an image with this checkout installed in it, if there is none
#                            or Makefile, setup.cfg or this file have changed since
#   tests/vm.sh boot         boot it in the background; what it writes is lost when it ends
#   tests/vm.sh ssh COMMAND  run a command in it as root
#   tests/vm.sh stop         power it off
#   tests/vm.sh directory    print where the machine's files are
#
# Variables: SUITE (bookworm or trixie), DIR (for image and keys), PORT (of ssh, on this host),
# HTTP (ports of the machine, which are 10000 higher on this host), MEMORY, CPUS, and HOOK, a
# command that is run at build with the image's root directory as its argument.
# Needs the packages mmdebstrap, qemu-system-x86, e2fsprogs and openssh-client.
#
# Where KVM runs no machine, it is emulated: it builds as fast, for that is done in a chroot,
# boots in a minute, and its programs are up to 14 times slower.

set -euo pipefail
unset MAKEFLAGS MAKELEVEL MFLAGS  # of a make test-vm, not for make install in the image
CHECKOUT=$(realpath "$(dirname "$0")/..")
SELF=$(realpath "$0")
export SUITE=${SUITE:-bookworm}
export DIR=${DIR:-/var/tmp/notebooks-vm-$SUITE}
PORT=${PORT:-2222} HTTP=${HTTP:-8888-8907} MEMORY=${MEMORY:-4G} CPUS=${CPUS:-2}
BOOT_SECONDS=${BOOT_SECONDS:-300}
PACKAGES=(
    systemd systemd-sysv systemd-timesyncd dbus libpam-systemd openssh-server sudo udev iproute2
    ca-certificates procps e2fsprogs quota curl linux-image-cloud-amd64 initramfs-tools
    make python3 python3-venv openssl
)
QEMU=(qemu-system-x86_64 -cpu max -display none)

stamp() {
    cat "$CHECKOUT/Makefile" "$CHECKOUT/setup.cfg" "$SELF" | sha256sum
    echo "$SUITE" "${HOOK:-}"
}

# The mirror that this host uses.
mirror() {
    apt-get indextargets --format '$(REPO_URI)' | awk '
        /^http.*\/debian\/?$/ && !found { found = $0 }
        END { print found ? found : "http://deb.debian.org/debian" }'
}

build() {
    mkdir -p "$DIR"
    cd "$DIR"
    if [ -e stamp ] && [ "$(cat stamp)" = "$(stamp)" ]; then return; fi
    rm -rf stamp root root.tar
    [ -e key ] || ssh-keygen -q -t ed25519 -N '' -f key

    mmdebstrap --quiet --variant=minbase --include="${PACKAGES[*]}" \
        --customize-hook="bash '$SELF' customize \"\$1\"" \
        ${HOOK:+--customize-hook="$HOOK \"\$1\""} \
        --aptopt='Acquire::Languages "none"' \
        "$SUITE" root.tar "deb $(mirror) $SUITE main"
    mkdir root
    tar -C root --numeric-owner -xf root.tar
    rm -f base.img
    truncate -s 12G base.img
    mke2fs -q -t ext4 -E lazy_itable_init=1 -d root base.img
    rm -rf root root.tar

    accelerator >accelerator
    stamp >stamp
}

# mmdebstrap runs it with the root directory of what becomes the image.
customize() {
    root=$1
    mkdir -p -m 0700 "$root/root/.ssh"
    cp "$DIR/key.pub" "$root/root/.ssh/authorized_keys"
    echo vm >"$root/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 vm.example.org vm\n' >"$root/etc/hosts"
    printf '[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n' \
        >"$root/etc/systemd/network/80-dhcp.network"
    printf '/dev/vda / ext4 rw,relatime 0 1\n' >"$root/etc/fstab"
    mkdir -p "$root/var/log/journal"
    chroot "$root" systemctl --quiet enable systemd-networkd ssh
    for unit in systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer \
        e2scrub_all.timer; do
        chroot "$root" systemctl --quiet disable "$unit" 2>/dev/null || :
    done
    cp "$root"/boot/vmlinuz-* "$DIR/vmlinuz"
    cp "$root"/boot/initrd.img-* "$DIR/initrd"

    # Packages come from where this host has them from, and whom it trusts is trusted.
    for file in /usr/local/share/ca-certificates/*.crt; do
        [ ! -e "$file" ] || cp "$file" "$root/usr/local/share/ca-certificates/"
    done
    chroot "$root" update-ca-certificates >/dev/null
    for file in /etc/pip.conf "$HOME/.pip/pip.conf" "$HOME/.config/pip/pip.conf" \
        "${PIP_CONFIG_FILE:-}" "${PIP_CERT:-}"; do
        [ ! -f "$file" ] || [ -e "$root$file" ] || install -D -m 0644 "$file" "$root$file"
    done
    cat /etc/resolv.conf >"$root/etc/resolv.conf"

    mkdir "$root/root/notebooks"
    tar -C "$CHECKOUT" --exclude=./.git --exclude=./tests -cf - . \
        | tar -C "$root/root/notebooks" --no-same-owner -xf -
    if ! chroot "$root" make -C /root/notebooks install >"$DIR/install.log" 2>&1; then
        tail "$DIR/install.log" >&2
        exit 1
    fi
    printf 'nameserver 10.0.2.3\n' >"$root/etc/resolv.conf"  # of qemu's own network
}

# Prints `kvm` if a kernel runs on it up to where it misses its root directory.
accelerator() {
    if [ -w /dev/kvm ] && timeout 20 "${QEMU[@]}" -accel kvm -m 512M -serial stdio -no-reboot \
        -kernel vmlinuz -append 'console=ttyS0 panic=-1' </dev/null 2>/dev/null \
        | grep 'Kernel panic' >/dev/null; then
        echo kvm
    else
        echo tcg,thread=multi
    fi
}

boot() {
    cd "$DIR"
    if is_running; then
        echo "A machine of $DIR runs already." >&2
        exit 1
    fi
    cat >ssh_config <<-END
	Host vm
	    HostName 127.0.0.1
	    Port $PORT
	    User root
	    IdentityFile $DIR/key
	    IdentitiesOnly yes
	    StrictHostKeyChecking no
	    UserKnownHostsFile /dev/null
	    LogLevel ERROR
	    ConnectTimeout 30
	    ControlMaster auto
	    ControlPath $DIR/ssh-%r
	    ControlPersist 600
	END
    network=user,id=n0,hostfwd=tcp:127.0.0.1:$PORT-:22
    for port in $(seq "${HTTP%-*}" "${HTTP#*-}"); do
        network+=,hostfwd=tcp:127.0.0.1:$((port + 10000))-:$port
    done
    "${QEMU[@]}" -accel "${ACCEL:-$(cat accelerator)}" -smp "$CPUS" -m "$MEMORY" \
        -kernel vmlinuz -initrd initrd \
        -append "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=0 ${APPEND:-}" \
        -drive file=base.img,format=raw,if=virtio,cache=unsafe,snapshot=on \
        -netdev "$network" -device virtio-net-pci,netdev=n0 -device virtio-rng-pci \
        -serial file:console.log -name "vm,debug-threads=on" -daemonize -pidfile pid
    # Its network and its clients do not wait for its processors, which share ours with them.
    ps -L -p "$(cat pid)" -o tid=,comm= | awk '$2 == "CPU" { print $1 }' \
        | xargs renice -n 10 -p >/dev/null

    end=$((SECONDS + BOOT_SECONDS))
    until run true 2>/dev/null; do
        if ! is_running || [ $SECONDS -gt $end ]; then
            tail -n 20 console.log >&2
            echo "The machine does not answer." >&2
            stop
            exit 1
        fi
        sleep 0.5
    done
}

is_running() {
    [ -s "$DIR/pid" ] && grep -qs qemu "/proc/$(cat "$DIR/pid")/comm"
}

run() {
    ssh -F "$DIR/ssh_config" vm "$@"
}

stop() {
    if is_running; then
        pid=$(cat "$DIR/pid")
        timeout 20 ssh -F "$DIR/ssh_config" vm poweroff || :
        timeout 60 tail --pid="$pid" -f /dev/null || kill -KILL "$pid"
    fi
    rm -f "$DIR/pid"
}

case ${1:-} in
    build | boot | stop) $1 ;;
    directory) echo "$DIR" ;;
    customize) customize "$2" ;;
    ssh) shift; run "$@" ;;
    *) sed -n '/^#   /s/^#   //p' "$0"; exit 2 ;;
esac
