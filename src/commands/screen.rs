//! What displays show.

use crate::machine::Machine;
use crate::qapi::define::Nothing;
use crate::qapi::{Error, Result};
use tandem_backends::picture;

crate::choice! {
    /// A format of pictures.
    pub enum ImageFormat {
        /// PPM: netpbm's P6.
        Ppm = "ppm",
        /// PNG.
        Png = "png",
    }
}

fn dump(
    vm: &Machine,
    filename: &str,
    device: Option<&str>,
    head: Option<i64>,
    format: ImageFormat,
) -> Result<Nothing> {
    if head.is_some() && device.is_none() {
        return Err(Error::new("'head' must be specified together with 'device'"));
    }
    if let Some(n) = head.filter(|n| *n != 0) {
        return Err(Error::new(format!("a display has one head, number 0, and not {n}")));
    }
    let display = vm.display(device).ok_or_else(|| match device {
        Some(id) => Error::no_device(format!("Device '{id}' is not a display")),
        None => Error::new("There is no console to take a screendump from"),
    })?;
    let p = display.picture();
    let bytes = match format {
        ImageFormat::Ppm => Some(picture::ppm(p.width, p.height, &p.rgb)),
        ImageFormat::Png => picture::png(p.width, p.height, &p.rgb),
    };
    let bytes = bytes.ok_or_else(|| Error::new("the picture cannot be packed"))?;
    std::fs::write(filename, bytes)
        .map_err(|e| Error::new(format!("failed to open file '{filename}': {e}")))?;
    Ok(Nothing {})
}

crate::commands! {
    /// Writes what a display shows to a file.
    fn "screendump"(cx, {
        /// Path of the file.
        filename: String,
        /// The display; the first one if absent.
        device: Option<String>,
        /// Which of its heads: 0.
        head: Option<i64>,
        /// The format; PPM if absent.
        format: Option<ImageFormat>,
    }) -> Nothing {
        dump(cx.vm, &filename, device.as_deref(), head, format.unwrap_or(ImageFormat::Ppm))
    }
}
