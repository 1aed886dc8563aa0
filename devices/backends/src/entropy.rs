//! Random bytes.

use std::io;

/// A source of random bytes that does not block once the host is up.
pub trait EntropySource: Send + Sync {
    /// Fills all of `bytes`.
    fn fill(&self, bytes: &mut [u8]) -> io::Result<()>;
}

/// The host kernel's generator (getrandom(2)).
#[derive(Clone, Copy, Debug, Default)]
pub struct HostEntropy;

impl EntropySource for HostEntropy {
    fn fill(&self, bytes: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|r| !r.is_empty()) {
            // SAFETY: rest is writable for its length.
            let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
            match usize::try_from(n) {
                Ok(n) => done += n,
                Err(_) => {
                    let e = io::Error::last_os_error();
                    if e.kind() != io::ErrorKind::Interrupted {
                        return Err(e);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_fills_every_byte() {
        // 64 bytes all alike would be one chance in 2^504.
        let mut b = [0; 64];
        HostEntropy.fill(&mut b).unwrap();
        assert!(b.iter().any(|x| *x != b[0]));
        HostEntropy.fill(&mut []).unwrap();
    }
}
