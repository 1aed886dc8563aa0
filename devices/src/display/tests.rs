use super::*;
use crate::pci::testing::rig;
use crate::registry;
use crate::testing::{Random, context};

struct Board {
    ctx: DeviceContext,
    adapter: Arc<Adapter>,
}

/// A board with one card, its memory at C0000000h and its registers at C8000000h.
fn board(driver: &str) -> Board {
    let r = rig();
    let ctx = context(&r);
    let props = [("id", "gpu"), ("romfile", "")].map(|(k, v)| (k.to_string(), v.to_string()));
    registry::create(&ctx, driver, &props).unwrap();
    let adapter = ctx.directory.find::<Adapter>(Some("gpu")).unwrap();
    let (_, card) = r.bus.devices().into_iter().next().unwrap();
    card.config_write(0x10, &0xc000_0000u32.to_le_bytes());
    card.config_write(0x18, &0xc800_0000u32.to_le_bytes());
    card.config_write(4, &[3, 0]);
    Board { ctx, adapter }
}

impl Board {
    fn out(&self, port: u16, data: &[u8]) {
        self.ctx.io.pio_write(port, data);
    }
    fn indexed(&self, port: u16, index: u8, value: u8) {
        self.out(port, &[index, value]);
    }
    fn dispi(&self, index: u16, value: u16) {
        self.out(0x1ce, &index.to_le_bytes());
        self.out(0x1cf, &value.to_le_bytes());
    }
    fn byte(&self, at: u64) -> u8 {
        let mut b = [0];
        self.ctx.io.mmio_read(at, &mut b);
        b[0]
    }

    /// Text of 80 columns and 25 rows with characters of 8 by 16, as a video BIOS sets it.
    fn text_mode(&self) {
        self.out(0x3c2, &[0x67]);
        for (i, v) in [3, 1, 3, 0, 2].into_iter().enumerate() {
            self.indexed(0x3c4, i as u8, v);
        }
        for (i, v) in [0u8, 0, 0, 0, 0, 0x10, 0x0e, 0, 0xff].into_iter().enumerate() {
            self.indexed(0x3ce, i as u8, v);
        }
        for (i, v) in [(1, 79), (7, 0x1f), (9, 0x4f), (0x12, 0x8f), (0x13, 40), (0xa, 0x20)] {
            self.indexed(0x3d4, i, v);
        }
        self.attributes();
        // Grey is entry 7.
        self.out(0x3c8, &[7]);
        [0x2a; 3].iter().for_each(|c| self.out(0x3c9, &[*c]));
    }

    fn attributes(&self) {
        let mut b = [0];
        self.ctx.io.pio_read(0x3da, &mut b);
        for i in 0..16 {
            self.out(0x3c0, &[i]);
            self.out(0x3c0, &[i]);
        }
        self.out(0x3c0, &[0x12]);
        self.out(0x3c0, &[0x0f]);
        self.out(0x3c0, &[0x20]);
    }
}

#[test]
fn text_is_drawn_with_the_font_in_plane_2() {
    let b = board("VGA");
    assert!(b.adapter.picture().rgb.iter().all(|c| *c == 0));
    b.text_mode();
    // The font is loaded with all planes in a row at A0000h, then text goes on as before.
    b.indexed(0x3c4, 2, 4);
    b.indexed(0x3c4, 4, 7);
    b.indexed(0x3ce, 5, 0);
    b.indexed(0x3ce, 6, 5);
    b.ctx.io.mmio_write(0xa_0000 + 32 * u64::from(b'X'), &[0x81, 0x42]);
    b.text_mode();
    b.ctx.io.mmio_write(0xb_8000 + 2 * 81, &[b'X', 7]);
    assert_eq!((b.byte(0xb_80a2), b.byte(0xb_80a3)), (b'X', 7));
    let screen = b.adapter.text().unwrap();
    assert_eq!((screen.columns, screen.rows), (80, 25));
    assert_eq!(screen.cells[81], text::Cell { code: b'X', attribute: 7 });
    let p = b.adapter.picture();
    assert_eq!((p.width, p.height), (640, 400));
    let lit: Vec<usize> = (0..640 * 400).filter(|i| p.rgb[i * 3] != 0).collect();
    let at = |x: usize, y: usize| (16 + y) * 640 + 8 + x;
    assert_eq!(lit, [at(0, 0), at(7, 0), at(1, 1), at(6, 1)]);
    assert_eq!(p.rgb[lit[0] * 3..][..3], [0xaa; 3]);
    // A cursor of two lines.
    for (i, v) in [(0xa, 0x0e), (0xb, 0x0f), (0xe, 0), (0xf, 1)] {
        b.indexed(0x3d4, i, v);
    }
    assert_eq!(b.adapter.text().unwrap().cursor, Some((1, 0)));
}

#[test]
fn planes_take_what_the_write_modes_make() {
    let b = board("VGA");
    b.text_mode();
    b.indexed(0x3c4, 2, 0xf);
    b.indexed(0x3c4, 4, 6);
    b.indexed(0x3ce, 6, 5);
    let planes = |b: &Board| -> [u8; 4] {
        let mut p = [0; 4];
        assert!(b.adapter.vram.read(0x40, &mut p));
        p
    };
    let write = |mode: u8, v: u8| {
        b.indexed(0x3ce, 5, mode);
        b.ctx.io.mmio_write(0xa_0010, &[v]);
    };
    write(0, 0x5a);
    assert_eq!(planes(&b), [0x5a; 4]);
    // Colour 5 under the mask 0f, on what was read before.
    assert_eq!(b.byte(0xa_0010), 0x5a);
    b.indexed(0x3ce, 8, 0x0f);
    write(2, 5);
    assert_eq!(planes(&b), [0x5f, 0x50, 0x5f, 0x50]);
    b.indexed(0x3ce, 0, 2);
    write(3, 0xff);
    assert_eq!(planes(&b), [0x50, 0x5f, 0x50, 0x50]);
    // Exclusive or of a rotated byte; set/reset for plane 1.
    b.indexed(0x3ce, 8, 0xff);
    b.indexed(0x3ce, 1, 2);
    b.indexed(0x3ce, 3, 0x18 | 4);
    b.byte(0xa_0010);
    write(0, 0x0f);
    assert_eq!(planes(&b), [0xa0, 0xa0, 0xa0, 0xa0]);
    b.indexed(0x3ce, 3, 0);
    // Compare: pixels of colour 15 (bits 7 and 5).
    b.indexed(0x3ce, 5, 8);
    b.indexed(0x3ce, 2, 15);
    b.indexed(0x3ce, 7, 15);
    assert_eq!(b.byte(0xa_0010), 0xa0);
    // Only planes in the map mask change; the latch is copied.
    b.byte(0xa_0010);
    b.indexed(0x3c4, 2, 1);
    b.indexed(0x3ce, 5, 1);
    b.ctx.io.mmio_write(0xa_0011, &[0]);
    let mut p = [0; 4];
    assert!(b.adapter.vram.read(0x44, &mut p));
    assert_eq!(p, [0xa0, 0, 0, 0]);
}

#[test]
fn sixteen_and_256_colours_are_shown() {
    let b = board("VGA");
    b.text_mode();
    b.indexed(0x3ce, 6, 5);
    b.indexed(0x3d4, 9, 0x40);
    b.indexed(0x3d4, 0x17, 0xe3);
    b.indexed(0x3ce, 5, 0);
    // 640 by 400 in planes: the first pixel is colour 7.
    assert!(b.adapter.vram.load(0, &[0x80, 0x80, 0x80, 0]));
    let p = b.adapter.picture();
    assert_eq!((p.width, p.height, p.rgb[0], p.rgb[3]), (640, 400, 0xaa, 0));
    // 320 by 200 in bytes.
    b.indexed(0x3ce, 5, 0x40);
    b.indexed(0x3d4, 9, 0x41);
    assert!(b.adapter.vram.load(320 + 1, &[7]));
    let p = b.adapter.picture();
    assert_eq!((p.width, p.height, p.rgb[(320 + 1) * 3]), (320, 200, 0xaa));
}

#[test]
fn linear_modes_show_memory_that_the_guest_reaches_directly() {
    for driver in ["VGA", "bochs-display"] {
        let b = board(driver);
        let set = |index: u64, v: u16| {
            b.ctx.io.mmio_write(0xc800_0500 + 2 * index, &v.to_le_bytes());
        };
        for (i, v) in [(1, 640), (2, 480), (3, 32), (4, 0x41)] {
            set(i, v);
        }
        if driver == "VGA" {
            assert!(b.adapter.picture().rgb.iter().all(|c| *c == 0));
            b.attributes();
        }
        let vram = b.ctx.memory.find(0xc000_0000).unwrap();
        assert_eq!((vram.kind, vram.len()), (RegionKind::Device, 16 << 20));
        assert!(vram.load(4 * 640 + 4, &0x0012_3456u32.to_le_bytes()));
        let p = b.adapter.picture();
        assert_eq!((p.width, p.height), (640, 480));
        assert_eq!(p.rgb[(640 + 1) * 3..][..3], [0x12, 0x34, 0x56]);
        // 16 bits a pixel; turning the mode on clears.
        for (i, v) in [(4, 0), (3, 16), (4, 0x41)] {
            set(i, v);
        }
        assert!(vram.load(0, &0xf81fu16.to_le_bytes()));
        let p = b.adapter.picture();
        assert_eq!((&p.rgb[..6], p.rgb[(640 + 1) * 3]), (&[0xff, 0, 0xff, 0, 0, 0][..], 0));
        let mut edid = [0; 8];
        b.ctx.io.mmio_read(0xc800_0000, &mut edid);
        assert_eq!(edid, [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
        let saved = b.adapter.state();
        b.adapter.reset();
        assert_ne!(b.adapter.picture(), p);
        b.adapter.restore(&saved).unwrap();
        assert_eq!(b.adapter.picture(), p);
        let short = State { memory: vec![0; 5], ..saved };
        assert!(b.adapter.restore(&short).is_err());
    }
}

#[test]
fn banks_of_a_linear_mode_show_in_the_window() {
    let b = board("VGA");
    for (i, v) in [(1, 800), (2, 600), (3, 8), (4, 1), (5, 3)] {
        b.dispi(i, v);
    }
    b.indexed(0x3ce, 6, 5);
    b.ctx.io.mmio_write(0xa_0007, &[0x77]);
    let mut d = [0];
    assert!(b.adapter.vram.read(0x3_0007, &mut d) && d == [0x77]);
    b.attributes();
    b.out(0x3c8, &[0x77]);
    [0x3f; 3].iter().for_each(|c| b.out(0x3c9, &[*c]));
    let p = b.adapter.picture();
    assert_eq!(p.rgb[0x3_0007 * 3], 0xff);
}

#[test]
fn a_second_vga_and_odd_memory_are_refused() {
    let b = board("VGA");
    let fail = |driver: &str, prop: (&str, &str)| {
        let props = [prop, ("romfile", "")].map(|(k, v)| (k.to_string(), v.to_string()));
        registry::create(&b.ctx, driver, &props).err().unwrap()[0].to_string()
    };
    assert!(fail("VGA", ("id", "b")).contains("already"));
    assert!(fail("bochs-display", ("vgamem", "3M")).contains("power of two"));
    // What failed has left no trace.
    assert_eq!(b.ctx.io.pio.ranges().len(), 6);
}

#[test]
fn a_hostile_guest_ends_nothing() {
    let b = board("VGA");
    let mut r = Random::default();
    let ports: Vec<(u64, u64, String)> = b.ctx.io.pio.ranges();
    for round in 0..300_000u64 {
        let (a, v) = (r.next(), r.word().to_le_bytes());
        let size = 1usize << (a & 3);
        let mut into = [0; 8];
        let (start, len, _) = &ports[(a >> 8) as usize % ports.len()];
        let port = (start + (a >> 40) % len) as u16;
        let at = match a >> 4 & 3 {
            0 => 0xa_0000 + (a >> 20) % 0x1_fff8,
            1 => 0xc000_0000 + (a >> 20) % ((16 << 20) - 8),
            _ => 0xc800_0000 + (a >> 20) % 0x700,
        };
        match a >> 60 {
            0..=5 => b.out(port, &v[..size.min(4)]),
            6 | 7 => b.ctx.io.pio_read(port, &mut into[..size.min(4)]),
            8..=13 => b.ctx.io.mmio_write(at, &v[..size]),
            _ => b.ctx.io.mmio_read(at, &mut into[..size]),
        }
        if round % 2000 == 0 {
            let p = b.adapter.picture();
            assert_eq!(p.rgb.len(), p.width as usize * p.height as usize * 3);
            b.adapter.text();
        }
    }
}
