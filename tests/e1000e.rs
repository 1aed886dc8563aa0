//! The 82574L with Linux's e1000e driver: traffic both ways over the user network, with each kind of
//! interrupt and of receive descriptor; and iPXE's driver.

mod vm;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;
use vm::pty::Terminal;
use vm::{guest_file, run, skip};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(1800);
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";
const ROM: &str = "/usr/lib/ipxe/qemu/efi-e1000e.rom";

/// Sends `body` to whoever connects.
fn gives(body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut c in listener.incoming().flatten() {
            let _ = c.write_all(&body);
        }
    });
    port
}

/// Takes what is sent, one connection after another.
fn takes() -> (u16, Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, told) = channel();
    thread::spawn(move || {
        for mut c in listener.incoming().flatten() {
            let mut all = Vec::new();
            let _ = c.read_to_end(&mut all);
            let _ = tell.send(all);
        }
    });
    (port, told)
}

#[test]
fn linux_moves_data_both_ways() {
    let [kernel, initrd] = ["vmlinuz-pc", "initramfs-pc"].map(guest_file);
    let (Some(kernel), Some(initrd)) = (kernel, initrd) else {
        return skip("guest vmlinuz-pc is missing; run scripts/setup");
    };
    if let Some(why) = vm::unusable("tcg") {
        return skip(&format!("accelerator tcg: {why}"));
    }
    let body: Vec<u8> = (0..4u64 << 20).map(|i| (i.wrapping_mul(i) >> 11) as u8).collect();
    let (source, (sink, arrived)) = (gives(body.clone()), takes());
    let mut machine = run(&["--accel", "tcg", "-m", "256M", "--append", "console=ttyS0 quiet"]);
    machine.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    machine.args(["--netdev", "user,id=n0"]);
    machine.args(["--device", "e1000e,netdev=n0,mac=52:54:00:00:00:07,romfile="]);
    let mut t = Terminal::prepare();
    t.spawn(&mut machine);
    t.expect("# ", LIMIT);
    let mut say = |command: &str, answer: &str| {
        t.seen.clear();
        // Not the word that the shell echoes.
        t.send(format!("{command}; echo fini''shed\n").as_bytes());
        t.expect("finished", LIMIT);
        assert!(t.seen.contains(answer), "{command}: {}", t.seen);
    };
    say("cat /sys/class/net/eth0/address", "52:54:00:00:00:07");
    for (mode, interrupts, mtu) in
        [(2, "eth0-rx-0", 1500), (1, "PCI-MSI", 9000), (0, "IO-APIC", 1500)]
    {
        say("rmmod e1000e", "");
        say(&format!("insmod /modules/*-e1000e.ko IntMode={mode}; ip link set eth0 mtu {mtu}"), "");
        say("udhcpc -i eth0 -q -n -t 20", "lease of 10.0.2.15 obtained");
        say("grep eth0 /proc/interrupts", interrupts);
        say("ping -c 1 10.0.2.2", "1 packets received");
        say(&format!("nc 10.0.2.2 {source} </dev/null >/tmp/body; wc -c </tmp/body"), "4194304");
        say(&format!("nc 10.0.2.2 {sink} </tmp/body"), "");
        assert!(
            arrived.recv_timeout(LIMIT).unwrap() == body,
            "mode {mode}: what came is not what went"
        );
        say("cat /sys/class/net/eth0/statistics/*_errors | sort -u", "\n0");
        say("cat /sys/class/net/eth0/statistics/tx_packets", "\n");
    }
    say("dmesg | grep -ciE 'e1000e.*(error|fail|hang|reset adapter|timeout)'", "\n0");
    say("dmesg | grep e1000e", "Intel(R) PRO/1000 Network Connection");
    t.send(b"poweroff -f\n");
    assert_eq!(t.wait(LIMIT).code(), Some(0), "{}", t.seen);
}

#[test]
fn ipxe_gets_an_address_from_its_rom() {
    let missing = [SEABIOS, ROM].into_iter().find(|f| !Path::new(f).exists());
    if let Some(f) = missing {
        return skip(&format!("{f} is missing; run scripts/setup"));
    }
    if let Some(why) = vm::unusable("tcg") {
        return skip(&format!("accelerator tcg: {why}"));
    }
    let mut t = Terminal::prepare();
    let mut machine = run(&["--accel", "tcg", "-m", "256M", "--firmware", "bios", "--boot", "n"]);
    t.spawn(machine.args(["--netdev", "user,id=n0", "--device", "e1000e,netdev=n0,bootindex=0"]));
    for said in ["iPXE", "net0: 52:54:00", "Configuring (net0", "net0: 10.0.2.15/255.255.255.0"] {
        t.expect(said, LIMIT);
    }
    t.signal(libc::SIGTERM);
    t.wait(LIMIT);
}
