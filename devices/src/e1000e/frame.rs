//! Frames: checksums, and segments of long ones.

/// The sum of 16-bit words of `data` in ones' complement (RFC 1071), on top of `sum`.
pub fn sum(data: &[u8], mut sum: u32) -> u32 {
    for pair in data.chunks(2) {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        sum += u32::from(word);
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// What is to be summed up, and where the result goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Checksum {
    /// First byte.
    pub start: u16,
    /// Where the sum goes.
    pub at: u16,
    /// Last byte; 0 is the frame's.
    pub last: u16,
}

impl Checksum {
    /// Puts it in, with `extra` added. Nothing happens if it does not lie in the frame.
    pub fn insert(&self, frame: &mut [u8], extra: u32) {
        let (start, at) = (usize::from(self.start), usize::from(self.at));
        let end = match self.last {
            0 => frame.len(),
            last => (usize::from(last) + 1).min(frame.len()),
        };
        if start >= end || at + 2 > frame.len() {
            return;
        }
        let s = sum(&frame[start..end], extra);
        let s = !((s & 0xffff) + (s >> 16)) as u16;
        frame[at..at + 2].copy_from_slice(&s.to_be_bytes());
    }
}

/// How a frame becomes segments (TCP segmentation, datasheet §7.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// Bytes of all headers.
    pub headers: usize,
    /// Most payload of a segment, at least 1.
    pub payload: usize,
    /// The IP header is of version 4.
    pub ipv4: bool,
    /// What follows it is TCP, and not UDP.
    pub tcp: bool,
}

/// What the card does to a frame on its way out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Checksum of the IP header.
    pub ip: Option<Checksum>,
    /// Checksum of what it carries.
    pub payload: Option<Checksum>,
    /// Where the IP header and what it carries start, for segments.
    pub starts: (u16, u16),
    /// It becomes segments.
    pub segments: Option<Segmentation>,
}

/// A frame on its way out, and how much of it has gone.
#[derive(Debug)]
pub struct Outgoing {
    frame: Vec<u8>,
    work: Work,
    sent: usize,
    count: u16,
}

fn add(frame: &mut [u8], at: usize, n: u32, bytes: usize) {
    let Some(field) = frame.get_mut(at..at + bytes) else { return };
    let old = field.iter().fold(0u32, |v, b| v << 8 | u32::from(*b));
    let new = old.wrapping_add(n).to_be_bytes();
    field.copy_from_slice(&new[4 - bytes..]);
}

fn put16(frame: &mut [u8], at: usize, v: usize) {
    if let Some(field) = frame.get_mut(at..at + 2) {
        field.copy_from_slice(&(v.min(0xffff) as u16).to_be_bytes());
    }
}

impl Outgoing {
    /// A frame on which `work` is to be done.
    pub fn new(frame: Vec<u8>, work: Work) -> Outgoing {
        Outgoing { frame, work, sent: 0, count: 0 }
    }

    /// The next frame for the wire; `None` when all of it has gone.
    pub fn next(&mut self) -> Option<Vec<u8>> {
        let Some(s) = self.work.segments else {
            if self.sent > 0 || self.frame.is_empty() {
                return None;
            }
            self.sent = self.frame.len();
            let mut frame = std::mem::take(&mut self.frame);
            for c in [self.work.payload, self.work.ip].into_iter().flatten() {
                c.insert(&mut frame, 0);
            }
            return Some(frame);
        };
        let payload = self.frame.get(s.headers..)?.get(self.sent..).filter(|p| !p.is_empty())?;
        let now = payload.len().min(s.payload.max(1));
        let last = now == payload.len();
        let mut frame = [&self.frame[..s.headers], &payload[..now]].concat();
        let (ip, carried) = (usize::from(self.work.starts.0), usize::from(self.work.starts.1));
        let len = frame.len();
        if s.ipv4 {
            put16(&mut frame, ip + 2, len.saturating_sub(ip));
            add(&mut frame, ip + 4, self.count.into(), 2);
        } else {
            put16(&mut frame, ip + 4, len.saturating_sub(ip + 40));
        }
        if s.tcp {
            add(&mut frame, carried + 4, self.sent as u32, 4);
            if !last && let Some(flags) = frame.get_mut(carried + 13) {
                // FIN and PSH are the last one's.
                *flags &= !9;
            }
        } else {
            put16(&mut frame, carried + 4, len.saturating_sub(carried));
        }
        if let Some(c) = self.work.payload {
            // The sum of the addresses is in its place already, without the length.
            c.insert(&mut frame, len.saturating_sub(carried) as u32);
        }
        if let Some(c) = self.work.ip {
            c.insert(&mut frame, 0);
        }
        self.sent += now;
        self.count = self.count.wrapping_add(1);
        Some(frame)
    }
}

/// What a received frame's checksums are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The IP header's was looked at, and is right or not.
    pub ip: Option<bool>,
    /// That of TCP or UDP.
    pub payload: Option<bool>,
    /// It is UDP's.
    pub udp: bool,
}

/// Looks at the checksums of a frame. What is no plain IP packet has none.
pub fn verify(frame: &[u8]) -> Verdict {
    verify_ip(frame).unwrap_or_default()
}

fn verify_ip(frame: &[u8]) -> Option<Verdict> {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let mut kind = frame.get(12..14)?;
    let mut packet = frame.get(14..)?;
    if kind == [0x81, 0] {
        (kind, packet) = (frame.get(16..18)?, frame.get(18..)?);
    }
    let (ip, addresses, protocol, payload) = match kind {
        [0x08, 0x00] => {
            let header = usize::from(packet.first()? & 0xf) * 4;
            let len = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            let good = sum(packet.get(..header)?, 0) == 0xffff;
            let whole = packet.get(6)? & 0x3f == 0 && *packet.get(7)? == 0;
            let payload = packet.get(header..len).filter(|_| whole && header >= 20);
            let Some(payload) = payload else {
                return Some(Verdict { ip: Some(good), ..Verdict::default() });
            };
            (Some(good), packet.get(12..20)?, *packet.get(9)?, payload)
        }
        [0x86, 0xdd] => {
            let len = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
            (None, packet.get(8..40)?, *packet.get(6)?, packet.get(40..40 + len)?)
        }
        _ => return None,
    };
    let field = match protocol {
        TCP => payload.get(16..18),
        UDP => payload.get(6..8).filter(|f| *f != [0, 0]),
        _ => None,
    };
    let checked = field.map(|_| {
        let start = sum(addresses, u32::from(protocol) + payload.len() as u32);
        sum(payload, start) == 0xffff
    });
    Some(Verdict { ip, payload: checked, udp: protocol == UDP })
}
