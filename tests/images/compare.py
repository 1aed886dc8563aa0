"""Random disk images under tandem and under the QEMU tools, in both directions.

Each image has a chain of its own (raw or qcow2, v2 or v3, any cluster size, zlib or zstd, lazy
refcounts), made by one program at random. Then it is written, zeroed, discarded, resized, committed,
rebased, converted and given snapshots, each by one program at random; writes go through qemu-io on the
file, through qemu-nbd, or through tandem nbd. After each step both programs must read what a model of
the disk says and call the image sound; in the end they must agree about `info`, `map`, `check` and
`compare`. A difference ends the run with the image's seed and its steps; --seed S --count 1 repeats it.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

KIB = 1024


class Difference(Exception):
    """The programs, or one of them and the model, do not agree."""


class Lab:
    """A directory with images, and the programs that work on them."""

    def __init__(self, tandem, where):
        self.tandem = tandem
        self.dir = where
        self.steps = []

    def path(self, name):
        return os.path.join(self.dir, name)

    def run(self, *words):
        self.steps.append(" ".join(words))
        done = subprocess.run(words, cwd=self.dir, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def ok(self, *words):
        status, out, err = self.run(*words)
        if status != 0:
            raise Difference(f"{words[0]} ended with {status}: {out}{err}")
        return out

    def img(self, who, *words):
        """qemu-img or tandem img; returns status, output, errors."""
        return self.run(*((self.tandem, "img") if who == "tandem" else ("qemu-img",)), *words)

    def img_ok(self, who, *words):
        return self.ok(*((self.tandem, "img") if who == "tandem" else ("qemu-img",)), *words)

    def export(self, who, name, fmt, aio="threads"):
        """A server of the image at the socket `nbd`; it ends with its client."""
        sock = self.path("nbd")
        if os.path.exists(sock):
            os.unlink(sock)
        start = (self.tandem, "nbd") if who == "tandem" else ("qemu-nbd",)
        words = [*start, "-k", sock, "-f", fmt, "--aio", aio, "--discard", "unmap", name]
        self.steps.append(" ".join(words))
        server = subprocess.Popen(words, cwd=self.dir, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while not os.path.exists(sock):
            if server.poll() is not None or time.monotonic() > until:
                raise Difference(f"{words} does not serve: {server.stderr.read()}")
            time.sleep(0.002)
        return server

    def write(self, how, name, fmt, commands, aio):
        """Lets qemu-io execute commands on the image, through one of the ways."""
        words = [w for c in commands for w in ("-c", c)]
        if how == "file":
            self.ok("qemu-io", "-d", "unmap", "-f", fmt, *words, name)
            return
        server = self.export(how, name, fmt, aio)
        try:
            self.ok("qemu-io", "-f", "raw", *words, "nbd+unix:///?socket=nbd")
        finally:
            if server.wait(timeout=60) != 0:
                raise Difference(f"{how}'s server ended with {server.returncode}: {server.stderr.read()}")

    def read(self, who, name, fmt):
        """All that the disk shows, by one of the ways to read it."""
        flat = self.path("flat")
        if os.path.exists(flat):
            os.unlink(flat)
        if who.endswith("-nbd"):
            server = self.export(who.removesuffix("-nbd"), name, fmt)
            self.img_ok("qemu", "convert", "-f", "raw", "-O", "raw", "nbd+unix:///?socket=nbd", "flat")
            server.wait(timeout=60)
        else:
            self.img_ok(who, "convert", "-f", fmt, "-O", "raw", name, "flat")
        with open(flat, "rb") as f:
            return f.read()


def merged(extents):
    """A map without what the programs may cut or know differently: where runs end, and whether data
    happens to be zeros."""
    out = []
    for e in extents:
        e = dict(e)
        start, length, offset = e.pop("start"), e.pop("length"), e.pop("offset", None)
        if e.get("data"):
            e.pop("zero", None)
        e["shift"] = None if offset is None else offset - start
        if out and out[-1][2] == e and out[-1][0] + out[-1][1] == start:
            out[-1][1] += length
        else:
            out.append([start, length, e])
    return out


def stripped(report, *keys):
    return {k: v for k, v in report.items() if k not in keys}


class Disk:
    """One image with its chain and what it ought to show."""

    def __init__(self, lab, rng):
        self.lab, self.rng = lab, rng
        self.data = bytearray()
        self.fmt, self.name = "raw", "i0"
        self.options = ""
        self.cluster = 512
        self.compat3 = True
        self.depth = 0
        self.snapshots = {}
        self.lower = []  # (name, format, contents) of what is behind, nearest first
        self.made = 0

    def who(self):
        return self.rng.choice(("tandem", "qemu"))

    def random_options(self):
        rng = self.rng
        self.cluster = 512 << rng.randrange(13)
        self.compat3 = rng.random() < 0.8
        o = f"cluster_size={self.cluster},compat={'1.1' if self.compat3 else '0.10'}"
        if self.compat3:
            o += f",refcount_bits={1 << rng.randrange(7)}"
            o += rng.choice(("", ",lazy_refcounts=on"))
            o += rng.choice(("", ",compression_type=zstd"))
        return o

    def sectors(self, most):
        return self.rng.randrange(1, most + 1) * 512

    def make(self):
        """A chain of one to four images."""
        for level in range(self.rng.choice((1, 1, 2, 2, 3, 4))):
            self.grow_chain(level == 0)
            for _ in range(self.rng.randrange(4)):
                self.writes()

    def grow_chain(self, first):
        rng, lab, who = self.rng, self.lab, self.who()
        behind, size = (self.name, self.fmt), len(self.data)
        name = f"i{self.made}"
        self.made += 1
        if first:
            size = self.sectors(6 * 2048) if rng.random() < 0.8 else rng.randrange(1, 7) << 20
            self.fmt = rng.choice(("raw", "qcow2", "qcow2"))
            if self.fmt == "raw":
                lab.img_ok(who, "create", "-q", "-f", "raw", name, str(size))
            else:
                self.options = self.random_options()
                prealloc = rng.choice(("", "", "", ",preallocation=metadata", ",preallocation=falloc"))
                lab.img_ok(who, "create", "-q", "-f", "qcow2", "-o", self.options + prealloc, name, str(size))
            self.data = bytearray(size)
        else:
            self.lower.insert(0, (*behind, bytes(self.data)))
            self.options, self.fmt = self.random_options(), "qcow2"
            words = ["create", "-q", "-f", "qcow2", "-o", self.options, "-b", behind[0], "-F", behind[1], name]
            if rng.random() < 0.3:
                size = self.sectors(6 * 2048)
                words.append(str(size))
            lab.img_ok(who, *words)
            self.fit(size)
            self.depth += 1
        self.name, self.snapshots = name, {}

    def fit(self, size):
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def spot(self):
        """A range, often at the edges of clusters or of the disk."""
        rng, size = self.rng, len(self.data)
        at = rng.randrange(size // 512) * 512
        if rng.random() < 0.4:
            at -= at % self.cluster
        elif rng.random() < 0.1:
            at = max(0, size - self.sectors(64))
        length = self.sectors(rng.choice((8, 128, 600)))
        if rng.random() < 0.4:
            length = -(-length // self.cluster) * self.cluster
        return at, min(length, size - at)

    def writes(self):
        commands, how = [], self.rng.choice(("file", "file", "qemu", "tandem", "tandem"))
        given_up = []
        for _ in range(self.rng.randrange(1, 6)):
            at, length = self.spot()
            kind = self.rng.random()
            if kind < 0.6:
                byte = self.rng.randrange(256)
                commands.append(f"write -P {byte} {at} {length}")
                self.data[at : at + length] = bytes((byte,)) * length
            elif kind < 0.8:
                commands.append(f"write -z{self.rng.choice(('', ' -u'))} {at} {length}")
                self.data[at : at + length] = bytes(length)
            elif kind < 0.95:
                commands.append(f"discard {at} {length}")
                given_up.append((at, length))
                break
            else:
                commands.append("flush")
        aio = self.rng.choice(("threads", "io_uring")) if how == "tandem" else "threads"
        self.lab.write(how, self.name, self.fmt, commands, aio)
        # What was given up is whatever it is, by sectors zeros or as it was, for everybody.
        for at, length in given_up:
            now = self.lab.read("qemu", self.name, self.fmt)[at : at + length]
            for s in range(0, length, 512):
                there = now[s : s + 512]
                behind = self.lower[0][2][at + s : at + s + 512] if self.lower and not self.compat3 else b""
                if any(there) and there != self.data[at + s : at + s + 512] and there != behind:
                    raise Difference(f"a discard made byte {at + s} something else")
            self.data[at : at + length] = now

    def compressed_write(self):
        """A compressed cluster; refused where one that is not compressed is already."""
        if self.fmt != "qcow2":
            return
        at = self.rng.randrange(-(-len(self.data) // self.cluster)) * self.cluster
        if at + self.cluster > len(self.data):
            return
        byte = self.rng.randrange(1, 256)
        write = f"write -c -P {byte} {at} {self.cluster}"
        if self.lab.run("qemu-io", "-f", "qcow2", "-c", write, self.name)[0] == 0:
            self.data[at : at + self.cluster] = bytes((byte,)) * self.cluster

    def resize(self):
        old, size = len(self.data), self.sectors(6 * 2048)
        shrink = ("--shrink",) if size < old else ()
        who = self.who()
        if self.attempt(who, "resize", "-q", *shrink, "-f", self.fmt, self.name, str(size)):
            self.fit(size)

    def attempt(self, who, *words):
        """What an image may forbid: then both refuse it. tandem may do what QEMU says it has not."""
        status, _, err = self.lab.img(who, *words)
        if status == 0:
            return True
        other = "qemu" if who == "tandem" else "tandem"
        if self.lab.img(other, *words)[0] != 0:
            return False
        if who == "qemu" and "not supported" in err:
            return True
        raise Difference(f"{who} refused {words}, {other} did it: {err}")

    def snapshot(self):
        if self.fmt != "qcow2":
            return
        do = self.rng.choice(("-c", "-c", "-a", "-d"))
        if do == "-c" or not self.snapshots:
            tag = f"s{len(self.lab.steps)}"
            # Refcounts of one bit forbid it.
            if self.attempt(self.who(), "snapshot", "-c", tag, self.name):
                self.snapshots[tag] = bytes(self.data)
            else:
                # qemu-img loses a cluster then.
                self.lab.img("qemu", "check", "-q", "-r", "leaks", self.name)
        else:
            tag = self.rng.choice(sorted(self.snapshots))
            self.lab.img_ok(self.who(), "snapshot", do, tag, self.name)
            if do == "-d":
                del self.snapshots[tag]
            else:
                self.data = bytearray(self.snapshots[tag])

    def commit(self):
        if not self.lower or self.snapshots:
            return
        keep = ("-d",) if self.rng.random() < 0.3 else ()
        self.lab.img_ok(self.who(), "commit", "-q", *keep, "-f", "qcow2", self.name)
        name, fmt, old = self.lower[0]
        shown = bytes(self.data)
        # A base that is longer keeps what lies beyond.
        shown += old[len(shown) :]
        self.expect("qemu", name, fmt, shown)
        self.lower[0] = (name, fmt, shown)

    def rebase(self):
        # What a snapshot shows from behind is not kept.
        if not self.lower or self.snapshots:
            return
        choice = self.rng.randrange(len(self.lower) + 1)
        if choice == len(self.lower):
            self.lab.img_ok(self.who(), "rebase", "-q", "-f", "qcow2", "-b", "", self.name)
            self.lower = []
        else:
            name, fmt, _ = self.lower[choice]
            self.lab.img_ok(self.who(), "rebase", "-q", "-f", "qcow2", "-b", name, "-F", fmt, self.name)
            self.lower = self.lower[choice:]

    def convert(self):
        who, rng = self.who(), self.rng
        name = f"i{self.made}"
        self.made += 1
        fmt = rng.choice(("raw", "qcow2", "qcow2", "qcow2"))
        words = ["convert", "-q", "-f", self.fmt, "-O", fmt]
        if fmt == "qcow2":
            self.options = self.random_options()
            words += ["-o", self.options, *rng.choice(((), ("-c",), ("-c",)))]
        self.lab.img_ok(who, *words, self.name, name)
        self.name, self.fmt, self.lower, self.snapshots = name, fmt, [], {}

    def expect(self, who, name, fmt, data):
        found = self.lab.read(who, name, fmt)
        if found != bytes(data):
            at = next((i for i, (a, b) in enumerate(zip(found, data)) if a != b), min(len(found), len(data)))
            raise Difference(f"{who} reads {name} of {len(found)} bytes, not {len(data)}; differs at byte {at}")

    def judge(self):
        for who in ("tandem", "qemu"):
            self.expect(who, self.name, self.fmt, self.data)
            if self.fmt == "qcow2":
                status, out, err = self.lab.img(who, "check", "-f", "qcow2", self.name)
                if status != 0:
                    raise Difference(f"{who} calls {self.name} unsound ({status}): {out}{err}")

    def both(self, *words):
        """The same command under both; statuses and outputs."""
        return [self.lab.img(who, *words) for who in ("tandem", "qemu")]

    def final(self):
        lab, f = self.lab, ("-f", self.fmt)
        for who in ("tandem-nbd", "qemu-nbd"):
            self.expect(who, self.name, self.fmt, self.data)
        if self.fmt == "qcow2":
            for tag, shown in self.snapshots.items():
                for who in ("tandem", "qemu"):
                    lab.img_ok(who, "convert", "-l", f"snapshot.name={tag}", "-f", "qcow2", "-O", "raw", self.name, "then")
                    with open(lab.path("then"), "rb") as then:
                        found = then.read()
                    # qemu-img gives it the size that the disk has now.
                    n = min(len(found), len(shown)) if who == "qemu" else len(shown)
                    if found[:n] != shown[:n] or len(found) < n:
                        raise Difference(f"{who} reads snapshot {tag} wrongly")
            ours, theirs = self.both("snapshot", "-l", self.name)
            if ours[:2] != theirs[:2]:
                raise Difference(f"snapshot -l: {ours} {theirs}")
            ours, theirs = (json.loads(b[1]) for b in self.both("check", *f, "--output=json", self.name))
            if ours != theirs:
                raise Difference(f"check: {ours} {theirs}")
        ours, theirs = (merged(json.loads(b[1])) for b in self.both("map", *f, "--output=json", self.name))
        if ours != theirs:
            raise Difference(f"map: {ours} {theirs}")
        ours, theirs = (json.loads(b[1]) for b in self.both("info", *f, "--output=json", self.name))
        # What depends on how the file system is asked.
        drop = ("children", "actual-size", "full-backing-filename")
        if stripped(ours, *drop) != stripped(theirs, *drop):
            raise Difference(f"info: {ours} {theirs}")
        ours, theirs = self.both("info", *f, self.name)
        if ours[:2] != theirs[:2]:
            raise Difference(f"info for people: {ours} {theirs}")
        with open(lab.path("model"), "wb") as model:
            model.write(self.data)
        ours, theirs = self.both("compare", "-f", self.fmt, "-F", "raw", self.name, "model")
        if ours != theirs or ours[0] != 0:
            raise Difference(f"compare: {ours} {theirs}")
        with open(lab.path("model"), "r+b") as model:
            model.seek(self.rng.randrange(len(self.data)))
            byte = model.read(1)
            model.seek(-1, os.SEEK_CUR)
            model.write(bytes((byte[0] ^ 255,)))
        ours, theirs = self.both("compare", "-f", self.fmt, "-F", "raw", self.name, "model")
        if ours != theirs or ours[0] != 1:
            raise Difference(f"compare of what differs: {ours} {theirs}")


def one(tandem, seed, base):
    where = tempfile.mkdtemp(prefix="tandem-images-", dir=base)
    lab = Lab(tandem, where)
    try:
        disk = Disk(lab, random.Random(seed))
        disk.make()
        disk.judge()
        work = (disk.writes,) * 4 + (disk.compressed_write, disk.resize, disk.snapshot, disk.commit)
        work += (disk.rebase, disk.convert)
        for _ in range(disk.rng.randrange(2, 7)):
            disk.rng.choice(work)()
            disk.judge()
        disk.final()
    except (Difference, ValueError, subprocess.TimeoutExpired) as e:
        print(f"image {seed}: {e}\nsteps:", *lab.steps, sep="\n  ", file=sys.stderr)
        print(f"repeat with: scripts/compare-images --seed {seed} --count 1", file=sys.stderr)
        return False
    finally:
        shutil.rmtree(where)
    return True


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    words.add_argument("--count", type=int, default=200, help="images (200)")
    words.add_argument("--seed", type=int, default=1, help="of the first image (1); the next has the next")
    words.add_argument("--tandem", required=True, help="the binary")
    a = words.parse_args()
    tandem = os.path.realpath(a.tandem)
    if not os.access(tandem, os.X_OK):
        sys.exit(f"compare-images: {tandem} is missing; build it with cargo build --release")
    for tool in ("qemu-img", "qemu-io", "qemu-nbd"):
        if not shutil.which(tool):
            print(f"skipped: {tool} is not installed; run scripts/setup")
            return
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    bad = [s for s in range(a.seed, a.seed + a.count) if not one(tandem, s, base)]
    print(f"compare-images: {a.count - len(bad)} of {a.count} images agree in both directions")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
