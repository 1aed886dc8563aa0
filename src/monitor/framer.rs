//! Finds where one JSON message ends and the next begins in a stream of bytes.
//!
//! Messages need no separator: an object ends with its closing brace. As QEMU does, strings may be
//! quoted by `'`, which is turned into standard JSON here. A message that cannot become valid is
//! reported once, and reading goes on at what looks like the start of another.

/// A message may have this many bytes.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Brackets may be nested this deep.
pub const MAX_DEPTH: usize = 100;

/// A piece of the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// What may be one JSON value.
    Message(Vec<u8>),
    /// What can be none, and why.
    Bad(&'static str),
    /// A line of a monitor for people.
    Line(String),
}

/// A line may have this many bytes; what is beyond is dropped.
const MAX_LINE: usize = 4096;

/// Finds lines in what a person types.
#[derive(Default)]
pub struct Lines {
    bytes: Vec<u8>,
    /// The last byte was a carriage return, whose line feed is no line of its own.
    returned: bool,
}

impl Lines {
    /// Takes the next bytes; hands complete lines to `out`.
    pub fn push(&mut self, input: &[u8], mut out: impl FnMut(Frame)) {
        for &b in input {
            let returned = std::mem::replace(&mut self.returned, b == b'\r');
            match b {
                b'\n' if returned => {}
                b'\n' | b'\r' => {
                    let line = std::mem::take(&mut self.bytes);
                    out(Frame::Line(String::from_utf8_lossy(&line).into_owned()));
                }
                0x08 | 0x7f => drop(self.bytes.pop()),
                0..=0x1f => {}
                _ if self.bytes.len() < MAX_LINE => self.bytes.push(b),
                _ => {}
            }
        }
    }
}

/// The state between two reads.
#[derive(Default)]
pub struct Framer {
    bytes: Vec<u8>,
    depth: usize,
    /// The quotation mark that ends the present string.
    quote: Option<u8>,
    escaped: bool,
    /// After a fault: everything up to the end of the line is passed over.
    skipping: bool,
}

impl Framer {
    /// Takes the next bytes of the stream; hands complete messages to `out`.
    pub fn push(&mut self, input: &[u8], mut out: impl FnMut(Frame)) {
        for &b in input {
            if self.skipping {
                self.skipping = b != b'\n';
                continue;
            }
            if let Some(frame) = self.byte(b) {
                out(frame);
            }
        }
    }

    fn byte(&mut self, b: u8) -> Option<Frame> {
        if self.bytes.len() >= MAX_MESSAGE {
            return self.bad("it is too long", true);
        }
        if let Some(quote) = self.quote {
            return self.in_string(b, quote);
        }
        match b {
            b' ' | b'\t' | b'\r' | b'\n' if self.bytes.is_empty() => return None,
            b'\n' if self.depth == 0 => return Some(Frame::Message(self.take())),
            b' ' | b'\t' | b'\r' | b'\n' => self.bytes.push(b),
            0..=0x1f | 0x7f.. => return self.bad("it holds a byte that JSON has not", false),
            b'"' | b'\'' => {
                self.quote = Some(b);
                self.bytes.push(b'"');
            }
            b'{' | b'[' => {
                // A scalar before it is a message of its own.
                let before = (self.depth == 0 && !self.bytes.is_empty())
                    .then(|| Frame::Message(self.take()));
                if self.depth == MAX_DEPTH {
                    return self.bad("its brackets are nested too deep", true);
                }
                self.depth += 1;
                self.bytes.push(b);
                return before;
            }
            b'}' | b']' => {
                if self.depth == 0 {
                    return self.bad("it closes a bracket that is not open", false);
                }
                self.depth -= 1;
                self.bytes.push(b);
                if self.depth == 0 {
                    return Some(Frame::Message(self.take()));
                }
            }
            _ => self.bytes.push(b),
        }
        None
    }

    fn in_string(&mut self, b: u8, quote: u8) -> Option<Frame> {
        match b {
            0..=0x1f => return self.bad("a string holds a control character", false),
            // JSON knows no \', which a string in single quotes may hold.
            b'\'' if self.escaped => {
                self.bytes.pop();
                self.bytes.push(b);
                self.escaped = false;
            }
            _ if self.escaped => {
                self.bytes.push(b);
                self.escaped = false;
            }
            b'\\' => {
                self.bytes.push(b);
                self.escaped = true;
            }
            b if b == quote => {
                self.bytes.push(b'"');
                self.quote = None;
            }
            b'"' => self.bytes.extend(b"\\\""),
            _ => self.bytes.push(b),
        }
        None
    }

    fn take(&mut self) -> Vec<u8> {
        self.depth = 0;
        self.quote = None;
        self.escaped = false;
        std::mem::take(&mut self.bytes)
    }

    fn bad(&mut self, why: &'static str, skip: bool) -> Option<Frame> {
        self.take();
        self.skipping = skip;
        Some(Frame::Bad(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(input: &[u8]) -> Vec<Frame> {
        let (mut f, mut out) = (Framer::default(), Vec::new());
        f.push(input, |x| out.push(x));
        let mut by_byte = Vec::new();
        let mut f = Framer::default();
        input.iter().for_each(|b| f.push(&[*b], |x| by_byte.push(x)));
        assert_eq!(out, by_byte, "cutting the stream elsewhere changes nothing");
        out
    }

    fn message(s: &str) -> Frame {
        Frame::Message(s.into())
    }

    #[test]
    fn messages_need_no_separator() {
        let got = frames(b" {\"a\":[1,{}]}{}\n[\"}\"] 12\n\n{\"x\n");
        assert_eq!(
            got,
            [
                message("{\"a\":[1,{}]}"),
                message("{}"),
                message("[\"}\"]"),
                message("12"),
                Frame::Bad("a string holds a control character"),
            ]
        );
    }

    #[test]
    fn single_quotes_become_standard() {
        assert_eq!(
            frames(br#"{'a': 'x"y\'z', "b": "it's"}"#),
            [message(r#"{"a": "x\"y'z", "b": "it's"}"#)]
        );
        assert_eq!(frames(br#"{"a\\": "\""}"#), [message(r#"{"a\\": "\""}"#)]);
    }

    #[test]
    fn lines_of_people() {
        let (mut l, mut out) = (Lines::default(), Vec::new());
        l.push(b"stox\x7fp\r\n\ninfo", |f| out.push(f));
        l.push(&[b'x'; 10_000], |f| out.push(f));
        l.push(b"\r", |f| out.push(f));
        assert_eq!(out[..2], [Frame::Line("stop".into()), Frame::Line(String::new())]);
        assert!(matches!(&out[2], Frame::Line(s) if s.len() == MAX_LINE));
    }

    #[test]
    fn faults_are_told_once_and_reading_goes_on() {
        assert_eq!(
            frames(b"}\xff{\"a\":1}"),
            [
                Frame::Bad("it closes a bracket that is not open"),
                Frame::Bad("it holds a byte that JSON has not"),
                message("{\"a\":1}"),
            ]
        );
        let mut deep = vec![b'['; 100_000];
        deep.extend(b"\n{}");
        assert_eq!(frames(&deep), [Frame::Bad("its brackets are nested too deep"), message("{}")]);
        let mut long = Framer::default();
        let mut out = Vec::new();
        long.push(b"{\"", |f| out.push(f));
        for _ in 0..40 {
            long.push(&[b'a'; 1 << 20], |f| out.push(f));
        }
        assert_eq!(out, [Frame::Bad("it is too long")]);
        assert!(long.bytes.capacity() <= 2 * MAX_MESSAGE);
        long.push(b"\n{}", |f| out.push(f));
        assert_eq!(out[1], message("{}"));
    }
}
