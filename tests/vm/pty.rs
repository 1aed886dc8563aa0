//! A pseudo-terminal with a program in it, as a person has.

use std::fs::File;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A terminal, and the program in it.
pub struct Terminal {
    master: File,
    slave: OwnedFd,
    child: Option<Child>,
    /// All it has written.
    pub seen: String,
}

impl Terminal {
    /// A terminal with nothing in it.
    pub fn prepare() -> Terminal {
        let (mut master, mut slave) = (0, 0);
        use std::ptr::{null, null_mut};
        // SAFETY: the two integers are filled in; the other arguments may be null.
        let ok = unsafe { libc::openpty(&mut master, &mut slave, null_mut(), null(), null()) };
        assert_eq!(ok, 0, "openpty: {}", std::io::Error::last_os_error());
        // SAFETY: fresh descriptors that nobody else owns.
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        Terminal { master, slave, child: None, seen: String::new() }
    }

    /// Starts `command` with the terminal as its standard input, output and error.
    pub fn spawn(&mut self, command: &mut Command) {
        let slave = &self.slave;
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: all calls are async-signal-safe. A session of its own makes the terminal the
        // controlling one, so that its keys can raise signals; and a shell that runs the tests in
        // the background may have left signals ignored, which a person's shell does not.
        unsafe {
            command.pre_exec(|| {
                for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        self.child = Some(command.spawn().expect("the built binary"));
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("a program was started")
    }

    /// Whether the program has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child().try_wait().expect("a child").is_some()
    }

    /// The terminal's modes as one comparable string.
    pub fn modes(&self) -> String {
        let mut t = MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: tcgetattr fills the structure.
        assert_eq!(unsafe { libc::tcgetattr(self.slave.as_raw_fd(), t.as_mut_ptr()) }, 0);
        // SAFETY: filled above.
        let t = unsafe { t.assume_init() };
        format!("{:x} {:x} {:x} {:x} {:?}", t.c_iflag, t.c_oflag, t.c_cflag, t.c_lflag, t.c_cc)
    }

    /// Types.
    pub fn send(&mut self, keys: &[u8]) {
        self.master.write_all(keys).expect("a terminal to type into");
    }

    fn read(&mut self, wait: Duration) -> bool {
        let mut p = libc::pollfd { fd: self.master.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        if unsafe { libc::poll(&mut p, 1, wait.as_millis() as i32) } <= 0 {
            return false;
        }
        let mut buf = [0; 4096];
        match self.master.read(&mut buf) {
            Ok(n) if n > 0 => {
                self.seen.push_str(&String::from_utf8_lossy(&buf[..n]));
                true
            }
            _ => false,
        }
    }

    /// Waits until the program has written `what`.
    pub fn expect(&mut self, what: &str, limit: Duration) {
        let start = Instant::now();
        while !self.seen.contains(what) {
            assert!(start.elapsed() < limit, "never saw {what:?} in {:?}", self.seen);
            self.read(Duration::from_millis(50));
        }
    }

    /// Waits until the modes satisfy `f`.
    pub fn expect_modes(&mut self, f: impl Fn(&str) -> bool, limit: Duration) {
        let start = Instant::now();
        while !f(&self.modes()) {
            assert!(start.elapsed() < limit, "modes stay {}; saw {:?}", self.modes(), self.seen);
            self.read(Duration::from_millis(20));
        }
    }

    /// Waits for the program's end.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(s) = self.child().try_wait().expect("a child") {
                while self.read(Duration::ZERO) {}
                return s;
            }
            if start.elapsed() > limit {
                let _ = self.child().kill();
                panic!("still running after {limit:?}; saw {:?}", self.seen);
            }
            self.read(Duration::from_millis(20));
        }
    }

    pub fn signal(&mut self, signal: libc::c_int) {
        // SAFETY: no memory is passed.
        unsafe { libc::kill(self.child().id() as libc::pid_t, signal) };
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
