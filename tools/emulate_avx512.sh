#!/usr/bin/env bash
# Runs the tests of the kernels on a processor with AVX-512 and its products of bfloat16 that Bochs emulates, for machines
# that have none: `BOCHS=... KERNEL=... tools/emulate_avx512.sh [FOLDER]`. Some minutes, on one core.
#
# BOCHS: the program, of its repository (bochs-emu/Bochs, after 3.0; Debian's 2.7 knows no bfloat16), built by
#   ./configure --enable-x86-64 --enable-cpu-level=6 --enable-avx --enable-evex --enable-pci --with-nogui && make
#   As of August 2026 it read vdpbf16ps' operand from a wrong place in memory; in cpu/decoder/ia_opcodes_evex.def that
#   instruction's OP_mVdq32 must be OP_mVps.
# KERNEL: Linux, as in /boot/vmlinuz-* of Debian's package linux-image-cloud-amd64.
# FOLDER: for the disk and the log of the serial line, serial.txt; a new one if left out.
#
# Debian's packages: bochs (for its VGA BIOS), busybox-static, cpio, isolinux, syslinux-common, xorriso.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(realpath "${1:-$(mktemp -d)}")
mkdir -p "$folder/guest"/{bin,dev,proc,tmp} "$folder/disk/isolinux"

# The tests, and all that they load.
tests=$(cargo test --release --lib --test rust --no-run --message-format=json | grep -o '"executable":"[^"]*"' | cut -d'"' -f4)
for name in tensorport rust; do
    program=$(grep "/$name-" <<<"$tests")
    strip -o "$folder/guest/bin/test_$name" "$program"
    ldd "$program" | grep -o '/[^ ]*' | xargs -I{} cp -L --parents {} "$folder/guest"
done
cp "$(command -v busybox)" "$folder/guest/bin"
cat >"$folder/guest/init" <<'INIT'
#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs tmp /tmp
result=passed
/bin/test_rust --test-threads=1 kernels:: || result=failed
/bin/test_tensorport --test-threads=1 kernels:: simd::vectors || result=failed
/bin/test_rust --test-threads=1 attention:: || result=failed
echo "emulated tests $result"
# The serial line takes its time.
busybox sleep 2
busybox poweroff -f
INIT
chmod +x "$folder/guest/init"

# A disk that starts them. Linux 6.1 does not start on this processor with all that it has.
cp "$KERNEL" "$folder/disk/isolinux/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$folder/disk/isolinux"
(cd "$folder/guest" && find . | cpio --quiet -o -H newc | gzip -1) >"$folder/disk/isolinux/initrd.gz"
cat >"$folder/disk/isolinux/isolinux.cfg" <<'BOOT'
DEFAULT linux
LABEL linux
  KERNEL vmlinuz
  APPEND initrd=initrd.gz console=ttyS0 nokaslr no5lvl mitigations=off lsm= tsc=reliable no_timer_check panic=-1 clearcpuid=fsrm,serialize,umip,invpcid,pku,pcid,la57
BOOT
xorriso -as mkisofs -quiet -o "$folder/disk.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat \
    -no-emul-boot -boot-load-size 4 -boot-info-table "$folder/disk"

cat >"$folder/bochsrc" <<BOCHSRC
megs: 1024
cpu: model=sapphire_rapids, count=1, ips=50000000
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$folder/disk.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$folder/serial.txt
log: $folder/bochs.txt
display_library: nogui
BOCHSRC
"$BOCHS" -q -f "$folder/bochsrc" </dev/null >/dev/null 2>&1 || true
grep -aE '^(test |emulated)' "$folder/serial.txt"
grep -aq '^emulated tests passed' "$folder/serial.txt"
