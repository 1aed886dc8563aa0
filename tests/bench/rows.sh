#!/bin/sh
# Runs rows of the benchmark table, natively or in a guest; prints "kernel NAME SECONDS CHECKSUM" for
# each, behind a line "start NAME". BENCH_CPU=1 counts processor time. Lies beside the built `kernels`
# and the other files of this folder.
#
#   rows.sh ROW...
cd "$(dirname "$0")" || exit 1
tmp=${BENCH_TMP:-/dev/shm}
timed() { ./kernels --time "$@" 2>/dev/null || echo "failed $1"; }

# Time for 1 GB (1000 signatures) from a rate that openssl measures in a second.
rate() {
    name=$1
    shift
    openssl speed -mr -seconds 1 "$@" 2>/dev/null | awk -F: -v n="$name" '
        $1 == "+F" && $NF > 0 { printf "kernel %s %.4f 0\n", n, 1e9 / $NF; ok = 1 }
        $1 == "+F2" { printf "kernel %s %.4f 0\n", n, 1000 / $4; ok = 1 }
        END { if (!ok) print "failed", n }'
}

for row; do
    echo "start $row"
    case $row in
    aes-128-gcm | aes-256-cbc | chacha20-poly1305 | sha256 | sha512)
        rate "$row" -bytes 16384 -evp "$row" ;;
    rsa2048-sign) rate "$row" rsa2048 ;;
    shell-loop)
        # shellcheck disable=SC2016  # the timed shell expands it
        timed "$row" sh -c 'i=0; s=0
            while [ $i -lt 200000 ]; do i=$((i + 1)); s=$((s + i)); done; echo $s' ;;
    python) timed "$row" /usr/bin/python3 -S -E script.py ;;
    gzip)
        seq 1 500000 >"$tmp/bench-data"
        timed "$row" sh -c "gzip -c '$tmp/bench-data' | wc -c"
        rm -f "$tmp/bench-data" ;;
    sqlite)
        awk 'BEGIN {
            print "create table t(id integer primary key, name text, v real);"
            print "create index i on t(name); begin;"
            for (n = 0; n < 30000; n++)
                printf "insert into t values(%d, \"name %d\", %d.5);\n", n, n * 7919 % 30011, n
            print "commit; select count(*), sum(v), max(name) from t;" }' >"$tmp/bench-sql"
        rm -f "$tmp/bench-db"
        timed "$row" sqlite3 "$tmp/bench-db" ".read $tmp/bench-sql"
        rm -f "$tmp/bench-db" "$tmp/bench-sql" ;;
    compile) timed "$row" gcc -O2 -c -o "$tmp/bench.o" kernels.c; rm -f "$tmp/bench.o" ;;
    *) ./kernels "$row" ;;
    esac
done
